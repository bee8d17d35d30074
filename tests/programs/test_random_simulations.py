"""Whole runs of `coserve simulate`, with every group and key drawn at random, against what their tables and configs
say: all metrics recomputed one by one, laws that hold in every run, and pairs of runs that must be equal.

`python -m tests.programs.test_random_simulations FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from profiles.named import device_named, model_named
from profiles.schema import Provenance, write_profile
from sim.cli import main
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import LoraSpec
from sim.cost.context import CostContext
from sim.cost.roofline import Roofline
from sim.cost.sampled import designed_works
from tests.engine.mixtures import try_seeds
from tests.programs.naive_metrics import Row, Tables, data_of, expected, peak_tok_s

CONFIGS = Path(__file__).parents[2] / "configs"
GENERAL: dict[str, tuple[Any, ...]] = {
    "budget_s": ("null", 0.02, 0.1),
    "margin": (0.05, 0.0, 0.3),
    "max_forward_tokens": (8192, 100, 1024),
    "min_chunk_tokens": (16, 1, 64),
}
WHOLE: dict[str, tuple[Any, ...]] = {"token_budget": ("null", 64, 300)}
POLICIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "coserving": GENERAL,
    "coserving_slack": {
        "budget_s": ("null", 0.1),
        "ttft_s": ("null", 1.0),
        "max_burst": (4.0, 1.0),
        "idle_share": (0.3, 1.0),
        "smoothing": (0.05, 0.5),
        "margin_deviations": (3.0, 0.0),
        "min_chunk_tokens": (16, 1),
    },
    "coserving_static": {"token_budget": (256, 80), "backward_layers": (1, 5), "overlap": ("true", "false")},
    "finetune_only": {},
    "inference_only": WHOLE,
    "separate_50": WHOLE,
    "spatial": WHOLE | {"slice_s": (0.05, 0.01)},
    "spatial_limited": GENERAL,
    "spatial_stream": WHOLE | {"forward_tokens": (256, 50), "backward_layers": (1, 7)},
    "temporal": WHOLE | {"interval": (64, 1, 7)},
    "temporal_dynamic": WHOLE | {"min_interval": (32, 1), "queue_step": (4.0, 1.0), "window_s": (10.0, 0.5)},
    "temporal_limited": GENERAL,
}
"""Policy -> its keys with values."""
ROUTERS = ("adapter_affinity", "consolidate", "least_tokens", "power_of_two", "round_robin", "slo_aware")
DURATIONS = (
    "workload.duration_s",
    "workload.think_s",
    "workload.ramp_s",
    "workload.retry_s",
    "workload.arrivals.bin_s",
    "run.drain_s",
    "policy.budget_s",
    "policy.ttft_s",
    "policy.slice_s",
    "policy.window_s",
)
RATES = ("workload.rate_rps", "policy.rate_step_rps")


class Drawn:
    """The overrides of one run, by group; files that they name are in `folder`."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = np.random.default_rng(seed)
        self.folder = folder
        self.policy = self._policy()
        self.classes = ("default",)
        self.slo = self._slo()
        self.cluster = self._cluster()
        self.workload = self._workload()
        self.finetune = self._finetune()
        self.device = self._device()
        self.cost = self._cost()
        self.rest = [*self._limits(), f"seed={seed % 7}"]
        self.drain = f"run.drain_s={self.one_of(60.0, 0.0, 0.5)}"

    @property
    def overrides(self) -> list[str]:
        return [*self.policy, *self.without_policy]

    @property
    def without_policy(self) -> list[str]:
        return [*self.traffic, *self.finetune, *self.cost, self.drain]

    @property
    def traffic(self) -> list[str]:
        return [*self.slo, *self.workload, *self.cluster, *self.device, *self.rest]

    def one_of(self, *choices: Any) -> Any:
        """The first as often as not."""
        return choices[0 if self.random.random() < 0.4 else int(self.random.integers(len(choices)))]

    def among(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def _policy(self) -> list[str]:
        name = self.among(*POLICIES)
        return [f"policy={name}", *(f"policy.{k}={self.one_of(*v)}" for k, v in POLICIES[name].items())]

    def _slo(self) -> list[str]:
        name = self.among("flexllm", "llmstation", "mlperf_server", "two_classes")
        own = [f"slo={name}"]
        if name == "two_classes":
            self.classes = ("interactive", "batch")
        elif self.random.random() < 0.4:
            own.append(f"slo.classes.default.e2e_s={self.among(2.0, 8.0)}")
        if self.random.random() < 0.3:
            own.append(f"+slo.classes.extra={{ttft_s:{self.among(0.4, 3.0)},tpot_s:null}}")
            self.classes += ("extra",)
        return own

    def _cluster(self) -> list[str]:
        own = self.one_of(
            ["cluster=single"],
            ["cluster.pipelines=2"],
            ["cluster.pipelines=4"],
            ["cluster=mixed"],
            ["cluster.pipelines=null", "cluster.groups=[{pipelines:1,kv_tokens:700},{pipelines:1,tp:2}]"],
        )
        return [*own, f"cluster/router={self.among(*ROUTERS)}"]

    def _limits(self) -> list[str]:
        max_sequences = self.among(256, 2, 8, 30)
        limits = {
            "kv_tokens": self.among("null", 300, 800, 2000, 20000),
            "block_tokens": self.among(16, 1, 7),
            "max_sequences": max_sequences,
            "max_tokens": max_sequences + self.among(256, 0, 20),
            "max_sequence_tokens": self.among("null", "null", 150, 700),
            "admission": self.among("fcfs", "deadline", "shortest"),
            "lookahead": self.one_of(0, 1),
        }
        return [f"cluster.limits.{key}={value}" for key, value in limits.items()]

    def _workload(self) -> list[str]:
        name = self.one_of("csv", "poisson", "gamma", "closed_loop", "constant", "short", "builtin")
        duration_s = float(self.among(2.0, 3.5, 6.0))
        own = [f"workload={name}", f"workload.duration_s={duration_s}"]
        if name == "csv":
            own = ["workload=csv", f"workload.file={self._csv(duration_s)}"]
        elif name == "closed_loop":
            own += [f"workload.clients={self.among(1, 5, 30)}", f"workload.think_s={self.among(0.0, 0.3)}"]
            own += [
                f"workload.ramp_s={self.among(0.0, 1.0)}",
                f"workload.think={self.among('constant', 'exponential')}",
                f"workload.retry_s={self.one_of(1.0, 0.05)}",
            ]
        else:
            own.append(f"workload.rate_rps={self.among(2.0, 8.0, 20.0)}")
        if name not in ("csv", "short"):
            lengths = self.among("short", "short", "sharegpt_fit", "lognormal", "fixed")
            own.append(f"workload/lengths={lengths}")
        if name != "csv":
            own.append(f"workload.adapters.count={self.one_of(0, 3)}")
            own.append(f"workload.max_requests={self.one_of('null', 9)}")
        return own

    def _csv(self, duration_s: float) -> Path:
        """Requests with ties, bursts, classes and adapters."""
        random, count = self.random, int(self.random.integers(1, 40))
        arrival_s = np.sort(random.random(count) * duration_s)
        if random.random() < 0.4:
            arrival_s = np.floor(4 * arrival_s) / 4
        longest = self.among((100, 30), (600, 100), (30, 200))
        lines = ["arrival_s,prompt_tokens,output_tokens,slo,adapter"]
        for time_s in arrival_s.tolist():
            prompt, output = (int(random.integers(1, most)) for most in longest)
            lines.append(
                f"{time_s!r},{prompt},{output},{self.among(*self.classes)},{self.among('', 'a', 'b')}"
            )
        path = self.folder / "own.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _finetune(self) -> list[str]:
        name = self.one_of("file", "none", "sky_t1", "sky_t1_strata", "two_jobs")
        own = [f"finetune={name}"]
        if name == "none":
            return own
        jobs = {"file": ["file"], "two_jobs": ["sky_t1", "instructions"]}.get(name, ["sky_t1"])
        if name == "file":
            lengths = self.random.integers(1, self.among(60, 400), int(self.random.integers(4, 30)))
            path = self.folder / "lengths.jsonl"
            path.write_text("".join(f'{{"tokens": {length}}}\n' for length in lengths))
            own.append(f"finetune.jobs.file.data.file={path}")
        for job in jobs:
            order = self.among("layer_major", "window_major")
            memories = ("auto", "stash", "recompute") if order == "window_major" else ("auto", "stash")
            keys = {
                "epochs": self.among("null", 1, 3) if name == "file" else "null",
                "shuffle": self.among("true", "false"),
                "cutoff_len": self.among(8192, 50, 200),
                "accumulation": self.among(1, 2, 5),
                "weight": self.among(1.0, 3.0),
                "start_s": self.one_of(0.0, 0.7),
                "order": order,
                "memory": self.among(*memories),
            }
            own += [f"finetune.jobs.{job}.{key}={value}" for key, value in keys.items()]
        return own

    def _device(self) -> list[str]:
        own = [f"model={self.one_of('llama_3_1_8b', 'llama_3_2_1b', 'qwen2_5_7b', 'qwen2_5_14b')}"]
        own.append(f"device={self.one_of('a100_80gb', 'h100', 'l40s', 'h200')}")
        if self.random.random() < 0.5:
            own += ["+device.idle_power_w=40", "+device.price_per_hour=1.5"]
        return own

    def _cost(self) -> list[str]:
        name = self.one_of("roofline", "table", "exact", "flexllm_a100", "vllm_eager_a100")
        if name not in ("roofline", "table"):
            return [f"cost={name}"]
        keys = {"world.spread": (0.03, 0.0, 0.3), "predictor.factor": (1.0, 0.5, 1.7)}
        own = [f"cost={name}", *(f"cost.{key}={self.one_of(*values)}" for key, values in keys.items())]
        if name == "roofline":
            return [*own, f"cost.predictor.of.rows={self.one_of(600, 150)}"]
        file = self._profile()
        own += [f"cost.{slot}.of.path={file}" for slot in ("world", "predictor")]
        return [
            *own,
            f"cost.predictor.of.share={self.one_of(0.4, 1.0)}",
            f"cost.predictor.of.seed={self.among(0, 1)}",
        ]

    def _profile(self) -> Path:
        """Iterations of all kinds or some on the drawn device, with noise, and with what collected ones have or not."""
        named = dict(choice.split("=") for choice in self.device if not choice.startswith("+"))
        device, model, lora = device_named(named["device"]), model_named(named["model"]), LoraSpec()
        tp = yaml.safe_load((CONFIGS / "model" / f"{named['model']}.yaml").read_text()).get("tp", 1)
        roofline = Roofline().build(CostContext(device=device, model=model, tp=tp, lora=lora, seed=0))
        works = designed_works(model, lora.params(model), self.one_of(300, 900), self.among(0, 1, 2))
        rows, first = np.unique(
            np.array([work_row(work) for work in works], float), axis=0, return_index=True
        )
        seconds = np.array([roofline.iteration_s(works[index]) for index in first])
        seconds *= np.exp(0.02 * self.random.standard_normal(len(seconds)))
        columns = dict(zip(WORK_COLUMNS, rows.T, strict=True))
        columns |= {f"seconds_p{p}": seconds * more for p, more in ((20, 0.98), (50, 1.0), (80, 1.03))}
        if self.random.random() < 0.5:
            host_s = np.minimum(2e-3, 0.2 * seconds)
            ahead_s = np.where(
                self.random.random(len(seconds)) < self.among(0.0, 0.5), seconds - host_s, math.nan
            )
            columns |= {"host_s": host_s, "ahead_s": ahead_s, "repeats": np.full(len(seconds), 5.0)}
            columns["point"] = np.arange(len(seconds), dtype=float)
        without = self.one_of((), ("backward",), ("forward", "backward", "optimizer"), ("prefill",))
        left_out = [name for name in WORK_COLUMNS if name.startswith(without)] if without else []
        kept = ~np.any([columns[name] > 0 for name in left_out], axis=0) if left_out else slice(None)
        said = dict.fromkeys(("source", "date", "how", "licence", "versions"), "a test")
        path = self.folder / "profile.parquet"
        provenance = Provenance(device=device.name, model=model.name, tp=tp, **said)
        write_profile(path, {name: values[kept] for name, values in columns.items()}, provenance)
        return path


class Refused(Exception):
    """The configuration is none."""


def program(*argv: str) -> str:
    """What `coserve ...` prints; Refused with what it says where it refuses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv])
    if code:
        raise Refused(err.getvalue())
    return out.getvalue()


def simulated(folder: Path, *overrides: str, bounds: bool = False) -> Tables:
    program("simulate", *overrides, f"run.bounds={str(bounds).lower()}", f"hydra.run.dir={folder}")
    return Tables(folder)


# Metrics


def assert_metrics(run: Tables, peak: float | None) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    wanted = expected(run, summary["duration_s"], peak)
    assert_row(summary, wanted)
    assert len(summary["classes"]) == len(wanted["classes"])
    for own, other in zip(summary["classes"], wanted["classes"], strict=True):
        assert_row(own, other)


def assert_row(row: Row, wanted: Row) -> None:
    for key, value in wanted.items():
        if key == "classes" or (key.startswith(("peak_", "finetune_share")) and value == "unknown"):
            continue
        if isinstance(value, float):
            own = math.nan if row[key] is None else row[key]
            assert own == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key
        else:
            assert row[key] == value, key


# Laws


def assert_laws(run: Tables) -> None:
    rows = defaultdict(list)
    for row in run.iterations:
        rows[row["pipeline"]].append(row)
    for index, own in rows.items():
        own.sort(key=lambda row: row["iteration"])
        assert_iterations(run, index, own)
    assert_requests(run)
    assert_arrivals(run)
    assert_finetuning(run, rows)


def room_of(run: Tables, pipeline: int) -> float:
    """Tokens of a request that can ever be held."""
    limits, kv_tokens = run.limits, run.pipelines[pipeline].kv_tokens
    longest = limits["max_sequence_tokens"] or run.config["model"]["max_context_tokens"]
    block = limits["block_tokens"]
    return min(longest, math.inf if kv_tokens is None else kv_tokens // block * block)


def assert_requests(run: Tables) -> None:
    assert len({row["request"] for row in run.requests}) == len(run.requests)
    end_s = run_end_s(run)
    for row in run.requests:
        token_s = run.token_s[row["request"]]
        assert row["generated_tokens"] == len(token_s)
        assert all(a < b for a, b in itertools.pairwise(token_s))
        if row["pipeline"] < 0:
            assert row["outcome"] == "rejected"
            continue
        room = room_of(run, row["pipeline"])
        assert (row["outcome"] == "rejected") == (row["prompt_tokens"] >= room)
        if row["outcome"] == "rejected":
            assert not token_s and math.isnan(row["scheduled_s"])
        if token_s:
            assert row["arrival_s"] <= row["scheduled_s"] < token_s[0] == row["first_token_s"]
        if row["outcome"] == "finished":
            assert row["last_token_s"] == token_s[-1]
            assert len(token_s) == min(row["output_tokens"], room - row["prompt_tokens"])
        if row["outcome"] == "unfinished":
            assert len(token_s) < row["output_tokens"]
            assert end_s[row["pipeline"]] >= run_duration_s(run) + run.config["run"]["drain_s"]


def run_duration_s(run: Tables) -> float:
    duration_s: float = json.loads((run.folder / "summary.json").read_text())["duration_s"]
    return duration_s


def run_end_s(run: Tables) -> dict[int, float]:
    ends: dict[int, float] = defaultdict(float)
    for row in run.iterations:
        ends[row["pipeline"]] = max(ends[row["pipeline"]], row["end_s"])
    return ends


def assert_arrivals(run: Tables) -> None:
    """Every line of a file of requests is in the table, once, as it stands there."""
    file = run.config["workload"].get("file")
    if file is None:
        return
    lines = [line.split(",") for line in Path(file).read_text().splitlines()[1:]]
    stated = Counter((float(t), int(p), int(o), slo, adapter) for t, p, o, slo, adapter in lines)
    keys = ("arrival_s", "prompt_tokens", "output_tokens", "slo", "adapter")
    assert stated == Counter(tuple(row[key] for key in keys) for row in run.requests)


def assert_iterations(run: Tables, index: int, rows: list[Row]) -> None:
    limits, kv_tokens = run.limits, run.pipelines[index].kv_tokens
    requests = {row["request"]: row for row in run.requests if row["pipeline"] == index}
    stamped = Counter(time_s for id in requests for time_s in run.token_s[id])
    outcomes = {row["outcome"] for row in requests.values()}
    contexts, decoded, recomputed = decodes_of(run, index, requests)
    assert [row["iteration"] for row in rows] == [*range(len(rows))]
    refusals = run.config["workload"]["_target_"].endswith("Closed") and len(run.pipelines) > 1
    tick = 0
    for before, row in itertools.pairwise([None, *rows]):
        assert row["start_s"] < row["end_s"]
        assert before is None or before["end_s"] <= row["start_s"]
        assert row["sampled_tokens"] == stamped.pop(row["end_s"], 0)
        assert row["prefill_tokens"] + row["decode_count"] <= limits["max_tokens"]
        assert row["decode_count"] <= row["running"] <= limits["max_sequences"]
        if kv_tokens is not None:
            assert row["kv_blocks_used"] <= kv_tokens // limits["block_tokens"]
        if row["decode_count"]:
            tick += 1
            assert row["end_s"] == run.tick_s[index][tick - 1]
            assert row["decode_count"] == decoded[tick]
            assert row["decode_context_tokens"] == contexts[tick]
        ends_here = {id for id in requests if row["end_s"] in run.token_s[id]}
        named = {requests[id]["adapter"] for id in ends_here} - {""}
        assert len(named) <= row["adapters"] <= len(named) + row["prefill_chunks"]
        if limits["lookahead"] == 0:
            here = [
                r
                for r in requests.values()
                if r["outcome"] != "rejected" and r["arrival_s"] <= row["start_s"]
            ]
            left = [
                r for r in here if not (r["outcome"] == "finished" and r["last_token_s"] <= row["start_s"])
            ]
            # Whom one pipeline has refused may have asked again before another's last look.
            sure = [r for r in left if r["arrival_s"] < row["start_s"]] if refusals else left
            assert len(sure) <= row["running"] + row["waiting"] <= len(left)
            if before is not None and before["end_s"] < row["start_s"]:
                starts = [job["start_s"] for job in run.config["finetune"]["jobs"].values()]
                assert row["start_s"] in {r["arrival_s"] for r in left} | set(starts), "idle for nothing"
                assert all(r["arrival_s"] == row["start_s"] for r in left), "idle with work to do"
    assert not stamped and tick == len(run.tick_s[index])
    prefilled = sum(row["prefill_tokens"] for row in rows)
    whole = outcomes <= {"finished", "rejected"}
    segments = Counter(s["request"] for s in run.segments)
    if whole and all(segments[id] == r["preemptions"] + 1 for id, r in requests.items() if segments[id]):
        assert prefilled == recomputed
    else:
        assert prefilled >= recomputed
    assert sum(row["preempted"] for row in rows) == sum(r["preemptions"] for r in requests.values())


def decodes_of(
    run: Tables, index: int, requests: dict[int, Row]
) -> tuple[dict[int, int], dict[int, int], int]:
    """By tick the cached tokens that are read and the decodes, and the tokens of the prefills that ended."""
    contexts: dict[int, int] = defaultdict(int)
    decoded: dict[int, int] = defaultdict(int)
    came: dict[int, int] = defaultdict(int)
    prefilled = 0
    for segment in sorted(run.segments, key=lambda s: s["first_s"]):
        if segment["pipeline"] != index:
            continue
        id = segment["request"]
        prefilled += requests[id]["prompt_tokens"] + came[id]
        came[id] += 1
        for tick in range(segment["start_tick"] + 1, segment["end_tick"] + 1):
            decoded[tick] += 1
            contexts[tick] += requests[id]["prompt_tokens"] + came[id] - 1
            came[id] += 1
    return contexts, decoded, prefilled


def assert_finetuning(run: Tables, rows: dict[int, list[Row]]) -> None:
    layers = run.config["model"]["layers"]
    jobs = run.config["finetune"]["jobs"]
    for index in range(len(run.pipelines)):
        steps = sorted((s for s in run.steps if s["pipeline"] == index), key=lambda s: s["end_s"])
        trained = 0
        for step in steps:
            trained += step["tokens"]
            by_then = [row for row in rows[index] if row["end_s"] <= step["end_s"]]
            assert sum(row["forward_tokens"] for row in by_then) >= trained
            assert sum(row["backward_layer_tokens"] for row in by_then) >= layers * trained
            assert by_then[-1]["end_s"] == step["end_s"] and by_then[-1]["optimizer_params"] > 0
            assert step["end_s"] > jobs[step["job"]]["start_s"]
        total = sum(row["optimizer_params"] for row in rows[index])
        each = {total / len(steps)} if steps else {0.0}
        assert all(total == len(steps) * params for params in each) and bool(total) == bool(steps)
        for name, job in jobs.items():
            own = [step for step in steps if step["job"] == name]
            assert [step["step"] for step in own] == [*range(1, len(own) + 1)]
            assert all(step["samples"] <= job["accumulation"] for step in own)
            assert all(step["samples"] == job["accumulation"] for step in own[:-1])
    for name, job in jobs.items():
        if "file" in job["data"]:
            assert_samples(job, [step for step in run.steps if step["job"] == name], len(run.pipelines))


def assert_samples(job: Row, steps: list[Row], pipelines: int) -> None:
    """The steps are of samples of the file that pipelines took in turn, in its order or in some order; each may hold as
    many as a step has that were not trained when the run ended."""
    data, samples = data_of(job), job["accumulation"]
    passes = job["epochs"] or math.inf
    done = sum(step["samples"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    assert done <= passes * len(data)
    if any(step["samples"] < samples for step in steps):
        assert done + pipelines * samples >= passes * len(data)
    if pipelines == 1 and not job["shuffle"]:
        lengths = itertools.cycle(data)
        for step in steps:
            assert step["tokens"] == sum(itertools.islice(lengths, step["samples"]))
    begun = sorted(data * min(passes, math.ceil((done + pipelines * samples) / len(data))))
    assert sum(begun[:done]) <= tokens <= sum(begun[len(begun) - done :])
    if done == passes * len(data):
        assert tokens == passes * sum(data)


# Pairs of runs


def assert_equal(
    one: Tables, other: Tables, *names: str, but: tuple[str, ...] = (), scale: float = 1.0
) -> None:
    """Bit for bit, times of `other` being `scale` times those of `one`."""
    for name in names or one.frames:
        left, right = (run.frames[name].drop(columns=[*but], errors="ignore") for run in (one, other))
        assert len(left) == len(right), name
        for column in left:
            mine, its = left[column], right[column]
            if column.endswith("_s"):
                mine = mine * scale
            if mine.dtype == "category":
                mine, its = mine.astype(str), its.astype(str)
            assert mine.equals(its), f"{name}.{column}"


def same_in_a_worker(drawn: Drawn, run: Tables) -> None:
    """As one of two runs of a sweep, in processes, the run is the same, and so are the two tables of the sweep."""
    folder = drawn.folder / "sweep"
    sweep = [f"hydra.sweep.dir={folder}", "hydra.launcher.workers=2", "run.name=one,two"]
    shown = program("simulate", "-m", *drawn.overrides, "run.bounds=false", *sweep)
    assert_equal(run, Tables(folder / "0"))
    report = program("report", str(folder))
    assert shown.partition("runs:")[0].rstrip() == report.rstrip()


def same_beside_its_bounds(drawn: Drawn, run: Tables) -> None:
    """`run.bounds` changes nothing, and a bound is what its policy gives alone."""
    both = simulated(drawn.folder / "bounds", *drawn.overrides, bounds=True)
    assert_equal(run, both)
    for path in sorted((drawn.folder / "bounds/bounds").glob("*")):
        alone = simulated(drawn.folder / path.name, *drawn.without_policy, f"policy={path.name}")
        assert_equal(Tables(path), alone)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (path, alone.folder)]
        for summary in summaries:
            del summary["name"]
        assert summaries[0] == summaries[1]


def same_in_slow_motion(drawn: Drawn, run: Tables) -> None:
    """All seconds doubled, those of the costs and those of the traffic and the bounds: the same decisions."""
    config = run.config
    for slot in ("world", "predictor"):
        config["cost"][slot] = {
            "_target_": "sim.cost.scaled.Scaled",
            "factor": 2.0,
            "of": config["cost"][slot],
        }
    for key, factor in [*((key, 2.0) for key in DURATIONS), *((key, 0.5) for key in RATES)]:
        node, name = config[key.split(".")[0]], key.split(".")[-1]
        node = node["arrivals"] if "arrivals" in key and "arrivals" in node else node
        if isinstance(node.get(name), float | int):
            node[name] *= factor
    if "arrivals" in config["workload"]:
        config["workload"]["arrivals"]["rate_rps"] = config["workload"]["rate_rps"]
    for bounds in config["slo"]["classes"].values():
        bounds |= {key: value * 2 for key, value in bounds.items() if value is not None}
    for job in config["finetune"]["jobs"].values():
        job["start_s"] *= 2
    if config["workload"].get("file"):
        head, *lines = Path(config["workload"]["file"]).read_text().splitlines()
        cells = [line.split(",", 1) for line in lines]
        slow = drawn.folder / "slow.csv"
        slow.write_text("\n".join([head, *(f"{2 * float(t)!r},{rest}" for t, rest in cells)]) + "\n")
        config["workload"]["file"] = str(slow)
    given = drawn.folder / "given"
    groups = ("cost", "finetune", "policy", "slo", "workload")
    for group in groups:
        (given / group).mkdir(parents=True)
        (given / group / "drawn.yaml").write_text(yaml.safe_dump(config[group], sort_keys=False))
    chosen = [f"{group}=drawn" for group in groups]
    same = [*drawn.cluster, *drawn.device, *drawn.rest, f"run.drain_s={config['run']['drain_s']}"]
    slow_run = simulated(drawn.folder / "slow", "--config-dir", str(given), *chosen, *same)
    assert_equal(run, slow_run, scale=2.0)


def same_in_groups(drawn: Drawn, run: Tables) -> None:
    """Equal pipelines, named one by one."""
    count = run.config["cluster"]["pipelines"]
    if count is None:
        return
    groups = ",".join(["{pipelines:1}"] * count)
    named = simulated(
        drawn.folder / "groups", *drawn.overrides, "cluster.pipelines=null", f"cluster.groups=[{groups}]"
    )
    assert_equal(run, named)


def same_without_finetuning(drawn: Drawn, run: Tables) -> None:
    """Policies that cut no prompt for the sake of a bound only serve where no job is, as `inference_only`."""
    name = drawn.policy[0].partition("=")[2]
    whole = [o for o in drawn.policy[1:] if "token_budget" in o]
    others = [*drawn.traffic, drawn.drain, "finetune=none", "cost=exact"]
    if name in ("spatial", "spatial_stream", "temporal", "temporal_dynamic"):
        none = simulated(drawn.folder / "none", *drawn.policy, *others)
        only = simulated(drawn.folder / "only", "policy=inference_only", *whole, *others)
        assert_equal(none, only)


def same_on_half_a_cluster(drawn: Drawn, run: Tables) -> None:
    """The serving half of a separate pair is a single pipeline that serves, and neither knows of the other."""
    two = [
        o
        for o in drawn.without_policy
        if not o.startswith(("cluster=", "cluster.pipelines", "cluster.groups"))
    ]
    pair = simulated(drawn.folder / "pair", *two, "policy=separate_50", "cluster.pipelines=2")
    single = simulated(drawn.folder / "single", *two, "policy=inference_only", "cluster=single")
    assert_equal(pair, single, "requests", "ticks", "segments")


PAIRS: tuple[Callable[[Drawn, Tables], None], ...] = (
    same_in_a_worker,
    same_beside_its_bounds,
    same_in_slow_motion,
    same_in_groups,
    same_without_finetuning,
    same_on_half_a_cluster,
)


def check(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for attempt in itertools.count():
            drawn = Drawn(1000 * seed + attempt, Path(folder))
            try:
                run = simulated(Path(folder) / f"out{attempt}", *drawn.overrides)
                break
            except Refused:
                assert attempt < 20
        try:
            compare(drawn, run)
        except BaseException as error:
            error.add_note(f"attempt {attempt}: {' '.join(drawn.overrides)}")
            raise


def compare(drawn: Drawn, run: Tables) -> None:
    duration_s = run_duration_s(run)
    peak = None
    if run.config["finetune"]["jobs"]:
        alone = simulated(
            drawn.folder / "alone", *drawn.without_policy, "policy=finetune_only", "run.drain_s=0"
        )
        peak = peak_tok_s(alone, duration_s)
    assert_metrics(run, peak)
    assert_laws(run)
    if run.config["cost"]["world"] == run.config["cost"]["predictor"] and run.limits["lookahead"] == 0:
        errors = [r["predicted_s"] / (r["end_s"] - r["start_s"]) - 1 for r in run.iterations]
        assert all(math.isnan(e) or abs(e) < 1e-6 for e in errors)
    with contextlib.suppress(Refused):
        drawn.among(*PAIRS)(drawn, run)


@pytest.mark.parametrize("seed", range(4))
def test_a_whole_run_is_what_its_tables_say(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
