"""LoRA adapters: PEFT's folders, and the bank that holds those in use on the device.

An adapter is A [r, in] and B [out, r] for each of its linear layers; y += scale * (x A^T) B^T. The bank
keeps all adapters in use in buffers of one padded rank, so that a batch may mix them; those that are placed
otherwise on the ranks have buffers of their own (`engine.shelf`). A slot of it is one *version* of an adapter:
training publishes into a new one while requests still run on the old.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from engine.dropout import Dropped
from engine.files import whole_file
from engine.parallel import Group
from engine.placement import Placement
from engine.shelf import Segments, Shelf
from sim.checked import check
from sim.core.specs import LINEARS, LoraSpec, ModelShape
from sim.errors import keys_as
from sim.json_file import read_object

LARGEST_SCALE = 1e30
"""Of a bypass: single precision holds no more than 3e38."""
NUMBERS = ("bfloat16", "float16", "float32", "float64")
"""Kinds of numbers that an adapter may be of."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "velora_config",
)
"""Keys of PEFT's LoraConfig that make an adapter other than plain LoRA where they are set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One LoRA adapter: a[target] is [layers, r, in], b[target] [layers, out, r]."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    """Share of the numbers that a bypass does not see in training."""
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        if not self.a or self.a.keys() != self.b.keys():
            raise ValueError(f"an adapter needs A and B of the same layers, got {[*self.a]} and {[*self.b]}")
        if not abs(self.scale) <= LARGEST_SCALE:
            raise ValueError(f"lora_alpha must give a scale of at most {LARGEST_SCALE:g}, got {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.dropout}")

    @property
    def targets(self) -> tuple[str, ...]:
        """In the order of a block, however they were named: the optimizer counts tensors, and a folder has no order."""
        return tuple(target for target in LINEARS if target in self.a)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All A and B, in the order of `targets`."""
        for target in self.targets:
            yield self.a[target]
            yield self.b[target]


def new_adapter(
    spec: LoraSpec, shape: ModelShape, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Adapter:
    """An adapter that changes nothing yet: A as PEFT draws it (uniform, Kaiming with a = sqrt 5), B zero."""
    generator = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for target in spec.targets:
        wide_in, wide_out = shape.linears[target]
        bound = 1.0 / math.sqrt(wide_in)
        drawn = torch.rand((shape.layers, spec.rank, wide_in), generator=generator) * 2 * bound - bound
        a[target] = drawn.to(device, dtype)
        b[target] = torch.zeros((shape.layers, wide_out, spec.rank), dtype=dtype, device=device)
    return Adapter(rank=spec.rank, alpha=spec.alpha, a=a, b=b)


def read_adapter(folder: str | Path, shape: ModelShape) -> Adapter:
    """A PEFT folder as float32 on the CPU (float64 stays). ValueError names what is not supported."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_object(path, "not a PEFT adapter")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} is not supported, got {config[key]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be none, got {config['bias']!r}")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{path}: {key} is missing")
    rank: int = check(config["r"], int, f"{path}: r")
    alpha: float = check(config["lora_alpha"], float, f"{path}: lora_alpha")
    rslora: bool = check(config.get("use_rslora", False), bool, f"{path}: use_rslora")
    dropout: float = check(config.get("lora_dropout", 0.0), float, f"{path}: lora_dropout")
    if rank < 1:
        raise ValueError(f"{path}: r must be at least 1, got {rank}")
    if not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha must be a finite number, got {alpha}")
    tensor_path = folder / "adapter_model.safetensors"
    with whole_file(tensor_path):
        tensors = load_file(tensor_path)
    _check_names(tensors, config.get("target_modules"), path, tensor_path)
    a, b = {}, {}
    for target, (wide_in, wide_out) in shape.linears.items():
        if not any(f".{target}.lora_A" in name for name in tensors):
            continue
        a[target] = _stack(tensors, shape.layers, target, "A", (rank, wide_in), folder)
        b[target] = _stack(tensors, shape.layers, target, "B", (wide_out, rank), folder)
    if tensors:
        raise ValueError(f"{folder}: tensor {min(tensors)} belongs to no linear layer of {shape.name}")
    if not a:
        raise ValueError(f"{tensor_path} holds no tensors")
    with keys_as({f"{key} ": f"{path}: {key} " for key in ("lora_alpha", "lora_dropout")}):
        return Adapter(rank=rank, alpha=alpha, rslora=rslora, dropout=dropout, a=a, b=b)


def write_adapter(adapter: Adapter, folder: str | Path, base_model: str | None = None) -> None:
    """Write a folder that `peft` loads unchanged."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in peft_tensors(adapter)}
    _write(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.targets),
        "bias": "none",
        "use_rslora": adapter.rslora,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2)
    _write(folder / "adapter_config.json", f"{text}\n".encode())


def peft_tensors(adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    """Every layer's A and B under PEFT's name."""
    for target in adapter.targets:
        for kind, stacked in (("A", adapter.a[target]), ("B", adapter.b[target])):
            for layer, tensor in enumerate(stacked):
                yield _name(layer, target, kind), tensor


class LoraRun(NamedTuple):
    """Rows of a batch whose adapters have one placement."""

    shelf: Shelf
    rows: slice | None
    """None: all."""
    segments: Segments
    """Of these rows."""
    windows: Sequence[slice] = ()
    """Rows of the batch that are windows of its adapters; known where runs are chosen by the rows."""


class LoraBatch(NamedTuple):
    """Which adapter each token of a batch takes, by linear layer."""

    runs: Mapping[str, Sequence[LoraRun]]
    scales: torch.Tensor  # [N]
    dropped: Sequence[Dropped] = ()

    def input_of(self, target: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What the bypasses of linear layer `target` read: x [T, in], or a copy in which numbers are dropped."""
        own = [dropped for dropped in self.dropped if target in dropped.dropout.targets]
        if own:
            x = x.clone()
        for dropout, rows, position in own:
            x[rows] = dropout(x[rows], target, layer, position)
        return x


class AdapterBank:
    """Adapters on the device in slots; requests and jobs hold a slot as long as they need it.

    It doubles when it is full. What is held is bounded (the loaded adapters, one slot for each job and at
    most one old version for each running request), so it stops growing.
    """

    def __init__(
        self,
        placements: Iterable[Placement],
        group: Group,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
    ) -> None:
        """Room for adapters with any of `placements`, and with smaller ranks where these have the same key."""
        widest: dict[str, dict[object, Placement]] = {}
        for placement in placements:
            own = widest.setdefault(placement.target, {})
            before = own.get(placement.key, placement)
            own[placement.key] = max(before, placement, key=lambda p: p.lora_rank)
        self.shelves = {
            target: [Shelf(p, group, layers, slots, dtype, device) for p in own.values()]
            for target, own in widest.items()
        }
        """By linear layer."""
        everything = [shelf for shelves in self.shelves.values() for shelf in shelves]
        self._chooses = len(everything) > len(self.shelves) or any(s.placement.sends for s in everything)
        """Whether the rows of a batch decide what runs."""
        self._users = [0] * slots
        self.moved = 0
        """How often the buffers have been replaced: who knows their addresses must look again."""
        self.scales = torch.zeros(slots, dtype=torch.float32, device=device)

    def put(self, adapter: Adapter, placements: Mapping[str, Placement]) -> int:
        """Copy this rank's part of an adapter into a free slot, held once, and return the slot."""
        unknown = [t for t in adapter.targets if t not in self.shelves]
        if unknown:
            raise ValueError(f"the bank holds {', '.join(self.shelves)}, got an adapter of {unknown[0]}")
        shelves = {target: self.shelf(placements[target]) for target in adapter.targets}
        if 0 not in self._users:
            self._double()
        slot = self._users.index(0)
        self._users[slot] = 1
        for target, every in self.shelves.items():
            for shelf in every:
                if shelf is shelves.get(target):
                    shelf.put(slot, adapter.a[target], adapter.b[target])
                else:
                    shelf.clear(slot)
        # Not by assignment: the number would be a tensor of the host, and the copy waited for.
        self.scales[slot].fill_(adapter.scale)
        return slot

    def shelf(self, placement: Placement) -> Shelf:
        """Where adapters with this placement are. ValueError for a rank that there is no room for."""
        shelf = next((s for s in self.shelves[placement.target] if s.placement.key == placement.key), None)
        assert shelf is not None, f"the bank was made without {placement.target} placed as {placement.key}"
        if placement.lora_rank > shelf.placement.lora_rank:
            raise ValueError(
                f"the bank holds ranks up to {shelf.placement.lora_rank}, got {placement.lora_rank}"
            )
        return shelf

    def batch(
        self,
        segments: Segments,
        starts: NDArray[np.int32] | None = None,
        slots: NDArray[np.int32] | None = None,
        windows: Sequence[slice] = (),
    ) -> LoraBatch:
        """What runs for a batch. `starts` and `slots` are `segments` on the host, without which everything runs;
        `windows` are the rows of finetuning windows."""
        if not self._chooses or starts is None or slots is None:
            runs = {t: [LoraRun(s, None, segments) for s in shelves] for t, shelves in self.shelves.items()}
            return LoraBatch(runs, self.scales)
        chosen: dict[str, list[LoraRun]] = {}
        trained = slots[np.searchsorted(starts, [rows.start for rows in windows], side="right") - 1].tolist()
        for target, shelves in self.shelves.items():
            for shelf in shelves:
                used = [n for n, slot in enumerate(slots.tolist()) if slot in shelf.slots]
                if not used:
                    continue
                first, end = used[0], used[-1] + 1
                rows = slice(int(starts[first]), int(starts[end]))
                own = Segments(segments.start[first : end + 1] - rows.start, segments.slot[first:end])
                kept = [window for window, slot in zip(windows, trained, strict=True) if slot in shelf.slots]
                chosen.setdefault(target, []).append(LoraRun(shelf, rows, own, kept))
        return LoraBatch(chosen, self.scales)

    def hold(self, slot: int) -> int:
        """Another user of the slot; returns it."""
        assert self._users[slot] > 0
        self._users[slot] += 1
        return slot

    def drop(self, slot: int) -> None:
        """A user of the slot is gone; without users it is free."""
        assert self._users[slot] > 0
        self._users[slot] -= 1

    @property
    def slots(self) -> int:
        return len(self._users)

    def _double(self) -> None:
        self.moved += 1
        self._users += [0] * len(self._users)
        for shelves in self.shelves.values():
            for shelf in shelves:
                shelf.double()
        self.scales = torch.cat((self.scales, torch.zeros_like(self.scales)))


def _write(path: Path, data: bytes) -> None:
    """Put a file in place at once: a kill leaves the old one or the new. A full disk is an OSError, which
    safetensors' own writing does not give."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _check_names(tensors: Iterable[str], modules: object, path: Path, tensor_path: Path) -> None:
    """Raise ValueError for an A without its B, or a B without its A, and for a tensor of a layer that the
    configuration's `target_modules` leave out: PEFT would not load it."""
    meant = _meant(modules, f"{path}: target_modules")
    names = {*tensors}
    for name in sorted(names):
        module, kind, rest = name.partition(".lora_A." if ".lora_A." in name else ".lora_B.")
        other = module + {"": "", ".lora_A.": ".lora_B.", ".lora_B.": ".lora_A."}[kind] + rest
        if other not in names:
            raise ValueError(f"{tensor_path}: tensor {other} is missing")
        if kind and not meant(module.removeprefix("base_model.model.")):
            raise ValueError(f"{path}: target_modules must name the layer of {name}, got {modules!r}")


def _meant(modules: object, where: str) -> Callable[[str], bool]:
    """Whether a layer of this name is one that a configuration means, as PEFT finds them."""
    targets: str | list[str] = check(modules, str | list[str], where)
    if targets == "all-linear":
        return lambda name: True
    if isinstance(targets, list):
        return lambda name: any(f".{name}".endswith(f".{target}") for target in targets)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"{where} must be a regular expression, got {targets!r}: {error}") from None
    return lambda name: pattern.fullmatch(name) is not None


def _name(layer: int, target: str, kind: str) -> str:
    part = "self_attn" if target in ATTENTION else "mlp"
    return f"base_model.model.model.layers.{layer}.{part}.{target}.lora_{kind}.weight"


def _stack(
    tensors: dict[str, torch.Tensor],
    layers: int,
    target: str,
    kind: str,
    shape: tuple[int, int],
    folder: Path,
) -> torch.Tensor:
    """One target's tensors of all layers, taken out of `tensors`; absent layers are zero."""
    found = []
    for layer in range(layers):
        tensor = tensors.pop(_name(layer, target, kind), None)
        if tensor is None:
            tensor = torch.zeros(shape)
        if tensor.shape != shape:
            raise ValueError(
                f"{folder}: {_name(layer, target, kind)} must have shape {list(shape)}, "
                f"got {list(tensor.shape)}"
            )
        numbers = str(tensor.dtype).removeprefix("torch.")
        if numbers not in NUMBERS:
            raise ValueError(
                f"{folder}: {_name(layer, target, kind)} must be of {', '.join(NUMBERS)}, got {numbers}"
            )
        found.append(tensor if tensor.dtype == torch.float64 else tensor.float())
    return torch.stack(found)
