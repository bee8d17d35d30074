"""What fits on a device: weights, finetuning state and activations first, KV cache in what is left.

Bytes per device of a replica on tp devices; h, q, kv, f are the model's widths, b bytes per value,
kv' = max(1, kv_heads / tp) * head_dim the key-value width held by one device:

    KV cache     2 layers kv' b                                   per token
    weights      params b / tp + layers h (2 kv' - 2 kv / tp) b   (replicated key-value projections)
    stash        b (2 h + (2 q + 2 f)/tp + 2 kv') + 4 heads/tp    per token and layer
    adapter      18 per parameter: fp32 master, gradient and two moments, half-precision copy

The stash is what the backward of a frozen layer with a LoRA bypass cannot do without recomputing a GEMM
or attention: both norms' inputs, q, k, v, attention output and its log-sum-exp (fp32), gate and up. For
Llama-3.1-8B that is 92.1 KiB, which hand-written autograd functions were measured to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.core.finetune import MEMORIES
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.cost.attention import local_kv_heads

GIB = 2**30
ADAPTER_STATE_BYTES = 4 + 4 + 4 + 4 + 2
LOGITS_BYTES = 2 + 4 + 4
"""Per logit while sampling: half precision, fp32 copy, probabilities."""
RUNTIME_BYTES = 551 * 2**20
"""CUDA context and libraries: the measured figure noted in aiconfigurator's a100_sxm.yaml (other_mem)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneReservation:
    """Room kept for one sample of one job."""

    sample_tokens: int
    """The longest sample."""
    memory: str = "stash"
    window_tokens: int = 1024
    """Largest window; with `recompute`, only its activations exist at a time."""

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise ValueError(f"finetune.memory must be one of {MEMORIES}, got {self.memory!r}")
        if self.sample_tokens < 1 or self.window_tokens < 1:
            raise ValueError(
                "finetune: sample_tokens and window_tokens must be at least 1, "
                f"got {self.sample_tokens} and {self.window_tokens}"
            )


def kv_bytes_per_token(model: ModelShape, tp: int) -> int:
    """Key and value of one token over all layers, on one device."""
    return 2 * model.layers * local_kv_heads(model, tp) * model.head_dim * model.dtype_bytes


def weight_bytes(model: ModelShape, tp: int) -> float:
    """Weights on one device; norms are counted as if split, which is below 0.1 %."""
    replicated = 2 * (local_kv_heads(model, tp) * model.head_dim - model.kv_dim / tp)
    return (model.params / tp + model.layers * model.hidden * replicated) * model.dtype_bytes


def stash_bytes(model: ModelShape, tp: int) -> float:
    """Activations kept per token and layer, on one device."""
    kv_dim = local_kv_heads(model, tp) * model.head_dim
    values = 2 * model.hidden + (2 * model.q_dim + 2 * model.ffn) / tp + 2 * kv_dim
    return values * model.dtype_bytes + 4 * model.heads / tp


def finetune_bytes(model: ModelShape, tp: int, lora: LoraSpec, room: FinetuneReservation) -> float:
    """Adapter state, plus what a sample needs between forward and backward, on one device.

    stash: the stash of all its tokens, fp32 dK and dV of one layer. recompute: its K and V and fp32 dK and
    dV of all layers, and the stash of one window. Both: the gradient of the last hidden state.
    """
    kv_values = 2 * local_kv_heads(model, tp) * model.head_dim
    tokens, layers = room.sample_tokens, model.layers
    held = tokens * model.hidden * model.dtype_bytes + lora.params(model) * ADAPTER_STATE_BYTES
    if room.memory == "stash":
        return held + tokens * (layers * stash_bytes(model, tp) + 4 * kv_values)
    window = min(room.window_tokens, tokens)
    cached = tokens * layers * kv_values * (model.dtype_bytes + 4)
    return held + cached + window * layers * stash_bytes(model, tp)


def activation_bytes(model: ModelShape, tp: int, batch_tokens: int, batch_sequences: int) -> float:
    """The widest point of an inference pass (residual, layer input, gate, up, their product), and logits."""
    per_token = (2 * model.hidden + 3 * model.ffn / tp) * model.dtype_bytes
    return batch_tokens * per_token + batch_sequences * model.vocab / tp * LOGITS_BYTES


def kv_room_tokens(
    *,
    device: DeviceSpec,
    model: ModelShape,
    tp: int,
    lora: LoraSpec,
    utilization: float = 0.9,
    batch_tokens: int = 2048,
    batch_sequences: int = 256,
    finetune: FinetuneReservation | None = None,
) -> int:
    """Tokens of KV cache that fit on each of the replica's devices.

    memory * utilization - runtime - weights - activations - finetuning, over bytes per token. ValueError
    when nothing is left, naming the sizes.
    """
    model.check_tp(tp)
    if not 0 < utilization <= 1:
        raise ValueError(f"memory utilization must be in (0, 1], got {utilization}")
    usable = device.memory_bytes * utilization
    sizes = {
        "runtime": float(RUNTIME_BYTES),
        "weights": weight_bytes(model, tp),
        "activations": activation_bytes(model, tp, batch_tokens, batch_sequences),
        "finetuning": 0.0 if finetune is None else finetune_bytes(model, tp, lora, finetune),
    }
    room = int((usable - sum(sizes.values())) // kv_bytes_per_token(model, tp))
    if room < 1:
        needed = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in sizes.items())
        raise ValueError(
            f"{model.name} on tp {tp} leaves no room for a KV cache on {device.name}: {usable / GIB:.1f} GiB "
            f"({utilization:g} of {device.memory_bytes / GIB:.1f}) usable per device, needed: {needed}; "
            "a larger tp, a shorter cutoff_len of the finetuning jobs, or order=window_major with memory=recompute "
            "need less"
        )
    return room
