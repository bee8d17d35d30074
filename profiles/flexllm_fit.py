"""How the constants of `cost=flexllm_a100` come out of FlexLLM's published measurements.

    python -m profiles.flexllm_fit [--data FOLDER]

Two sources (`flexllm/` in the data folder): the step times of a 70B model on 4 A100, and the mean iteration
times of 8B and 14B under load. The first are fitted as they are: Work against seconds. The second are means
over a run, so the model's mean is solved for as a fixed point: a sample of L tokens goes through
ceil(L / (256 - c)) forward iterations and one backward iteration per layer, where c = (prompt + output)
rate t tokens of an iteration serve requests, and t is the mean time asked for; what bursts change
of it is a factor taken from simulated runs with the constants of the round before, the mean over ROUNDS
rounds. One more row is the time of a whole finetuning iteration of 3,650 tokens on 8B, 0.61 s (FlexLLM,
temporal sharing with N = 1).

The fit is least squares of log(model / measured) over `FREE`, in logarithms, with a prior at its start values
(one standard deviation is a factor of 1.65, for shares of peak FLOP/s 15 %), so that what the data do not
determine stays where it was. What a window's attention reads is not fitted: it is the slope of the 70B step
times of windows of 8 tokens, 19 ns per layer and token of context for 2 key-value heads. The law of the
all-reduces was chosen among four (a constant per layer, one that falls with the devices, a padded batch,
padding tokens), and that the window's cost goes by key-value heads, by the error on models left out.
Temporal sharing with N = 64 and 128, attainment and finetuning rates entered nothing.

The command prints the constants, the error of each row, and how well models left out are predicted.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, median

import hydra
import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from sim.assemble import CONFIGS, assemble
from sim.checked import build
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostContext
from sim.cost.flexllm import LaunchBound
from sim.cost.iteration import IterationCost
from sim.errors import message, report
from sim.metrics import summarize
from sim.simulate import run_assembly
from sim.workload.lengths import Lognormal

Floats = NDArray[np.float64]

STEPS = "step_profile_llama70b_tp4_a100_budget256.csv"
MODELS = {"8B": "llama_3_1_8b", "14B": "qwen2_5_14b", "32B": "qwen2_5_32b", "70B": "llama_3_1_70b"}
PROMPT_TOKENS, OUTPUT_TOKENS, BUDGET_TOKENS, PIPELINES = 240, 260, 256, 4
DECODE_CONTEXT_TOKENS = 490
"""Mean context of a decode: prompt + E[o^2] / 2 E[o] with the built-in output lengths."""
DIFFERENCE = 0.02
"""Of a logarithm, for slopes: wide enough that a token more or less in a window does not show."""
NODES = ("world", "predictor")
SEEDS = (0, 1)
ROUNDS = 6
NOTHING = Work()
FREE = (
    "host_s",
    "launch_s",
    "collective_tokens",
    "window_launch_s",
    "backward_start_s",
    "backward_layer_s",
    "backward_flops",
    "link_bandwidth",
)
START = LaunchBound(
    host_s=3e-3,
    launch_s=0.3e-3,
    collective_tokens=128.0,
    window_launch_s=0.1e-3,
    backward_start_s=0.08e-3,
    backward_layer_s=1e-3,
    pass_flops=0.8,
    backward_flops=0.65,
    window_bandwidth=0.026,
)
"""Where the fit begins, and the centre of its prior: rough readings of the step times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One published number."""

    model: str
    kind: str
    """step: seconds of one iteration; tpot_mean and tpot_p99: of requests, under load."""
    label: str
    seconds: float
    work: Work = NOTHING
    rate_rps: float = math.nan
    """Requests per second and pipeline."""
    sigma: float = 0.05
    """Relative error expected of the model."""
    correction: float = 1.0
    """Simulated over modelled mean: what bursts and idle moments do, which the fixed point does not know."""


def context(model: str) -> CostContext:
    shape = build(ModelShape, OmegaConf.load(CONFIGS / "model" / f"{MODELS[model]}.yaml"), "model")
    device = build(DeviceSpec, OmegaConf.load(CONFIGS / "device" / "a100_80gb.yaml"), "device")
    return CostContext(device=device, model=shape, tp=shape.tp, lora=LoraSpec(), seed=0)


def read_steps(path: Path) -> list[Measured]:
    """Median seconds of each shape of iteration that the profile repeats.

    Warm-up runs are left out but for their prompts, which are the only full passes without a window, and so
    is the first iteration of a run, in which eight requests begin at once: it takes 20 ms more than the same
    tokens as decodes, whatever its size.
    """
    groups: dict[tuple[int, ...], list[float]] = defaultdict(list)
    before_us, sample = 0, 0
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            number = {key: int(value) for key, value in row.items() if value.isdigit()}
            seconds, before_us = (number["timestamp"] - before_us) * 1e-6, number["timestamp"]
            window, layers = number["num_finetuning_fwd_tokens"], number["num_bwd_layers"]
            prompt, decodes = number["num_prefilling_tokens"], number["num_decoding_tokens"]
            done, sample = sample, 0 if layers or number["step_idx"] == 0 else sample + window
            warmup = number["is_warmup_step"]
            if warmup and prompt + decodes == BUDGET_TOKENS and number["step_idx"] > 1:
                groups[prompt, decodes, 0, 0, 0].append(seconds)
            elif not warmup and prompt == 0 and decodes == 8:
                bucket = done if window >= 120 else done // 512 * 512 + 256
                groups[0, 8, window, bucket if window else 0, layers].append(seconds)
    full = [seconds for shape in [s for s in groups if s[0]] for seconds in groups.pop(shape)]
    if full:
        groups[250, 6, 0, 0, 0] = full
    rows = []
    for (prompt, decodes, window, done, layers), times in sorted(groups.items()):
        if len(times) < 5:
            continue
        work = Work(
            prefill=(Chunk(prompt, 0),) if prompt else (),
            decode_count=decodes,
            decode_context_tokens=decodes * 64,
            sampled_tokens=decodes,
            forward=(Chunk(window, done),) if window else (),
            backward=(LayerChunk(layers, 1024, 0),) if layers else (),
            overlap=layers > 0,
        )
        parts = [f"{prompt} prompt"] * bool(prompt) + [f"{decodes} decodes"]
        parts += [f"window {window} after {done}"] * bool(window) + [f"{layers} layers back"] * bool(layers)
        label = ", ".join(parts)
        rows.append(Measured(model="70B", kind="step", label=label, seconds=median(times), work=work))
    return rows


def read_loads(path: Path) -> list[Measured]:
    """Mean iteration times under load."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Measured(
                model=row["model"],
                kind=row["metric"],
                label=f"{row['cluster_rate_rps']} req/s {row['metric'].removeprefix('tpot_')}",
                seconds=float(row["value"]) * 1e-3,
                rate_rps=float(row["cluster_rate_rps"]) / PIPELINES,
                sigma=0.01 if row["metric"] == "tpot_mean" else 0.03,
            )
            for row in csv.DictReader(file)
            if row["system"] == "flexllm" and row["metric"] in ("tpot_mean", "tpot_p99")
        ]


def whole_sample() -> Measured:
    """FlexLLM, temporal sharing with N = 1: a finetuning iteration of a 3.65k-token sample on 8B."""
    tokens = 3650
    work = Work(forward=(Chunk(tokens, 0),), backward=(LayerChunk(32, tokens, 0),))
    label = f"a whole sample of {tokens}"
    return Measured(model="8B", kind="step", label=label, seconds=0.61, work=work, sigma=0.02)


def read_all(folder: Path) -> list[Measured]:
    return [*read_steps(folder / STEPS), *read_loads(folder / "published.csv"), whole_sample()]


def sample_lengths(count: int = 24) -> list[int]:
    """Equally likely sample lengths of `configs/finetune/sky_t1.yaml`."""
    law = build(Lognormal, _length_node(), "finetune.data.length")
    normal = NormalDist(law.mu, law.sigma)
    drawn = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [round(min(max(tokens, law.min_tokens), law.max_tokens)) for tokens in drawn]


def _length_node() -> dict[str, object]:
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / "finetune" / "sky_t1.yaml"))
    assert isinstance(node, dict)
    length = dict(node["jobs"]["sky_t1"]["data"]["length"])
    del length["_target_"]
    return length


def load_s(cost: IterationCost, layers: int, rate_rps: float, lengths: Sequence[int]) -> tuple[float, float]:
    """Mean seconds of an iteration of the static policy under load, the fixed point of the docstring, and of
    those with a window, which are the longest: short answers that fall into them make the tail of TPOT."""
    mean_s = 0.05
    for _ in range(8):
        decodes = OUTPUT_TOKENS * rate_rps * mean_s
        prompt = PROMPT_TOKENS * rate_rps * mean_s
        window = max(16, round(BUDGET_TOKENS - decodes - prompt))
        serving = Work(
            prefill=(Chunk(max(1, round(prompt)), 0),),
            decode_count=round(decodes),
            decode_context_tokens=round(decodes * DECODE_CONTEXT_TOKENS),
            sampled_tokens=round(decodes),
        )
        windows, iterations, window_s, seconds = 0, 0, 0.0, 0.0
        for length in lengths:
            count = math.ceil(length / window)
            cut = min(window, length)
            middle = serving._replace(forward=(Chunk(cut, (length - cut) // 2),))
            back = serving._replace(backward=(LayerChunk(1, length, 0),), overlap=True)
            window_s += count * cost.iteration_s(middle)
            seconds += layers * cost.iteration_s(back)
            windows += count
            iterations += count + layers
        mean_s += 0.7 * ((seconds + window_s) / iterations - mean_s)
    return mean_s, window_s / windows


def modelled_s(profile: LaunchBound, rows: Sequence[Measured]) -> list[float]:
    """The profile's seconds for each row."""
    costs: dict[str, IterationCost] = {}
    lengths = sample_lengths()
    out = []
    for row in rows:
        if row.model not in costs:
            costs[row.model] = profile.build(CONTEXTS[row.model])
        cost = costs[row.model]
        if row.kind == "step":
            out.append(cost.iteration_s(row.work))
        else:
            mean_s, window_s = load_s(cost, CONTEXTS[row.model].model.layers, row.rate_rps, lengths)
            out.append(row.correction * (mean_s if row.kind == "tpot_mean" else window_s))
    return out


CONTEXTS = {name: context(name) for name in MODELS}


def fit(rows: Sequence[Measured], start: LaunchBound = START, free: Sequence[str] = FREE) -> LaunchBound:
    """The constants of least squared log error, with the prior at `start`."""

    def profile(x: Floats) -> LaunchBound:
        values = {name: getattr(start, name) * math.exp(shift) for name, shift in zip(free, x, strict=True)}
        shares = {name for name in values if name.endswith(("_flops", "_bandwidth"))}
        return replace(start, **{name: min(v, 1.0) if name in shares else v for name, v in values.items()})

    def residuals(x: Floats) -> Floats:
        seconds = modelled_s(profile(x), rows)
        errors = [math.log(s / row.seconds) / row.sigma for s, row in zip(seconds, rows, strict=True)]
        return np.array([*errors, *(x / width)])

    width = np.array([0.15 if name.endswith("_flops") else 0.5 for name in free])

    return profile(least_squares(residuals, np.zeros(len(free))))


def corrected(rows: Sequence[Measured], profile: LaunchBound, share: float = 1.0) -> list[Measured]:
    """`rows` with the correction of each load, in logarithms, by `share` nearer to that of simulations of its run
    with `profile`."""
    modelled = modelled_s(profile, rows)
    loads = {(row.model, row.rate_rps) for row in rows if row.kind != "step"}
    simulated = {load: simulated_s(*load, profile) for load in sorted(loads)}
    result = []
    for row, seconds in zip(rows, modelled, strict=True):
        if row.kind != "step":
            off = simulated[row.model, row.rate_rps][row.kind] / seconds
            row = replace(row, correction=row.correction * off**share)
        result.append(row)
    return result


def simulated_s(model: str, rate_rps: float, profile: LaunchBound) -> dict[str, float]:
    """TPOT, the paper's, mean and 99th percentile, of the experiment that measured a load: mean over SEEDS."""
    constants = [f"+cost.{node}.{name}={getattr(profile, name)}" for node in NODES for name in FREE]
    found: dict[str, list[float]] = {"tpot_mean": [], "tpot_p99": []}
    for seed in SEEDS:
        overrides = [
            "experiment=end_to_end", f"model={MODELS[model]}", f"workload.rate_rps={rate_rps}", f"seed={seed}",
            *constants,
        ]  # fmt: skip
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            assembly = assemble(hydra.compose("config", overrides))
        recorder = run_assembly(assembly)
        summary = summarize(recorder, slos=assembly.slos, duration_s=assembly.horizon.duration_s)
        for kind, seconds in found.items():
            seconds.append(float(str(summary[f"tpot_paper_{kind[5:]}_s"])))
    return {kind: sum(seconds) / len(seconds) for kind, seconds in found.items()}


def least_squares(residuals: Callable[[Floats], Floats], x: Floats, steps: int = 40) -> Floats:
    """Levenberg-Marquardt; stops when a step gains less than 1e-5. Slopes are those of DIFFERENCE to both sides."""
    damping, r = 1e-2, residuals(x)
    for _ in range(steps):
        jacobian = np.stack([_slope(residuals, x, DIFFERENCE * unit) for unit in np.eye(len(x))], axis=1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ r
        gain = 0.0
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = residuals(x + np.clip(step, -1, 1))
            gain = 1 - float(tried @ tried) / max(float(r @ r), 1e-300)
            if gain > 0:
                x, r, damping = x + np.clip(step, -1, 1), tried, damping / 4
                break
            damping *= 4
        if gain < 1e-5:
            break
    return x


def _slope(residuals: Callable[[Floats], Floats], x: Floats, step: Floats) -> Floats:
    return (residuals(x + step) - residuals(x - step)) / (2 * DIFFERENCE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiles.flexllm_fit")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("COSERVE_DATA", "../shared/data")))
    try:
        rows = read_all(parser.parse_args(argv).data / "flexllm")
    except (ValueError, OSError) as refused:
        return report(parser.prog, refused, message(refused))
    fitted = fit(rows)
    for number in range(ROUNDS):
        rows = corrected(rows, fitted, 1 / (number + 1))
        fitted = fit(rows)
    print("constants")
    for name in FREE:
        print(f"  {name:24} {getattr(fitted, name):.6g}")
    print("rows")
    for row, seconds in zip(rows, modelled_s(fitted, rows), strict=True):
        error = seconds / row.seconds - 1
        measured_ms, model_ms = row.seconds * 1e3, seconds * 1e3
        print(f"  {row.model:4} {row.label:34} {measured_ms:8.2f} {model_ms:8.2f} ms {error:+7.1%}")
    print("left out: mean absolute error of its rows")
    for model in ("8B", "14B", "70B"):
        kept = fit([row for row in rows if row.model != model])
        left = [row for row in rows if row.model == model]
        errors = [s / row.seconds - 1 for s, row in zip(modelled_s(kept, left), left, strict=True)]
        print(f"  {model:4} {np.mean(np.abs(errors)):6.1%}  mean {np.mean(errors):+6.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
