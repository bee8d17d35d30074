"""Whether a change leaves every row as it was: digests of all tables of many short runs.

    python tests/benchmarks/digests.py before.json                # in a checkout without the change
    python tests/benchmarks/digests.py after.json before.json     # with it: says what differs, about 90 seconds

Every policy runs in every scene: each order of admission, preemption, planning ahead, both orders of the
backward, several jobs, several pipelines and routers. A digest is of the bytes of the run's Parquet files and
of its summary, so equal digests are equal decisions and equal numbers to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir

from sim.assemble import CONFIGS, assemble
from sim.metrics import summarize
from sim.results import TABLES, write_run
from sim.simulate import run_assembly

SINGLE = ["cluster=single", "workload=poisson"]
TIGHT = [*SINGLE, "cluster.limits.kv_tokens=9000", "cluster.limits.max_sequence_tokens=4096"]
JOB = "finetune.jobs.sky_t1"
SCENES = {
    "2 req/s": [*SINGLE, "workload.rate_rps=2", "workload.duration_s=150"],
    "8 req/s": [*SINGLE, "workload.rate_rps=8", "workload.duration_s=60", "run.drain_s=20"],
    "lookahead": [*SINGLE, "workload.rate_rps=4", "workload.duration_s=80", "cluster.limits.lookahead=1"],
    "shortest first": [*TIGHT, "workload.rate_rps=6", "workload.duration_s=60", "cluster.limits.admission=shortest"],
    "deadline first": [
        *TIGHT, "workload.rate_rps=6", "workload.duration_s=60", "cluster.limits.admission=deadline",
        "cluster.limits.lookahead=1", "slo=two_classes",
    ],
    "window-major": [*SINGLE, "workload.rate_rps=3", "workload.duration_s=60", f"{JOB}.order=window_major"],
    "recompute": [
        *SINGLE, "workload.rate_rps=3", "workload.duration_s=60", f"{JOB}.order=window_major",
        f"{JOB}.memory=recompute",
    ],
    "two jobs": [*SINGLE, "finetune=two_jobs", "workload.rate_rps=3", "workload.duration_s=100"],
    "a job ends": [
        *SINGLE, "finetune=two_jobs", "workload.rate_rps=2", "workload.duration_s=100", f"{JOB}.epochs=1",
        f"{JOB}.data.samples=10",
    ],
    "wrong predictor": [
        *SINGLE, "model=qwen2_5_32b", "workload.rate_rps=1", "workload.duration_s=60", "cost.predictor.factor=0.7"
    ],
    "exact predictor": [
        *SINGLE, "model=qwen2_5_14b", "workload.rate_rps=3", "workload.duration_s=60", "cost=exact"
    ],
    "adapters": ["cluster=single", "workload=builtin", "workload.duration_s=60"],
    "four pipelines": [
        "workload=poisson", "workload.rate_rps=10", "workload.duration_s=30", "cluster/router=slo_aware",
        "slo=two_classes",
    ],
    "closed loop": ["workload=closed_loop", "workload.duration_s=30"],
    "unequal pipelines": ["cluster=mixed", "workload=poisson", "workload.rate_rps=10", "workload.duration_s=30"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("before", type=Path, nargs="?", help="digests of the other checkout")
    options = parser.parse_args()
    policies = sorted(path.stem for path in (CONFIGS / "policy").glob("*.yaml"))
    digests = {
        f"{scene}, {policy}": _digest([f"policy={policy}", *overrides])
        for scene, overrides in SCENES.items()
        for policy in policies
    }
    options.out.write_text(json.dumps(digests, indent=1))
    refused = sum(digest.startswith("refused") for digest in digests.values())
    print(f"{len(digests) - refused} runs; {refused} more are refused, as a policy that needs more pipelines")
    if options.before is None:
        return 0
    before = json.loads(options.before.read_text())
    different = [key for key in {**before, **digests} if before.get(key) != digests.get(key)]
    print("\n".join(["different:", *different]) if different else "all equal")
    return 1 if different else 0


def _digest(overrides: list[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with initialize_config_dir(str(CONFIGS), version_base=None):
                assembly = assemble(compose("config", overrides))
        except ValueError as error:
            return f"refused: {error}"
    recorder = run_assembly(assembly)
    summary = summarize(
        recorder,
        slos=assembly.slos,
        duration_s=assembly.horizon.duration_s,
        pipelines=assembly.facts,
        labels=assembly.labels,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_run(folder, recorder, summary, config={}, manifest={}, source="sim")
        files = [Path(folder) / name for name in [*(f"{table}.parquet" for table in TABLES), "summary.json"]]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
