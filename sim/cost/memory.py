"""What fits on a device: weights, finetuning state and activations first, KV cache in what is left.

Bytes per device of a replica on tp devices; h, kv are the model's widths, b bytes per value,
kv' = max(1, kv_heads / tp) * head_dim the key-value width held by one device:

    KV cache     2 layers kv' b                                   per token
    weights      params b / tp + layers h (2 kv' - 2 kv / tp) b   (replicated key-value projections)

What finetuning holds is the compile plan's to say (`sim.compile.plan`), and comes in as a number.
"""

from __future__ import annotations

from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.attention import local_kv_heads
from sim.errors import OutOfReach

GIB = 2**30
LOGITS_BYTES = 2 + 4 + 4
"""Per logit while sampling: half precision, fp32 copy, probabilities."""
RUNTIME_BYTES = 551 * 2**20
"""CUDA context and libraries: the measured figure noted in aiconfigurator's a100_sxm.yaml (other_mem)."""


def kv_bytes_per_token(model: ModelShape, tp: int) -> int:
    """Key and value of one token over all layers, on one device."""
    return 2 * model.layers * local_kv_heads(model, tp) * model.head_dim * model.dtype_bytes


def weight_bytes(model: ModelShape, tp: int) -> float:
    """Weights on one device; norms are counted as if split, which is below 0.1 %."""
    replicated = 2 * (local_kv_heads(model, tp) * model.head_dim - model.kv_dim / tp)
    return (model.params / tp + model.layers * model.hidden * replicated) * model.dtype_bytes


def activation_bytes(model: ModelShape, tp: int, batch_tokens: int, batch_sequences: int) -> float:
    """The widest point of an inference pass (residual, layer input, gate, up, their product), and logits."""
    per_token = (2 * model.hidden + 3 * model.ffn / tp) * model.dtype_bytes
    return batch_tokens * per_token + batch_sequences * model.vocab / tp * LOGITS_BYTES


def free_bytes(
    *,
    device: DeviceSpec,
    model: ModelShape,
    tp: int,
    utilization: float = 0.9,
    batch_tokens: int = 2048,
    batch_sequences: int = 256,
) -> float:
    """What each device has for KV cache and finetuning; below 0 where not even the weights fit."""
    sizes = _fixed(model, tp, batch_tokens, batch_sequences)
    return device.memory_bytes * utilization - sum(sizes.values())


def kv_room_tokens(
    *,
    device: DeviceSpec,
    model: ModelShape,
    tp: int,
    utilization: float = 0.9,
    batch_tokens: int = 2048,
    batch_sequences: int = 256,
    finetune_bytes: float = 0.0,
) -> int:
    """Tokens of KV cache that fit on each of the replica's devices.

    memory * utilization - runtime - weights - activations - finetuning, over bytes per token. OutOfReach
    when nothing is left, naming the sizes.
    """
    model.check_tp(tp)
    if not 0 < utilization <= 1:
        raise ValueError(f"memory utilization must be in (0, 1], got {utilization}")
    usable = device.memory_bytes * utilization
    sizes = {**_fixed(model, tp, batch_tokens, batch_sequences), "finetuning": finetune_bytes}
    room = int((usable - sum(sizes.values())) // kv_bytes_per_token(model, tp))
    if room < 1:
        needed = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in sizes.items())
        missing = (sum(sizes.values()) - usable) / GIB
        raise OutOfReach(
            f"{model.name} on tp {tp} leaves no room for a KV cache on {device.name}: {usable / GIB:.1f} GiB "
            f"({utilization:g} of {device.memory_bytes / GIB:.1f}) usable per device, needed before it are "
            f"{missing:.1f} more: {needed}"
        )
    return room


def _fixed(model: ModelShape, tp: int, batch_tokens: int, batch_sequences: int) -> dict[str, float]:
    return {
        "runtime": float(RUNTIME_BYTES),
        "weights": weight_bytes(model, tp),
        "activations": activation_bytes(model, tp, batch_tokens, batch_sequences),
    }
