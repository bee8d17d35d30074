"""`coserve reference`: the engine beside what this machine can do at best, and beside PEFT, in one process.

    coserve reference model=llama_3_1_8b device=h200 seconds=300 out=runs/reference
    coserve reference model=tiny device=cpu

One row per measurement in `reference.parquet`. `ratio` says how far it is from what it is compared with
(column `against`): a decode against the time in which its bytes can be copied, a prefill or window against the
rate of a large product, a fused iteration against the window alone, finetuning against PEFT. What does not
fit is a result: its row has the words and no numbers. What breaks off is told at the end, and the others go on.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from engine.machine import model_of, release, shape_of, take_model_of_folder
from engine.model import Model
from engine.reference_iterations import (
    Memory,
    decode_floor_s,
    decode_times,
    finetune_times,
    forward_flops,
    prefill_times,
    stream_times,
    window_times,
)
from engine.reference_peft import SETUPS, LigerMissing, Setup, peft_times
from engine.reference_rows import HEAD, Row, compared, line, timed_row, write_rows
from engine.reference_timing import Ceilings, PeakMemory, Times, allocated_bytes, ceilings
from engine.sweep_folders import shared_folder
from engine.text import random_samples
from sim.checked import build
from sim.core.specs import LINEARS, DeviceSpec, LoraSpec
from sim.errors import USER_ERROR, FailedInPart, OutOfReach, keys_as, writing
from sim.hydra_app import hydra_main
from sim.results import make_manifest, shown_path

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("ceilings", "decode", "prefill", "window", "fused", "streams", "finetune", "peft", "memory")
GROUPS = ("model", "device", "sizes")
"""Keys that are files of settings."""
OUT_OF_MEMORY = "out of memory"
LORAS: dict[str, tuple[str, ...]] = {"all-linear": LINEARS, "down_proj": ("down_proj",)}
LEAST = {"sample_tokens": 2, "long_sample_tokens": 2, "copy_bytes": 4}
"""Of sizes of which one will not do: a token follows from another, and what is copied is float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The `sizes` group."""

    copy_bytes: int
    product: int
    decode_sequences: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    window_tokens: int
    fused_sequences: int
    fused_context: int
    sample_tokens: int
    recompute_tokens: int
    long_sample_tokens: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = LEAST.get(field.name, 1)
            each = value if isinstance(value, tuple) else (value,)
            if not each or min(each) < least:
                raise ValueError(f"sizes.{field.name} must be at least {least}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The other keys of `reference.yaml`."""

    weights: str | None
    seconds: float
    out: str
    parts: tuple[str, ...]
    rank: int
    alpha: float
    learning_rate: float

    def __post_init__(self) -> None:
        for key in ("seconds", "rank", "alpha", "learning_rate"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be above 0 and finite, got {getattr(self, key)}")
        if not self.out.strip():
            raise ValueError("out must be a folder, got nothing")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {list(self.parts)}")


def main(argv: Sequence[str]) -> int:
    """`coserve reference`."""
    if {"-m", "--multirun"} & set(argv):
        default = OmegaConf.select(OmegaConf.load(CONFIGS / "reference.yaml"), "out")
        if (line := shared_folder(argv, "out", default, GROUPS)) is not None:
            print(f"coserve reference: error: {line}", file=sys.stderr)
            return USER_ERROR
    return hydra_main(
        reference, argv, prog="coserve reference", config_name="reference", config_dir=CONFIGS, at_end=_show
    )


def reference(config: DictConfig) -> dict[str, Any]:
    """Measure the engine against this machine's limits and against PEFT, and write reference.parquet."""
    started_s = time.perf_counter()
    take_model_of_folder(config)
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    shape = shape_of(node.pop("model"), node["weights"])
    if shape.tp > 1:
        raise ValueError(f"coserve reference measures one device: model.tp must be 1, got {shape.tp}")
    device = build(DeviceSpec, node.pop("device"), "device")
    sizes = build(Sizes, node.pop("sizes"), "sizes")
    with keys_as({"reference.": ""}):
        settings = build(Settings, node, "reference")
    model = model_of(shape, device, settings.weights)
    folder = Path(settings.out)
    with writing("out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    measurement = _Measurement(model, sizes, settings)
    with tqdm(unit="row", leave=False, disable=None) as bar, warnings.catch_warnings():
        # What transformers will change one day is nothing that a reader of this table can act on.
        warnings.simplefilter("ignore", FutureWarning)
        for found in measurement.rows():
            rows = compared([*rows, found])
            bar.set_postfix_str(f"{found.what} {found.variant}", refresh=False)
            bar.update()
            write_rows(rows, folder / "reference.parquet")
    manifest = make_manifest(seed=0, device=device.name, wall_s=time.perf_counter() - started_s)
    manifest |= {
        "model": shape.name,
        "gpu": torch.cuda.get_device_name() if model.device.type == "cuda" else None,
        "seconds": settings.seconds,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    result = {"rows": rows, "folder": str(folder), "device": device.name, "model": shape.name}
    if measurement.failures:
        raise FailedInPart("; ".join(measurement.failures), result)
    return result


class _Measurement:
    """All measurements of one model on one device."""

    def __init__(self, model: Model, sizes: Sizes, settings: Settings) -> None:
        self._model = model
        self._shape = model.config.shape
        self._sizes = sizes
        self._settings = settings
        self.failures: list[str] = []
        """Measurements that broke off, which have no row; the others do not rest on them."""
        self._rate = self._copy_bytes_s = math.nan
        release()
        self._beside_bytes = allocated_bytes(model.device)
        """What is there anyway: the weights."""
        self._share_s = settings.seconds / max(1, sum(1 for _ in self._all()))

    def rows(self) -> Iterator[Row]:
        """Measure everything, in order."""
        for n, measure in enumerate(self._all()):
            try:
                found = measure()
            except Exception as error:
                if n == 0:
                    raise
                traceback.print_exc()
                self.failures.append(f"{_named(measure)}: {type(error).__name__}: {error}".partition("\n")[0])
                traceback.clear_frames(error.__traceback__)
                continue
            finally:
                release()
            yield from found

    def _all(self) -> Iterator[Callable[[], list[Row]]]:
        """One call per measurement. The ceilings always come first: others divide by them."""
        sizes, parts = self._sizes, self._settings.parts
        yield self._ceilings
        if "decode" in parts:
            for context in sizes.decode_contexts:
                for sequences in sizes.decode_sequences:
                    yield partial(self._decode, sequences, context)
        if "prefill" in parts:
            for tokens in sizes.prefill_tokens:
                yield partial(self._prefill, tokens)
        if "window" in parts or "fused" in parts:
            for name in LORAS:
                yield partial(self._window, name)
        if "streams" in parts:
            yield partial(self._streams, "all-linear")
        tokens, long = sizes.sample_tokens, sizes.long_sample_tokens
        if "finetune" in parts:
            for name in LORAS:
                yield partial(self._finetune, "finetune", name, tokens, "layer_major", "stash")
                yield partial(self._finetune, "finetune", name, tokens, "window_major", "recompute")
        if "memory" in parts:
            for name in LORAS:
                yield partial(self._finetune, "memory", name, long, "layer_major", "stash")
                yield partial(self._finetune, "memory", name, long, "window_major", "recompute")
        # Liger changes functions of transformers for good, so what runs without it comes before.
        for setup in SETUPS:
            for name in LORAS:
                if "memory" in parts and setup == SETUPS[0]:
                    yield partial(self._peft, "memory", name, long, setup)
                if "peft" in parts:
                    yield partial(self._peft, "finetune", name, tokens, setup)

    def _ceilings(self) -> list[Row]:
        model, sizes = self._model, self._sizes
        found: Ceilings = ceilings(model.device, model.dtype, sizes.copy_bytes, sizes.product, self._share_s)
        self._rate, self._copy_bytes_s = found.product_flops, found.copy_bytes_s
        return [
            timed_row("ceiling", "copy, read and written", found.copy, rate=found.copy_bytes_s),
            timed_row("ceiling", f"product of {sizes.product}", found.product, rate=found.product_flops),
        ]

    def _decode(self, sequences: int, context: int) -> list[Row]:
        variant = f"{sequences} x {context}"
        known: dict[str, Any] = {"sequences": sequences, "context_tokens": context, "tokens": sequences}
        floor_s = decode_floor_s(self._shape, sequences, context, self._copy_bytes_s)

        def measure() -> list[Row]:
            times = decode_times(self._model, sequences, context, self._share_s)
            ratio = times.p50_s / floor_s
            return [
                timed_row("decode", variant, times, ratio=ratio, against="time to copy its bytes", **known)
            ]

        return _or_out_of_memory(measure, Row(what="decode", variant=variant, **known))

    def _prefill(self, tokens: int) -> list[Row]:
        flops = forward_flops(self._shape, tokens, logits=1)

        def measure() -> list[Row]:
            times = prefill_times(self._model, tokens, self._share_s)
            return [self._of_rate("prefill", str(tokens), tokens, flops, times)]

        return _or_out_of_memory(measure, Row(what="prefill", variant=str(tokens), tokens=tokens))

    def _window(self, name: str) -> list[Row]:
        """The window, with the head forward and back for its loss, and the fused iteration."""
        sizes, lora = self._sizes, self._lora(name)
        tokens, parts = sizes.window_tokens, self._settings.parts
        sequences, context = sizes.fused_sequences, sizes.fused_context
        flops = forward_flops(self._shape, tokens, logits=2 * tokens, lora=lora)
        beside = sequences if "fused" in parts else 0

        def measure() -> list[Row]:
            times = window_times(self._model, lora, tokens, beside, context, self._share_s)
            rows = [self._of_rate("window", name, tokens, flops, times["window"])]
            if "fused" in times:
                row = timed_row(
                    "fused",
                    name,
                    times["fused"],
                    sequences=sequences,
                    context_tokens=context,
                    tokens=tokens,
                    ratio=times["fused"].p50_s / times["window"].p50_s,
                    against="the window alone",
                )
                rows.append(row)
            return rows

        empty = (Row(what=what, variant=name, tokens=tokens) for what in ("window", "fused"))
        return _or_out_of_memory(measure, *empty)

    def _streams(self, name: str) -> list[Row]:
        """Most decodes beside a quarter of a sample's backward, on a stream each, against one after the other."""
        sizes, lora = self._sizes, self._lora(name)
        sequences, context = sizes.decode_sequences[-1], sizes.decode_contexts[0]
        known: dict[str, Any] = {"sequences": sequences, "context_tokens": context}
        variants = {"after": f"{name}: backward after decodes", "beside": f"{name}: backward beside decodes"}

        def measure() -> list[Row]:
            times = stream_times(self._model, lora, sizes.sample_tokens, sequences, context, self._share_s)
            if not times:
                note = f"one stream on {self._model.device.type}"
                return [Row(what="streams", variant=variants["beside"], note=note, **known)]
            ratio = times["beside"].p50_s / times["after"].p50_s
            return [
                timed_row("streams", variants["after"], times["after"], **known),
                timed_row(
                    "streams", variants["beside"], times["beside"], ratio=ratio, against="after", **known
                ),
            ]

        return _or_out_of_memory(measure, Row(what="streams", variant=variants["beside"], **known))

    def _finetune(self, what: str, name: str, tokens: int, order: str, memory: str) -> list[Row]:
        how = Memory(order, memory, self._sizes.recompute_tokens if memory == "recompute" else None)
        seconds = 0.0 if what == "memory" else self._share_s
        variant = f"{name}: engine + {memory}"

        def measure() -> list[Row]:
            release()
            peak = PeakMemory(self._model.device, self._beside_bytes)
            times = finetune_times(self._model, self._lora(name), tokens, how, seconds)
            return [timed_row(what, variant, times, tokens=tokens, peak_bytes=peak.bytes())]

        return _or_out_of_memory(measure, Row(what=what, variant=variant, tokens=tokens))

    def _peft(self, what: str, name: str, tokens: int, setup: Setup) -> list[Row]:
        variant = f"{name}: {setup.name}"
        samples = random_samples(8, tokens, self._shape.vocab)
        rate = self._settings.learning_rate
        seconds = 0.0 if what == "memory" else self._share_s

        def measure() -> list[Row]:
            release()
            peak = PeakMemory(self._model.device, self._beside_bytes)
            times = peft_times(self._model, self._lora(name), samples, setup, rate, seconds)
            return [timed_row(what, variant, times, tokens=tokens, peak_bytes=peak.bytes())]

        empty = Row(what=what, variant=variant, tokens=tokens)
        try:
            return _or_out_of_memory(measure, empty)
        except LigerMissing as missing:
            return [replace(empty, note=f"Liger {missing}")]
        except Exception as error:
            if not setup.liger:
                raise
            # Liger replaces functions of transformers, whose versions it does not all know: that is a result.
            release()
            return [replace(empty, note=f"Liger failed: {type(error).__name__}: {error}".partition("\n")[0])]

    def _of_rate(self, what: str, variant: str, tokens: int, flops: float, times: Times) -> Row:
        rate = flops / times.p50_s
        ratio = rate / self._rate
        return timed_row(
            what, variant, times, tokens=tokens, rate=rate, ratio=ratio, against="rate of a large product"
        )

    def _lora(self, name: str) -> LoraSpec:
        return LoraSpec(rank=self._settings.rank, alpha=self._settings.alpha, targets=LORAS[name])


def _or_out_of_memory(measure: Callable[[], list[Row]], *empty: Row) -> list[Row]:
    """What was measured, or `empty` with the words; what the error held is free once this has returned."""
    try:
        return measure()
    except (torch.OutOfMemoryError, OutOfReach):
        return [replace(row, note=OUT_OF_MEMORY) for row in empty]


def _named(measure: Callable[[], list[Row]]) -> str:
    """A measurement as a person would call it: window all-linear."""
    assert isinstance(measure, partial)
    given = (part.name if isinstance(part, Setup) else str(part) for part in measure.args)
    return " ".join((measure.func.__name__.removeprefix("_"), *given))


def _show(results: Sequence[Mapping[str, Any]], _: Path) -> None:
    """The table, with the target beside each ratio that has one on this device."""
    from analysis.targets import reference_target

    for result in results:
        print(HEAD)
        for row in result["rows"]:
            target = reference_target(asdict(row), result["device"], result["model"])
            print(line(row) + ("" if target is None else f"  (target: {target})"))
        print(f"rows:   {shown_path(result['folder'])}")
