"""How fast the simulator is beside Vidur on the same requests: simulation, whole process and memory.

    python3.11 -m venv VIDUR && VIDUR/bin/python -m pip install vidur==0.0.26     # its machine code is for 3.11
    coserve fetch azure_conv
    python tests/benchmarks/vidur.py VIDUR/bin/python OUT_FOLDER [--also PYTHON]      # ten minutes

Vidur (Agrawal et al., MLSys 2024) runs as it is installed, by its command line. Both replay the same arrivals and
lengths until the last request has ended: Llama-3-8B on one A100, the same K/V blocks, sequences and tokens of an
iteration. Vidur's scheduler `sarathi` does what `inference_only` does: decodes, then chunks of prompts, first come,
first served.

Its profiles are not in its package. It gets one in its own layout, written from our roofline: seconds of an iteration
by its tokens, spread evenly over a layer's operators, and of the attention. From it Vidur trains its random forests
and tabulates what they predict, before anything is measured; how fast it looks them up does not depend on the values.
How nearly both simulate the same iterations, their count says. What they differ in: the forests' error, the rounded
keys of the lookup, the 3 % of noise of our world.

Every turn runs each program once, and a ratio is of two runs of one turn: the median, and the least and the largest.
Seconds are the processor's, user and system. `loop` is the simulation, without imports, trace, tables and results;
`process` is all of it, with the files that either writes. Vidur's plots are off, they need a browser; `lean` is
Vidur without its metrics and its trace of events too, both of which it has by default, and with its predictor as
machine code. OUT_FOLDER/measured.csv has every run.

Five turns on a virtual machine with four cores that other work kept busy (Python 3.11.7 built without profile-guided
optimisation), three of the last load, `--rates 8 --chunk 2048`; decodes of an iteration on average, microseconds of
the loop per iteration (median), and how many times those of coserve:

    req/s  decodes  iterations           coserve  machine code    Vidur             lean
    2           7   302,881, 301,409        11.6           7.0      197  16.7         113   9.7 (7.8 to 10.5)
    6          43    51,548,  50,981        24.1          11.3      394  16.3         265  10.0 (8.8 to 10.9)
    8         161    13,862,  13,820        41.7          19.8      937  21.8         601  14.5 (14.4 to 14.5)

Vidur makes a batch of the running requests in every iteration, and schedules and ends each of them in it; coserve
counts what changes, so what costs more at a higher rate is arrivals, chunks and ends. For its seconds Vidur looks up a
dozen operators in tables, coserve adds up a few terms. Vidur's events go through the stages of a pipeline, of which
there is one here. coserve checks each plan before it is applied, writes a row of every iteration and every request,
which `lean` does not, and has finetuning in its loop, of which there is none here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from sim.assemble import CONFIGS, Assembly, assemble
from sim.cost.curves import Curves
from sim.cost.iteration import IterationCost

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 10_000
MAX_SEQUENCES = 256
MAX_REQUEST_TOKENS = 8192
SCENE = ["policy=inference_only", "cluster=single", "finetune=none", "model=llama_3_8b", "device=a100_80gb"]
SHAPE = {
    "n_head": 32, "n_q_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_expanded_embd": 14336, "use_gated_mlp": True,
    "vocab_size": 128256, "block_size": 16, "num_tensor_parallel_workers": 1,
}  # fmt: skip
"""Of the same model, in the columns of Vidur's profiles."""
LAYERS = 32
OPERATORS = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm", "mlp_up_proj",
    "mlp_act", "mlp_down_proj", "add",
)  # fmt: skip
"""Those of a layer that Vidur looks up by tokens and adds up."""
KEYS_STEP, CHUNK_STEP = 256, 32
"""Vidur rounds keys and tokens of attention up to multiples of these."""
MANY_SAMPLED = 64
"""Rows of logits of an iteration with a chunk, whose tokens are not sampled but for the last."""
DAY = "2023-11-16"
"""Vidur replays one day of a trace."""

# Each program as it is, and a line of JSON about its loop.
RUN_COSERVE = """
import json, sys, time
from sim import cli, simulate
run = simulate.run_assembly
def timed(*arguments):
    started_s = time.process_time()
    recorder = run(*arguments)
    loop_s = time.process_time() - started_s
    ends_s = recorder.iterations.arrays()["end_s"]
    print(json.dumps({"loop_s": loop_s, "iterations": len(ends_s), "simulated_s": float(ends_s[-1])}))
    return recorder
simulate.run_assembly = timed
sys.exit(cli.main())
"""
RUN_VIDUR = """
import json, time
from vidur import main
from vidur.entities import Batch
class Timed(main.Simulator):
    def run(self):
        self.started_s = time.process_time()
        super().run()
    def _write_output(self):
        loop_s = time.process_time() - self.started_s
        print(json.dumps({"loop_s": loop_s, "iterations": Batch.generate_id(), "simulated_s": self._time}))
        super()._write_output()
main.Simulator = Timed
main.main()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A simulator with its settings; `trace` is the argument that takes the folder of a trace."""

    name: str
    command: list[str]
    trace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a program said and took."""

    rate_rps: float
    turn: int
    program: str
    iterations: int
    simulated_s: float
    loop_s: float
    process_s: float
    peak_gib: float


def main() -> None:
    options = _options()
    out: Path = options.out.resolve()
    try:
        assemblies = {rate: _assembled(rate, options.chunk) for rate in options.rates}
    except ValueError as error:
        sys.exit(str(error))
    for rate, assembly in assemblies.items():
        write_traces(out / f"{rate:g}", _requests(assembly))
    any_rate = assemblies[options.rates[0]]
    write_traces(out / "few", _requests(any_rate)[:100])
    (spec,) = any_rate.pipelines
    assert isinstance(spec.world, IterationCost)
    write_profile(out / "profile", spec.world.curves, options.chunk)
    kv_blocks = spec.limits.kv_tokens // spec.limits.block_tokens
    programs = [_coserve(python, out, options.chunk) for python in (sys.executable, options.also) if python]
    programs += [_vidur(options.vidur, out, options.chunk, kv_blocks, lean=lean) for lean in (False, True)]
    if len({program.name for program in programs}) < len(programs):
        sys.exit(f"both Pythons have {programs[0].name}: one of the two may have it as machine code")
    for program in programs:
        # Vidur trains its predictor, Python caches bytecode.
        _run(program, out / "few", 0.0, 0)
    runs = []
    for rate, turn, program in product(assemblies, range(options.turns), programs):
        runs.append(_run(program, out / f"{rate:g}", rate, turn))
        print(runs[-1], file=sys.stderr)
    frame = pd.DataFrame(map(asdict, runs))
    frame.to_csv(out / "measured.csv", index=False)
    _print(frame)


def _options() -> argparse.Namespace:
    """The arguments; exits with a line on what cannot be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("vidur", help="a Python that has Vidur")
    parser.add_argument("out", type=Path, help="new folder for traces, the profile and all that is written")
    parser.add_argument("--also", help="another Python with coserve, as one where `make native` was run")
    parser.add_argument("--rates", type=_rates, default="2,6", help="requests per second (default: 2,6)")
    parser.add_argument("--chunk", type=int, default=512, help="most tokens of an iteration (default: 512)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each program at each rate (default: 3)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is already there")
    if not _succeeds(options.vidur, "import vidur.main"):
        parser.error(f"no Vidur: {options.vidur} -m pip install vidur==0.0.26")
    return options


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def _assembled(rate_rps: float, chunk: int) -> Assembly:
    """The scene with the first requests of the trace, at this rate, and seconds without noise."""
    trace = ["workload=azure_conv", f"workload.rate_rps={rate_rps}", f"workload.max_requests={REQUESTS}"]
    longest = f"workload.max_total_tokens={MAX_REQUEST_TOKENS}"
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return assemble(compose("config", [*SCENE, *_limits(chunk), *trace, longest, "cost=exact"]))


def _limits(chunk: int) -> list[str]:
    return [f"cluster.limits.max_tokens={chunk}", f"cluster.limits.max_sequences={MAX_SEQUENCES}"]


def _requests(assembly: Assembly) -> pd.DataFrame:
    table = assembly.workload.table
    assert table is not None
    return pd.DataFrame(
        {
            "arrival_s": table.arrival_s,
            "prompt_tokens": table.prompt_tokens,
            "output_tokens": table.output_tokens,
        }
    )


def write_traces(folder: Path, requests: pd.DataFrame) -> None:
    """The same requests in the columns of either program."""
    folder.mkdir(parents=True, exist_ok=True)
    requests.to_csv(folder / "coserve.csv", index=False)
    names = {
        "arrival_s": "Time",
        "prompt_tokens": "PromptTokenCount",
        "output_tokens": "CompletionTokenCount",
    }
    requests.rename(columns=names).assign(Date=DAY).to_csv(folder / "vidur.csv", index=False)


def write_profile(folder: Path, curves: Curves, chunk: int) -> None:
    """Operator times in ms for Vidur, where it looks for data sets that the hub has sent already.

    Logits and host time are in the operators. Keys and tokens of attention are those of the middle of a step.
    """
    layer_ms = 1e3 / LAYERS
    tokens = range(1, max(chunk, MAX_SEQUENCES) + 8)
    pass_s = [curves.host_s + curves.token_s[n] + curves.sampled_s[min(n, MANY_SAMPLED)] for n in tokens]
    dense = pd.DataFrame({"num_tokens": tokens, **SHAPE})
    for name in OPERATORS:
        dense[f"time_stats.{name}.median"] = np.array(pass_s) * layer_ms / len(OPERATORS)
    fixed_s, sequence_s, context_s = curves.decode
    rows: list[tuple[float | None, ...]] = []
    for step in range(0, MAX_REQUEST_TOKENS + 1, KEYS_STEP):
        keys = max(step - KEYS_STEP // 2, 0)
        for n in range(CHUNK_STEP, chunk + CHUNK_STEP, CHUNK_STEP):
            middle = n - CHUNK_STEP // 2
            seconds = curves.prefill.seconds(middle, max(keys - middle, 0))
            rows.append((1, step, n, seconds * layer_ms, None))
        for batch in range(1, MAX_SEQUENCES + 1):
            seconds = fixed_s + batch * (sequence_s + keys * context_s)
            rows.append((batch, step, 0, None, seconds * layer_ms))
    times = ["time_stats.attn_prefill.median", "time_stats.attn_decode.median"]
    attention = pd.DataFrame(rows, columns=["batch_size", "kv_cache_size", "prefill_chunk_size", *times])
    compute = _data_set(folder / "profiling_data" / "compute", "operators")
    (compute / "config.json").write_text(json.dumps({"model": "meta-llama/Llama-3-8B", "device_sku": "a100"}))
    dense.to_csv(compute / "mlp.csv.xz", index=False)
    attention.assign(**SHAPE).to_csv(compute / "attention.csv.xz", index=False)
    # One device sends nothing.
    network = _data_set(folder / "profiling_data" / "network", "network")
    (network / "config.json").write_text(json.dumps({"sku": "a100_dgx"}))


def _data_set(folder: Path, name: str) -> Path:
    """Where `huggingface_hub` keeps coserve/`name`."""
    held = folder / f"datasets--coserve--{name}"
    (held / "refs").mkdir(parents=True, exist_ok=True)
    (held / "refs" / "main").write_text("0" * 40)
    snapshot = held / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def _coserve(python: str, out: Path, chunk: int) -> Program:
    folder = f"hydra.run.dir={out}/coserve/${{now:%H-%M-%S-%f}}"
    run = ["workload=csv", "run.bounds=false", "run.drain_s=1000000", folder]
    command = [python, "-c", RUN_COSERVE, "simulate", *SCENE, *_limits(chunk), *run]
    built = _succeeds(python, "import sim.core.state; sim.core.state.__file__.index('.so')")
    name = "coserve, machine code" if built else "coserve"
    return Program(name=name, command=command, trace="workload.file={}/coserve.csv")


def _vidur(python: str, out: Path, chunk: int, kv_blocks: int, *, lean: bool) -> Program:
    """One forest of each operator instead of a search, and nothing on top of what decodes take in the profile."""
    forest = "random_forrest_execution_time_predictor_config"
    settings = {
        "replica_config_model_name": "meta-llama/Llama-3-8B",
        "replica_config_device": "a100",
        "replica_config_network_device": "a100_dgx",
        "replica_config_tensor_parallel_size": 1,
        "replica_config_num_pipeline_stages": 1,
        "cache_config_block_size": SHAPE["block_size"],
        "cache_config_num_blocks": kv_blocks,
        "replica_scheduler_config_type": "sarathi",
        "sarathi_scheduler_config_chunk_size": chunk,
        "sarathi_scheduler_config_batch_size_cap": MAX_SEQUENCES,
        "request_generator_config_type": "trace_replay",
        "trace_request_generator_config_date": DAY,
        "trace_request_generator_config_prefill_scale_factor": 1,
        "trace_request_generator_config_time_scale_factor": 1,
        "trace_request_generator_config_max_tokens": MAX_REQUEST_TOKENS,
        "execution_time_predictor_config_type": "random_forrest",
        f"{forest}_model_profiling_dataset": "coserve/operators",
        f"{forest}_network_profiling_dataset": "coserve/network",
        f"{forest}_cache_dir": out / "profile",
        f"{forest}_kv_cache_prediction_granularity": KEYS_STEP,
        f"{forest}_prediction_max_prefill_chunk_size": chunk,
        f"{forest}_prediction_max_batch_size": MAX_SEQUENCES,
        f"{forest}_prediction_max_tokens_per_request": MAX_REQUEST_TOKENS,
        f"{forest}_attention_decode_batching_overhead_fraction": 0,
        f"{forest}_num_estimators": 30,
        f"{forest}_max_depth": 32,
        f"{forest}_min_samples_split": 2,
        f"{forest}_k_fold_cv_splits": 2,
        f"{forest}_num_training_job_threads": 1,
        "metrics_config_output_dir": out / "vidur",
    }
    switches = ["--no-metrics_config_store_plots"]
    if lean:
        switches += ["--no-metrics_config_write_metrics", "--no-metrics_config_enable_chrome_trace"]
        switches.append(f"--{forest}_use_native_execution_time_predictor")
    command = [python, "-c", RUN_VIDUR, *[f"--{key}={value}" for key, value in settings.items()], *switches]
    name = "Vidur, lean" if lean else "Vidur"
    return Program(
        name=name, command=command, trace="--trace_request_generator_config_trace_file={}/vidur.csv"
    )


def _run(program: Program, trace: Path, rate_rps: float, turn: int) -> Run:
    """Run it once on the trace; exits with its last words if it fails."""
    log = trace / "said.txt"
    environment = _environment() | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    with log.open("w") as said:
        command = [*program.command, program.trace.format(trace)]
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    lines = log.read_text(encoding="utf-8").splitlines()
    if status:
        sys.exit("\n".join([f"{program.name} failed, see {log}; it said last:", *lines[-3:]]))
    (loop,) = [json.loads(line) for line in lines if line.startswith('{"loop_s"')]
    return Run(
        rate_rps=rate_rps,
        turn=turn,
        program=program.name,
        process_s=usage.ru_utime + usage.ru_stime,
        # The kernel counts in KiB, on macOS in bytes.
        peak_gib=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
        **loop,
    )


def _succeeds(python: str, statement: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", statement], env=_environment(), capture_output=True).returncode == 0
        )
    except OSError:
        return False


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _print(runs: pd.DataFrame) -> None:
    """Medians of each program, and what it takes in multiples of coserve in the same turn."""
    first = runs["program"].iloc[0]
    table = Table(
        "req/s", "program", "iterations", "simulated s", "loop s", "process s", "GiB", "x loop", "x process"
    )
    for rate_rps, of_rate in runs.groupby("rate_rps", sort=False):
        base = of_rate[of_rate["program"] == first].set_index("turn")
        for name, own in of_rate.groupby("program", sort=False):
            own = own.set_index("turn")
            mid = own.median(numeric_only=True)
            times = [
                _spread(own[key] / base[key]) if name != first else "" for key in ("loop_s", "process_s")
            ]
            table.add_row(
                f"{rate_rps:g}",
                str(name),
                f"{mid.iterations:,.0f}",
                f"{mid.simulated_s:,.0f}",
                f"{mid.loop_s:.2f}",
                f"{mid.process_s:.2f}",
                f"{mid.peak_gib:.2f}",
                *times,
            )
    Console(width=140).print(table)


def _spread(ratios: pd.Series[float]) -> str:
    return f"{ratios.median():.1f} ({ratios.min():.1f} to {ratios.max():.1f})"


if __name__ == "__main__":
    main()
