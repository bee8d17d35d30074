"""`coserve compile`: what a finetuning sample keeps in memory, and what it would cost to keep less.

coserve compile model=llama_3_1_8b peft=lora_all finetune.seq_len=8192 tp=1
coserve compile peft=ia3 finetune.flops_budget=0.05   keep less, for at most 5 % extra FLOPs
coserve compile adapter_config=FOLDER                 the method of a PEFT adapter
coserve compile --all           every model with LoRA, Adapter and (IA)^3
coserve compile --placements    the bypass under tensor parallelism, by rank and degree
coserve compile --published     FlexLLM's published counts, term by term
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sim.assemble import CONFIGS
from sim.checked import build, check
from sim.compile.peft import PeftSpec
from sim.compile.peft_file import read_peft
from sim.compile.placements import placement_table, print_placements
from sim.compile.program import (
    CompileReport,
    memory_table,
    print_memory_table,
    print_report,
    run_compile,
    write_report,
)
from sim.compile.published import COLUMNS, published_units, terms
from sim.core.specs import DeviceSpec, ModelShape
from sim.errors import FailedInPart, message
from sim.hydra_app import hydra_main
from sim.results import shown_path
from sim.unread import override_keys
from sim.ways_out import ways_to_fit

SHOWS = ("plan", "all", "placements", "published")
TAKEN = {
    "all": (
        "device", "finetune.seq_len", "finetune.flops_budget", "finetune.window_tokens", "memory_utilization",
    ),
    "placements": (
        "model", "device", "finetune.seq_len", "finetune.window_tokens", "finetune.accumulation",
    ),
    "published": (),
}  # fmt: skip
"""What is shown -> the keys and groups that change it, where these are not all."""
METHODS = ("lora_all", "adapter", "ia3")
"""PEFT configs of the table over all models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """The `finetune` node of configs/compile.yaml."""

    seq_len: int
    mode: str
    flops_budget: float | None
    window_tokens: int
    accumulation: int

    def __post_init__(self) -> None:
        for key in ("seq_len", "window_tokens", "accumulation"):
            if getattr(self, key) < 1:
                raise ValueError(f"finetune.{key} must be at least 1, got {getattr(self, key)}")


def main(argv: Sequence[str]) -> int:
    """`coserve compile`."""
    flags = {f"--{show}": f"show={show}" for show in SHOWS[1:]}
    return hydra_main(
        compile_plan,
        [flags.get(arg, arg) for arg in argv],
        prog="coserve compile",
        config_name="compile",
    )


def compile_plan(config: DictConfig) -> dict[str, Any]:
    """Compile one model and method, print the memory table and write the plan, or show what was asked.

    Raises FailedInPart for a plan that does not fit, when it has been shown and written.
    """
    if config.show not in SHOWS:
        raise ValueError(f"show must be one of {', '.join(SHOWS)}, got {config.show!r}")
    device = build(DeviceSpec, config.device, "device")
    settings = build(FinetuneSettings, config.finetune, "finetune")
    model = build(ModelShape, config.model, "model")
    _spec(config)
    _check_taken(config.show)
    if config.show == "published":
        _print_published()
        return {}
    if config.show == "all":
        models, broken = models_in(CONFIGS / "model")
        specs = {name: _method(name) for name in METHODS}
        rows = memory_table(
            sorted(models, key=lambda model: model.params),
            specs,
            seq_tokens=settings.seq_len,
            device=device,
            budget_share=settings.flops_budget,
            window_tokens=settings.window_tokens,
            memory_fraction=check(config.memory_utilization, float, "memory_utilization"),
        )
        print_memory_table(rows)
        told = {"rows": [asdict(row) for row in rows]}
        if broken:
            raise FailedInPart("; ".join(broken), told)
        return told
    if config.show == "placements":
        placements = placement_table(
            model,
            device=device,
            tokens=min(settings.window_tokens, settings.seq_len),
            accumulation_tokens=settings.accumulation * settings.seq_len,
        )
        print_placements(placements)
        return {}
    report = _compiled(config)
    ways = "" if report.kv_room_tokens is not None else ways_to_fit(config, _check_fits, CONFIGS / "model")
    if settings.seq_len > model.max_context_tokens:
        print(
            f"note: finetune.seq_len {settings.seq_len} is longer than the context of {model.name}, "
            f"{model.max_context_tokens} tokens",
            file=sys.stderr,
        )
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_report(report, folder)
    print_report(report, ways=ways)
    print(f"plan and figure: {shown_path(folder)}")
    planned = {"plan": report.plan.model, "total_bytes": report.plan.total_bytes()}
    if report.kv_room_tokens is None:
        raise FailedInPart(
            f"the plan does not fit: it needs {report.short_bytes / 2**30:.2f} GiB more per device", planned
        )
    return planned


def _compiled(config: DictConfig) -> CompileReport:
    settings = build(FinetuneSettings, config.finetune, "finetune")
    model = build(ModelShape, config.model, "model")
    given_tp = check(config.tp, int | None, "tp")
    tp = model.tp if given_tp is None else given_tp
    model.check_tp(tp)
    return run_compile(
        model,
        _spec(config),
        seq_tokens=settings.seq_len,
        device=build(DeviceSpec, config.device, "device"),
        tp=tp,
        mode=settings.mode,
        budget_share=settings.flops_budget,
        window_tokens=settings.window_tokens,
        accumulation=settings.accumulation,
        memory_fraction=check(config.memory_utilization, float, "memory_utilization"),
    )


def _check_fits(config: DictConfig) -> None:
    """ValueError where no token of K/V fits beside the sample in flight."""
    if _compiled(config).kv_room_tokens is None:
        raise ValueError("does not fit")


def _spec(config: DictConfig) -> PeftSpec:
    file: str | None = check(config.adapter_config, str | None, "adapter_config")
    spec = build(None, config.peft, "peft") if file is None else read_peft(file)
    assert isinstance(spec, PeftSpec)
    return spec


def _check_taken(show: str) -> None:
    """Refuse settings that change nothing of what is shown."""
    keys = override_keys()
    if keys.count("show") > 1:
        raise ValueError(f"one of {', '.join(f'--{name}' for name in TAKEN)} can be shown, got several")
    if show not in TAKEN:
        return
    taken = TAKEN[show]
    # Both tables have their own degrees: a model's own, or several side by side.
    idle = [
        key
        for key in dict.fromkeys(keys)
        if key not in ("show", *taken)
        and (key == "model.tp" or not key.startswith(tuple(f"{t}." for t in taken)))
    ]
    if idle:
        raise ValueError(
            f"--{show} does not depend on {', '.join(idle)}; it takes {', '.join(taken) or 'no key'}"
        )


def models_in(folder: Path) -> tuple[list[ModelShape], list[str]]:
    """The models that `folder` describes, and a line for each file that describes none."""
    models, broken = [], []
    for path in sorted(folder.glob("*.yaml")):
        try:
            model = build(ModelShape, OmegaConf.load(path), "model")
            model.check_tp(model.tp)
        except Exception as error:
            if (line := message(error)) is None:
                raise
            broken.append(f"{path.name}: {line}")
        else:
            models.append(model)
    return models, broken


def _method(name: str) -> PeftSpec:
    spec = build(None, OmegaConf.load(CONFIGS / "peft" / f"{name}.yaml"), f"peft {name}")
    assert isinstance(spec, PeftSpec)
    return spec


def _print_published() -> None:
    print("FlexLLM's published LoRA activation memory at the 70B shape, in h per token and layer:")
    for column in COLUMNS:
        named = ", ".join(f"{name} {float(units):g}" for name, units in terms(column).items())
        print(f"{column:>12}  {float(published_units(column)):g}h = {named}")
