"""Seconds of attention, by kind, over all layers of one device's share of the heads.

A chunk of n tokens after c cached ones, per layer, with H query and G key-value heads on the device and
head size d:

    forward    t = t_fixed + max(4 H d n (c + (n+1)/2 + w) / (P e),  4 G d (c + n) / B)
    backward   the same with 10 H d instead of 4 H d, at 63/73 of the forward's share of peak
    decodes    t = t_fixed + G t_seq N + 4 G d (C + N) / B     N sequences, C cached tokens summed

4 H d FLOPs per query-key pair are two matrix products, the backward's five (recomputed scores, dV, dP,
dQ, dK). w are keys computed in vain. The second term of the maximum is the reading of K and V in half
precision. The backward's share of peak against the forward's: FlashAttention-2 (Dao, 2023,
arXiv 2307.08691, section 4.1) reports up to 63 % and 73 % on an A100. Constants: `sim.cost.efficiency`.
"""

from __future__ import annotations

from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.curves import ChunkCost, DecodeCost
from sim.cost.efficiency import Efficiency

FORWARD_FLOPS = 4.0
BACKWARD_FLOPS = 10.0
BACKWARD_SHARE = 63.0 / 73.0


def local_kv_heads(model: ModelShape, tp: int) -> int:
    """Key-value heads held by one device; they are replicated when there are more devices than heads."""
    return max(1, model.kv_heads // tp)


def chunk_cost(
    layers: int, model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency
) -> ChunkCost:
    """Forward attention of prefill chunks and finetuning windows through `layers` layers."""
    flop_s = FORWARD_FLOPS / (device.peak_flops * efficiency.attention_flops)
    return _chunk(layers, flop_s, model, tp, device, efficiency)


def backward_cost(model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency) -> ChunkCost:
    """Backward attention of a rectangle, per layer."""
    flop_s = BACKWARD_FLOPS / (device.peak_flops * efficiency.attention_flops * BACKWARD_SHARE)
    return _chunk(1, flop_s, model, tp, device, efficiency)


def decode_cost(model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency) -> DecodeCost:
    """Attention of all decodes of an iteration, all layers."""
    heads = local_kv_heads(model, tp)
    rate = device.memory_bandwidth_bytes_s * efficiency.decode_bandwidth
    token_s = model.layers * 2 * heads * model.head_dim * model.dtype_bytes / rate
    return DecodeCost(
        model.layers * efficiency.decode_fixed_s,
        model.layers * heads * efficiency.decode_sequence_s + token_s,
        token_s,
    )


def _chunk(
    layers: int, flop_s: float, model: ModelShape, tp: int, device: DeviceSpec, efficiency: Efficiency
) -> ChunkCost:
    pair_s = layers * flop_s * model.heads / tp * model.head_dim
    read_bytes = layers * 2 * local_kv_heads(model, tp) * model.head_dim * model.dtype_bytes
    return ChunkCost(
        layers * efficiency.attention_fixed_s,
        pair_s * efficiency.attention_extra_tokens,
        pair_s,
        read_bytes / (device.memory_bandwidth_bytes_s * efficiency.decode_bandwidth),
    )
