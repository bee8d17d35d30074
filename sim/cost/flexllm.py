"""`LaunchBound`: an engine whose time goes into fixed costs, as published measurements show some to be.

A roofline knows neither a runtime that spends milliseconds between iterations nor kernels that are launched
one by one. Here an iteration has a floor, and the GPU's own work is only seen above it. Seconds per layer
of a pass over n tokens, with P the layer's linear parameters on one of tp devices, h the width of the model:

    pass        max(launch, 2 P / B + n 2 P / F) + [tp > 1] 2 all-reduces of (n + padding) h values
    all-reduce  (2 (tp - 1) / tp) bytes / (link share (tp - 1) / 3)
    window      + window_launch in every layer, once per iteration that holds finetuning windows; attention
                reads the keys and values of context + n tokens at a share of the memory's bandwidth
    backward    backward_start in every layer of the model, whatever the depth of the slice; then for each
                layer of the slice  backward_layer + n 2 P / F' + [tp > 1] 2 all-reduces of n h values
                + attention
    iteration   + host

The links of an A100 are shared out among the four of a board, a third to each peer (NVIDIA HGX A100 4-GPU),
so a pair has a third of a device's links. Logits are the roofline's (`sim.cost.gemm`), and so is attention
(`sim.cost.attention`) but for the published models on an A100: the constants were fitted together with the lines
of ATTENTION, and a formula that is nearer to the kernels would no longer be what they complete. The backward runs
on a second stream; the published step times show no gain from it (each layer adds the same 5.2 ms beside a decode
of 47 ms from 1 to 64 layers), so `overlap_contention` is 1.

The defaults are FlexLLM's, found by `profiles/flexllm_fit.py`, which also says how well they fit.
`configs/cost/vllm_eager_a100.yaml` has those of vLLM 0.8.3 without CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from sim.core.specs import DeviceSpec
from sim.cost import attention
from sim.cost.context import CostContext
from sim.cost.curves import ChunkCost, Curves, DecodeCost
from sim.cost.efficiency import Efficiency
from sim.cost.gemm import gemm_s
from sim.cost.iteration import IterationCost
from sim.cost.roofline import OPTIMIZER_BYTES

Floats = NDArray[np.float64]

ATTENTION = {
    (32, 8): (
        ChunkCost(
            fixed_s=9.785021033878315e-06,
            token_s=2.6102108694992375e-08,
            pair_s=9.03219477709227e-11,
            read_s=2.3748052480902475e-08,
            unhidden=0.5,
        ),
        DecodeCost(
            fixed_s=1.9370444426745994e-05,
            sequence_s=1.8960136068558472e-07,
            context_s=2.394228517062014e-09,
        ),
    ),
    (20, 4): (
        ChunkCost(
            fixed_s=1.0022190251209131e-05,
            token_s=2.2216569159557917e-08,
            pair_s=5.6723035823044263e-11,
            read_s=1.8680768659692932e-08,
            unhidden=0.25,
        ),
        DecodeCost(
            fixed_s=2.0369389086429892e-05,
            sequence_s=6.09854823187679e-08,
            context_s=1.2422041395279609e-09,
        ),
    ),
    (10, 2): (
        ChunkCost(
            fixed_s=1.0395123049100168e-05,
            token_s=1.8791724125698364e-08,
            pair_s=2.694758191499374e-11,
            read_s=1.8071609903689954e-08,
            unhidden=0.25,
        ),
        DecodeCost(
            fixed_s=2.1260622578767118e-05,
            sequence_s=1.2623815535633402e-08,
            context_s=6.327415108746876e-10,
        ),
    ),
    (16, 2): (
        ChunkCost(
            fixed_s=1.0253332665568556e-05,
            token_s=1.9033371055634e-08,
            pair_s=4.394160561241027e-11,
            read_s=1.7831234875644567e-08,
            unhidden=0.25,
        ),
        DecodeCost(
            fixed_s=2.125653654028808e-05,
            sequence_s=1.4176015801316029e-08,
            context_s=6.328128409080091e-10,
        ),
    ),
}
"""Heads and key-value heads of size 128, two bytes a value, on one A100 80GB as its file describes it -> attention
of a layer, per chunk and per iteration, by which the constants were fitted: Llama-3.1-8B on one, Qwen2.5-14B on two,
Qwen2.5-32B and Llama-3.1-70B on four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchBound:
    """Builder. `_s` are seconds; `_flops` and `_bandwidth` are shares of the device's peak."""

    host_s: float = 1.939e-3
    """Per iteration: scheduling, batch preparation and the runtime's own work."""
    launch_s: float = 0.3279e-3
    """Per layer: the least time in which its kernels are launched."""
    collective_tokens: float = 183.4
    """Tokens that each all-reduce of a pass carries beyond the pass's own."""
    window_launch_s: float = 0.08743e-3
    backward_start_s: float = 0.1084e-3
    backward_layer_s: float = 1.711e-3
    pass_flops: float = 0.8
    """F: includes element-wise kernels, LoRA and whatever else grows with the tokens."""
    backward_flops: float = 0.762
    window_bandwidth: float = 0.026
    """At which a window's attention reads its context, however narrow the window."""
    link_bandwidth: float = 0.1357
    weight_bandwidth: float = 0.718
    """In GEMMs of few tokens. Not fitted: between an A100's in a layer and alone (`sim.cost.efficiency`)."""
    overlap_contention: float = 1.0
    max_tokens: int = 8192
    """Passes up to this length are looked up, longer ones extended by the slope."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_flops", "_bandwidth")):
                if not 0 < value <= 1:
                    raise ValueError(f"{item.name} must be in (0, 1], got {value}")
            elif not 0 <= value < np.inf:
                raise ValueError(f"{item.name} must be at least 0 and finite, got {value}")
        if self.max_tokens < 1024:
            raise ValueError(f"max_tokens must be at least 1024, got {self.max_tokens}")
        if self.overlap_contention > 1:
            raise ValueError(f"overlap_contention must be in [0, 1], got {self.overlap_contention}")

    def build(self, context: CostContext) -> IterationCost:
        curves = self.curves(context).with_again(
            context.model.layers, context.again_gemm, context.again_attention
        )
        return IterationCost(curves, context.lookahead)

    def curves(self, context: CostContext) -> Curves:
        model, device, tp = context.model, context.device, context.tp
        efficiency = Efficiency.of(device)
        m = np.arange(1, self.max_tokens + 1, dtype=np.float64)
        weights = sum(i * o for i, o in model.linears.values()) / tp
        token_collective_s = 0.0
        if tp > 1:
            rate = device.link_bandwidth_bytes_s * self.link_bandwidth * min(1.0, (tp - 1) / 3)
            token_collective_s = 2 * model.hidden * model.dtype_bytes * 2 * (tp - 1) / tp / rate
        collective = token_collective_s * (m + self.collective_tokens)
        peak = device.peak_flops
        products = 2 * weights / (peak * self.pass_flops) * m
        read_s = weights * model.dtype_bytes / (device.memory_bandwidth_bytes_s * self.weight_bandwidth)
        layer = np.maximum(self.launch_s, read_s + products) + collective
        backward_collective = token_collective_s * m
        backward = 2 * weights / (peak * self.backward_flops) * m + backward_collective
        layer_chunk, layer_decode = _attention(context, efficiency)
        chunk = layer_chunk.times(model.layers)
        cached = 2 * attention.local_kv_heads(model, tp) * model.head_dim * model.dtype_bytes
        window_s = model.layers * cached / (device.memory_bandwidth_bytes_s * self.window_bandwidth)
        window = chunk._replace(read_s=max(chunk.read_s, window_s))
        return Curves(
            token_s=_curve(model.layers * layer),
            collective_s=_curve(model.layers * collective),
            sampled_s=_curve(self._logits_s(context, efficiency, m)),
            loss_s=_curve(2.0 * self._logits_s(context, efficiency, m)),
            recompute_s=_curve(model.layers * (layer + self.window_launch_s)),
            backward_layer_s=_curve(self.backward_layer_s + backward),
            backward_collective_s=_curve(backward_collective),
            backward_start_s=model.layers * self.backward_start_s,
            prefill=chunk,
            forward=window,
            recompute=window,
            backward=attention.backward_of(layer_chunk),
            decode=DecodeCost(*(model.layers * seconds for seconds in layer_decode)),
            lora_fixed_s=model.layers * self.window_launch_s,
            lora_token_s=0.0,
            adapter_s=0.0,
            optimizer_param_s=OPTIMIZER_BYTES / (tp * device.memory_bandwidth_bytes_s),
            host_s=self.host_s,
            overlap_contention=self.overlap_contention,
        )

    def _logits_s(self, context: CostContext, efficiency: Efficiency, m: Floats) -> Floats:
        """lm_head and two readings of its logits, by rows."""
        model, device = context.model, context.device
        vocab = -(-model.vocab // context.tp)
        rate = device.memory_bandwidth_bytes_s * efficiency.elementwise_bandwidth
        head = gemm_s(m, model.hidden, vocab, device, efficiency)
        seconds: Floats = head + 2 * vocab * model.dtype_bytes / rate * m
        return seconds


def _attention(context: CostContext, efficiency: Efficiency) -> tuple[ChunkCost, DecodeCost]:
    """Of one layer."""
    model, device, tp = context.model, context.device, context.tp
    heads = model.heads // tp, attention.local_kv_heads(model, tp)
    if _as_fitted(device) and model.head_dim == 128 and model.dtype_bytes == 2 and heads in ATTENTION:
        return ATTENTION[heads]
    chunk = attention.chunk_cost(1, model, tp, device, efficiency)
    return chunk, attention.decode_cost(replace(model, layers=1), tp, device, efficiency)


def _as_fitted(device: DeviceSpec) -> bool:
    """Whether attention sees the A100 of ATTENTION: the name, and every number that the formulas read."""
    numbers = (device.architecture, device.peak_flops, device.memory_bandwidth_bytes_s, device.sms)
    return (
        device.name == "a100_80gb"
        and numbers == ("ampere", 312e12, 2.039e12, 108)
        and device.sm_clocks_hz == 108 * 1.41e9
        and not device.extras
    )


def _curve(seconds: Floats) -> list[float]:
    """A list from 0 tokens on, never decreasing."""
    return [0.0, *np.maximum.accumulate(seconds).tolist()]
