"""How the constants of `cost=vllm_eager_a100` come out of FlexLLM's published vLLM baseline.

    python -m profiles.vllm_eager_fit [--check]

The baseline is vLLM 0.8.3 without CUDA graphs, 8B on one A100, 256 tokens an iteration: the serving side of
FlexLLM's separate clusters. Its mean TPOT at five rates below saturation is published. Each is a whole
simulated run of `experiment=separate_serving` here, and two constants are fitted to the five by Gauss-Newton
steps on their logarithms: host_s (what does not grow with the batch) and pass_flops (what does). Nothing else
entered: the saturated rates, printed after, did not. On 8B the weights' reading hides launch_s, an assumption
(ten kernels a layer at 20 us each), and one device has no links: link_bandwidth is what NCCL reaches of them
with 4 devices (0.813 / (1 + 0.694 / 4), `sim.cost.efficiency`).

`--check` predicts with the shipped constants and fits nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import hydra
import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from sim.assemble import CONFIGS, assemble
from sim.metrics import summarize
from sim.simulate import run_assembly

Floats = NDArray[np.float64]

PUBLISHED_MS = {2: 13.0, 4: 15.5, 6: 18.3, 8: 21.9, 10: 29.8}
"""Requests per second and pipeline -> mean TPOT, as the paper counts it (FlexLLM, end-to-end figure)."""
SATURATED_MS = {12: 39.4, 16: 38.8, 20: 38.5}
CONSTANTS = ("host_s", "pass_flops")
DIFFERENCE = 0.05
"""Of a logarithm, for slopes: wide enough that a request more or less in a batch does not show."""
STEPS = 4


def tpot_ms(rate_rps: float, values: Sequence[float]) -> float:
    """Simulated mean TPOT with these CONSTANTS."""
    settings = [f"cost.world.{name}={value}" for name, value in zip(CONSTANTS, values, strict=True)]
    overrides = [
        "experiment=separate_serving", "model=llama_3_1_8b", f"workload.rate_rps={rate_rps}", *settings
    ]  # fmt: skip
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assembly = assemble(hydra.compose("config", overrides))
    recorder = run_assembly(assembly)
    summary = summarize(recorder, slos=assembly.slos, duration_s=assembly.horizon.duration_s)
    return 1e3 * float(str(summary["tpot_paper_mean_s"]))


def shipped() -> list[float]:
    """CONSTANTS of `configs/cost/vllm_eager_a100.yaml`."""
    settings = OmegaConf.load(CONFIGS / "cost" / "vllm_eager_a100.yaml")
    return [float(OmegaConf.select(settings, f"world.{name}")) for name in CONSTANTS]


def fit(start: Sequence[float], steps: int = STEPS) -> list[float]:
    """Least squares of log(simulated / published)."""
    best, best_loss = np.log(start), math.inf
    x = best
    for _ in range(steps + 1):
        r = _residuals(x)
        loss = float(r @ r)
        if loss >= best_loss:
            break
        best, best_loss = x, loss
        slopes = np.column_stack([_residuals(x + DIFFERENCE * unit) - r for unit in np.eye(len(x))])
        x = x - np.clip(np.linalg.lstsq(slopes / DIFFERENCE, r, rcond=None)[0], -0.5, 0.5)
    return [float(value) for value in np.exp(best)]


def _residuals(x: Floats) -> Floats:
    values = np.exp(x).tolist()
    logs: Floats = np.log([tpot_ms(rate, values) / published for rate, published in PUBLISHED_MS.items()])
    return logs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiles.vllm_eager_fit")
    parser.add_argument("--check", action="store_true")
    values = shipped() if parser.parse_args(argv).check else fit(shipped())
    for name, value in zip(CONSTANTS, values, strict=True):
        print(f"{name:12} {value:.3g}")
    for rate, published in (PUBLISHED_MS | SATURATED_MS).items():
        ours = tpot_ms(rate, values)
        kind = "" if rate in PUBLISHED_MS else "  not fitted"
        print(
            f"{rate:3} req/s  published {published:5.1f} ms  simulated {ours:5.1f} ms  "
            f"{ours / published - 1:+6.1%}{kind}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
