"""FlexLLM's two figures as cases to simulate: every system, model and rate, and what was published of them.

One pipeline is simulated where one was measured, and its figures are taken times 4, as the published ones
are. Predicted and published numbers never share a column: a case's row is simulated, `published` is read from
`flexllm/published.csv` of the data folder, and is empty where that is not there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MODELS = {"8B": "llama_3_1_8b", "14B": "qwen2_5_14b", "32B": "qwen2_5_32b"}
DEVICES = {"8B": 1, "14B": 2, "32B": 4}
"""Accelerators of one pipeline."""
RATES_RPS = (4, 8, 12, 16, 20)
"""Of the cluster."""
PIPELINES = 4
SERVING = {"separate-25vllm": 1, "separate-50vllm": 2, "separate-75vllm": 3}
"""System -> pipelines that serve; the others finetune."""
SHARING = {
    "temporal-64": "temporal",
    "temporal-128": "temporal_128",
    "temporal-512": "temporal_512",
    "temporal-dynamic": "temporal_dynamic",
    "spatial": "spatial_stream",
}
"""System -> policy."""
FAIR = (
    "coserving",
    "coserving_slack",
    "temporal_limited",
    "separate_25",
    "separate_50",
    "separate_75",
    "inference_only",
    "finetune_only",
)
FAIR_RATES_RPS = (4, 20)
FINETUNE_TOK_S = {"8B": 3810.46, "14B": 1048.954, "32B": 469.974}
"""LLaMA-Factory on one pipeline, as FlexLLM used it. The tool divides by its devices, so that a pipeline of 2
or 4 may have done 2 or 4 times as much; both readings are shown."""
PREDICTION_COLUMNS = (
    "figure", "system", "model", "cluster_rate_rps", "metric", "value", "unit", "how_obtained"
)  # fmt: skip
UNITS = {
    "finetune_tok_s": "tok/s",
    "slo_attainment": "%",
    "inference_tok_s": "tok/s",
    "tpot_mean": "ms",
    "tpot_p99": "ms",
}
SLICE_BIN_S = 5.0


class Key(NamedTuple):
    """One number of a figure."""

    figure: str
    system: str
    model: str
    rate_rps: int
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation; `scale` is what its rates are multiplied by to be the cluster's."""

    figure: str
    system: str
    model: str
    rate_rps: int
    seed: int
    overrides: tuple[str, ...]
    scale: int
    timeline: bool = False


def cases(seeds: Sequence[int]) -> list[Case]:
    """All simulations, the longest first so that the workers end together."""
    out = [case for seed in seeds for case in _published_cases(seed)]
    out += [
        _case("fair", policy, model, rate, seeds[0], f"policy={policy}", rate, 1)
        for policy in FAIR
        for model in MODELS
        for rate in FAIR_RATES_RPS
        if policy != "finetune_only" or rate == FAIR_RATES_RPS[0]
    ]
    study = _case("case_study", "flexllm", "14B", 8, seeds[0], "policy=coserving_static", 2, PIPELINES)
    out.append(replace(study, timeline=True))
    return sorted(out, key=lambda case: (case.figure != "fair", case.model != "8B"))


def _published_cases(seed: int) -> Iterable[Case]:
    for model in MODELS:
        for rate in RATES_RPS:
            policy = "policy=coserving_static"
            yield _case("end_to_end", "flexllm", model, rate, seed, policy, rate / PIPELINES, PIPELINES)
            for system, serving in SERVING.items():
                policy = "policy=inference_only"
                each = rate / serving
                yield _case("separate_serving", system, model, rate, seed, policy, each, serving)
            for system, name in SHARING.items():
                policy = f"policy={name}"
                yield _case("sharing", system, model, rate, seed, policy, rate / PIPELINES, PIPELINES)


def _case(
    experiment: str,
    system: str,
    model: str,
    rate_rps: int,
    seed: int,
    policy: str,
    simulated_rps: float,
    scale: int,
) -> Case:
    overrides = (
        f"experiment={experiment}",
        policy,
        f"model={MODELS[model]}",
        f"workload.rate_rps={simulated_rps:.9g}",
        f"seed={seed}",
    )
    return Case(
        figure=experiment,
        system=system,
        model=model,
        rate_rps=rate_rps,
        seed=seed,
        overrides=overrides,
        scale=scale,
    )


def prepare_worker() -> Callable[[Case], dict[str, Any]]:
    """For `sim.pool.run_calls`: what runs one case and does not raise."""
    from sim.errors import message

    def run(case: Case) -> dict[str, Any]:
        try:
            return run_case(case)
        except Exception as error:
            return {"error": message(error) or f"{type(error).__name__}: {error}"}

    return run


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one case; the cluster's numbers under the metrics' published names, and all the summary."""
    import hydra

    from sim.assemble import CONFIGS, assemble
    from sim.metrics import summarize
    from sim.simulate import run_assembly

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assembly = assemble(hydra.compose("config", list(case.overrides)))
    recorder = run_assembly(assembly)
    summary: dict[str, Any] = summarize(
        recorder,
        slos=assembly.slos,
        duration_s=assembly.horizon.duration_s,
        pipelines=assembly.facts,
        labels=assembly.labels,
    )
    trained = case.scale * summary["finetune_fwd_tok_s"]
    if case.system in SERVING:
        trained = (PIPELINES - SERVING[case.system]) * FINETUNE_TOK_S[case.model]
    row = {
        "finetune_tok_s": trained,
        "slo_attainment": 100 * summary["attainment_paper"],
        "inference_tok_s": case.scale * summary["inference_tok_s"],
        "tpot_mean": 1e3 * summary["tpot_paper_mean_s"],
        "tpot_p99": 1e3 * summary["tpot_paper_p99_s"],
        "ttft_p99_s": summary["ttft_p99_s"],
        "attainment": 100 * summary["attainment"],
        "iteration_mean_s": summary["iteration_mean_s"],
    }
    if case.timeline:
        row["timeline"] = timeline(recorder.iterations.arrays(), recorder.requests.arrays(), case.scale)
    return row


def timeline(
    iterations: Mapping[str, NDArray[np.float64]], requests: Mapping[str, NDArray[np.float64]], scale: int
) -> dict[str, list[float]]:
    """Arrivals, generated tokens and finetuning tokens per second of the cluster, in bins of 5 s."""
    edges = np.arange(0.0, 600.0 + SLICE_BIN_S, SLICE_BIN_S)

    def per_s(times_s: NDArray[np.float64], weights: NDArray[np.float64] | None) -> list[float]:
        counts, _ = np.histogram(times_s, edges, weights=weights)
        return [float(count) * scale / SLICE_BIN_S for count in counts]

    return {
        "time_s": [float(edge) for edge in edges[:-1]],
        "arrivals_rps": per_s(requests["arrival_s"], None),
        "inference_tok_s": per_s(iterations["end_s"], iterations["sampled_tokens"]),
        "finetune_fwd_tok_s": per_s(iterations["end_s"], iterations["forward_tokens"]),
    }


def predictions(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """Means over the seeds of what both figures show; the sharing figure has FlexLLM too."""
    values: dict[Key, list[float]] = {}
    for case, row in zip(cases, rows, strict=True):
        figures = {"end_to_end": ("end-to-end", "sharing"), "separate_serving": ("end-to-end",)}
        figures["sharing"] = ("sharing",)
        for figure in figures.get(case.figure, ()):
            for metric in UNITS:
                key = Key(figure, case.system, case.model, case.rate_rps, metric)
                values.setdefault(key, []).append(float(row[metric]))
    return {key: sum(several) / len(several) for key, several in sorted(values.items())}


def spreads(
    cases: Sequence[Case], rows: Sequence[Mapping[str, Any]], metric: str
) -> dict[tuple[str, str, int], float]:
    """Largest minus smallest over the seeds, by system, model and rate."""
    values: dict[tuple[str, str, int], list[float]] = {}
    for case, row in zip(cases, rows, strict=True):
        if case.figure in ("end_to_end", "separate_serving", "sharing"):
            values.setdefault((case.system, case.model, case.rate_rps), []).append(float(row[metric]))
    return {place: max(several) - min(several) for place, several in values.items()}


def read_published(path: Path) -> dict[Key, float]:
    """The published numbers; empty without the file. ValueError for a row that cannot be read."""
    if not path.is_file():
        return {}
    out = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                rate_rps, value = int(row["cluster_rate_rps"]), float(row["value"])
                key = Key(row["figure"], row["system"], row["model"], rate_rps, row["metric"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: row {number}: expected the columns {', '.join(PREDICTION_COLUMNS)}, {error}"
                ) from None
            out[key] = value
    return out


def error(key: Key, predicted: float, published: float) -> float:
    """Relative, in percent; of attainment the difference in points."""
    if key.metric == "slo_attainment":
        return predicted - published
    return 100 * (predicted / published - 1) if published else math.nan
