"""`Roofline`: an iteration's cost from the device's data and the model's shape, nothing measured per model.

One layer of a forward pass over m tokens on one of tp devices:

    4 GEMMs      qkv h -> (q + 2 kv)/tp, o q/tp -> h, gate and up h -> 2 f/tp, down f/tp -> h
    4 kernels    two norms with their residuals (read and write 2 h each), rotary, SiLU-gate
    attention, which writes the cache first
    2 all-reduces of m h values (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053), when tp > 1

The backward of a layer with frozen weights has the transposed GEMMs (dX = dY W^T: the FLOPs of the
forward, none for dW), element-wise kernels that read the saved tensors again, the LoRA gradients, and
the same two all-reduces. LoRA's bypasses send what their placement says (`CostContext.trained`).
Formulas: `sim.cost.gemm`, `sim.cost.attention`, `sim.cost.collective`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.core.finetune import LOSS_CHUNK_TOKENS
from sim.core.specs import BypassWork, Collective
from sim.cost import attention
from sim.cost.collective import allreduce_s, collective_s
from sim.cost.context import CostContext
from sim.cost.curves import Curves
from sim.cost.efficiency import Efficiency
from sim.cost.elementwise import elementwise_s, fused_norm_s, whole_blocks
from sim.cost.gemm_table import GEMMS, product_s
from sim.cost.iteration import IterationCost

Floats = NDArray[np.float64]

OPTIMIZER_BYTES = 30
"""AdamW per parameter: read master, gradient and two moments, write master and moments in fp32, write the
half-precision copy: 4 * (4 + 3) + 2."""

FORWARD_VALUES = (2, 2, 2, 3)
BACKWARD_VALUES = (3, 3, 3, 5)
"""Values read and written, in multiples of hidden (each norm, and its residual), of query and key (rotary), and
of the MLP's width (SiLU-gate). The backward reads the saved tensors too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Builder of the roofline model."""

    host_s: float = 1e-3
    """CPU time per iteration that the GPU waits for: planning, batch building, one graph launch, reading
    the sampled tokens. An assumption, not a measurement: a Python loop that spends a few microseconds
    per sequence and copies a dozen small arrays needs about a millisecond."""
    launch_s: float = 5e-6
    """CPU time to launch one kernel outside a captured graph."""
    graph_tokens: int = 512
    """Passes of up to so many tokens replay captured graphs (512 is the largest that vLLM captures by
    default); a larger one takes at least its kernels' launches. 0: nothing is captured."""
    overlap_contention: float = 0.8
    """Share of the shorter stream that does not hide behind the longer; 1 is no gain at all. An
    assumption: decoding leaves arithmetic idle that a backward can use, while its GEMMs compete for
    multiprocessors and memory. The only measured case found no gain (FlexLLM's published step times,
    70B on 4 A100: 5.2 ms per backward layer from 1 to 64 layers beside a 47 ms decode)."""
    gemm: str = "layer"
    """layer: matrix products as a running layer has them; table: alone, by the curve that measured ones
    correct where a table names the device; curve: alone, by the curve (`sim.cost.gemm_table`)."""
    max_tokens: int = 8192
    """Passes up to this length are looked up, longer ones extended by the slope."""

    def __post_init__(self) -> None:
        for name in ("host_s", "launch_s", "graph_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.gemm not in GEMMS:
            raise ValueError(f"gemm must be one of {', '.join(GEMMS)}, got {self.gemm!r}")
        if not 0 <= self.overlap_contention <= 1:
            raise ValueError(f"overlap_contention must be in [0, 1], got {self.overlap_contention}")
        if self.max_tokens < 1024:
            raise ValueError(f"max_tokens must be at least 1024, got {self.max_tokens}")

    def build(self, context: CostContext) -> IterationCost:
        curves = self.curves(context).with_again(
            context.model.layers, context.again_gemm, context.again_attention
        )
        return IterationCost(curves, context.lookahead)

    def curves(self, context: CostContext) -> Curves:
        return _Terms(self, context).curves()


class _Terms:
    """The formulas over all token counts 1..max_tokens at once."""

    def __init__(self, settings: Roofline, context: CostContext) -> None:
        self.settings = settings
        self.model, self.device, self.tp = context.model, context.device, context.tp
        self.lora, self.trained, self.served = context.lora, context.trained, context.served
        self.efficiency = Efficiency.of(context.device)
        self.m = np.arange(1, settings.max_tokens + 1, dtype=np.float64)
        self.kv_dim = attention.local_kv_heads(self.model, self.tp) * self.model.head_dim
        self.q_dim = self.model.q_dim // self.tp
        self.ffn = self.model.ffn // self.tp
        self.vocab = -(-self.model.vocab // self.tp)
        self.byte_s = 1.0 / (self.device.memory_bandwidth_bytes_s * self.efficiency.elementwise_bandwidth)

    def curves(self) -> Curves:
        model, device, tp, efficiency = self.model, self.device, self.tp, self.efficiency
        allreduce = 2.0 * allreduce_s(self.m * (model.hidden * model.dtype_bytes), tp, device, efficiency)
        token_s = self._forward_s(allreduce)
        served_token_s, lora_fixed_s = self._lora_s(self.served)
        trained_token_s, _ = self._lora_s(self.trained)
        sent = () if self.trained is None else self.trained.forward
        bypass_collectives = model.layers * self._collectives_s(sent)
        back = () if self.trained is None else self.trained.backward
        backward_collectives = allreduce + self._collectives_s(back)
        window = attention.chunk_cost(model.layers, model, tp, device, efficiency)
        return Curves(
            token_s=_curve(token_s),
            collective_s=_curve(model.layers * allreduce),
            sampled_s=_curve(self._logits_s()),
            loss_s=_curve(self._loss_s()),
            recompute_s=_curve(token_s + (lora_fixed_s + trained_token_s * self.m) + bypass_collectives),
            backward_layer_s=_curve(self._backward_layer_s(backward_collectives)),
            backward_collective_s=_curve(backward_collectives),
            prefill=window,
            forward=window,
            recompute=window,
            backward=attention.backward_cost(model, tp, device, efficiency),
            decode=attention.decode_cost(model, tp, device, efficiency),
            lora_fixed_s=lora_fixed_s,
            lora_token_s=served_token_s,
            window_lora_token_s=trained_token_s,
            window_collective_s=_curve(bypass_collectives) if sent else None,
            adapter_s=self.lora.params(model) * model.dtype_bytes / tp * self.byte_s,
            optimizer_param_s=self._optimizer_param_s(),
            host_s=self.settings.host_s,
            overlap_contention=self.settings.overlap_contention,
        )

    def _forward_s(self, allreduce: Floats) -> Floats:
        """All layers, the embedding and the last norm."""
        model = self.model
        gemms = sum(self._gemm_s(self.m, k, n) for k, n in self._linears())
        layer = gemms + self._small_kernels_s(FORWARD_VALUES) + allreduce
        launches = 8 + (2 if self.tp > 1 else 0)
        ends = self._elementwise_s(4 * model.hidden, kernels=2)
        return self._at_least_launches(model.layers * layer + ends, model.layers * launches + 2)

    def _backward_layer_s(self, collectives: Floats) -> Floats:
        """One layer: transposed GEMMs; norms, rotary and SiLU-gate read saved tensors and gradients."""
        gemms = sum(self._gemm_s(self.m, n, k) for k, n in self._linears())
        lora_token_s, lora_fixed_s = self._lora_s(self.trained)
        layers = self.model.layers
        # dB, dA and two gradients of activations: twice the products and kernels of the forward.
        lora = 2.0 * (lora_fixed_s + lora_token_s * self.m) / layers
        layer = gemms + self._small_kernels_s(BACKWARD_VALUES) + lora + collectives
        launches = 9 + 4 * len(self.lora.targets) + (2 if self.tp > 1 else 0)
        return self._at_least_launches(layer, launches, captured=False)

    def _lora_s(self, work: BypassWork | None) -> tuple[float, float]:
        """Per token and per pass, all layers, without collectives: two thin products per target, bound by their
        activations (read the input, write and read rank values, read and write the output), or by arithmetic
        where ranks are large and it is known how they lie."""
        values = self._unplaced_values() if work is None else work.values
        flop_s = 1.0 / (self.device.peak_flops * self.efficiency.layer_flops)
        product_s = 0.0 if work is None else work.flops * flop_s
        layers, kernels = self.model.layers, 2 * len(self.lora.targets)
        return (
            layers * max(values * self.model.dtype_bytes * self.byte_s, product_s),
            layers * kernels * self.efficiency.elementwise_fixed_s,
        )

    def _unplaced_values(self) -> float:
        split_in = {"o_proj", "down_proj"}
        values = 0.0
        for target in self.lora.targets:
            inputs, outputs = self.model.linears[target]
            if target in split_in:
                inputs //= self.tp
            else:
                outputs //= self.tp
            values += inputs + 2 * self.lora.rank + 2 * outputs
        return values

    def _collectives_s(self, collectives: Iterable[Collective]) -> Floats:
        """Of one layer, by tokens."""
        found = np.zeros_like(self.m)
        for kind, features in collectives:
            size_bytes = self.m * (features * self.model.dtype_bytes)
            found += collective_s(kind, size_bytes, self.tp, self.device, self.efficiency)
        return found

    def _optimizer_param_s(self) -> float:
        """Per parameter of the adapter: the update of those that a device holds, after the gradients that are
        sums over devices have been added up in float32."""
        update_s = OPTIMIZER_BYTES * self.byte_s
        if self.trained is None:
            return update_s
        layers, params = self.model.layers, self.lora.params(self.model)
        reduced_bytes = np.array([4.0 * layers * self.trained.reduced_params])
        reduce_s = 0.0
        if reduced_bytes[0]:
            reduce_s = float(allreduce_s(reduced_bytes, self.tp, self.device, self.efficiency)[0])
        return update_s * (layers * self.trained.own_params / params) + reduce_s / params

    def _logits_s(self) -> Floats:
        """lm_head, gathering of the split vocabulary (half an all-reduce), and a sampler that reads the
        logits twice. Rows above 1024 are extended by the slope: no iteration samples so many."""
        rows = self.m[:1024]
        gather = 0.5 * allreduce_s(
            rows * (self.model.vocab * self.model.dtype_bytes), self.tp, self.device, self.efficiency
        )
        head = self._gemm_s(rows, self.model.hidden, self.vocab)
        sampling = self._elementwise_s(2 * self.model.vocab, kernels=2, m=rows)
        seconds = np.maximum.accumulate(head + gather + sampling)
        slope = (seconds[-1] - seconds[511]) / 512
        return np.concatenate([seconds, seconds[-1] + slope * (self.m[1024:] - 1024)])

    def _loss_s(self) -> Floats:
        """lm_head forward and its gradient to the hidden state, chunk by chunk; the softmax reads the
        logits twice and overwrites them with their gradient."""
        chunk = LOSS_CHUNK_TOKENS
        rows = self.m[:chunk]
        hidden, vocab = self.model.hidden, self.vocab
        products = self._gemm_s(rows, hidden, vocab) + self._gemm_s(rows, vocab, hidden)
        reduce = allreduce_s(rows * (hidden * self.model.dtype_bytes), self.tp, self.device, self.efficiency)
        one = products + reduce + self._elementwise_s(3 * vocab, kernels=2, m=rows)
        one = np.concatenate([[0.0], np.maximum.accumulate(one)])
        whole, rest = np.divmod(self.m.astype(np.int64), chunk)
        seconds: Floats = whole * one[chunk] + one[rest]
        return seconds

    def _linears(self) -> tuple[tuple[int, int], ...]:
        """(input, output) features on one device, as the engine fuses them."""
        hidden = self.model.hidden
        return (
            (hidden, self.q_dim + 2 * self.kv_dim),
            (self.q_dim, hidden),
            (hidden, 2 * self.ffn),
            (self.ffn, hidden),
        )

    def _gemm_s(self, m: Floats, k: int, n: int) -> Floats:
        return product_s(m, k, n, self.device, self.efficiency, self.settings.gemm)

    def _small_kernels_s(self, values: tuple[int, int, int, int]) -> Floats:
        """Two norms, each fused with its residual, rotary, SiLU-gate."""
        norm, residual, rotary, gate = values
        hidden, device, efficiency = self.model.hidden, self.device, self.efficiency
        norms_s = 2.0 * fused_norm_s(self.m, norm * hidden, residual * hidden, device, efficiency)
        rotated = rotary * (self.q_dim + self.kv_dim)
        rotary_s = elementwise_s(self.m, rotated, "rotary", device, efficiency)
        return (
            norms_s
            + rotary_s
            + elementwise_s(self.m, gate * whole_blocks(self.ffn), "activation", device, efficiency)
        )

    def _elementwise_s(self, values: int, kernels: int, m: Floats | None = None) -> Floats:
        """`values` read or written per token by `kernels` kernels."""
        tokens = self.m if m is None else m
        return kernels * self.efficiency.elementwise_fixed_s + tokens * (
            values * self.model.dtype_bytes * self.byte_s
        )

    def _at_least_launches(self, seconds: Floats, launches: int, captured: bool = True) -> Floats:
        """The GPU cannot run ahead of the CPU: kernels outside a graph cost their launches."""
        from_token = self.settings.graph_tokens if captured else 0
        launch_s = np.where(self.m > from_token, launches * self.settings.launch_s, 0.0)
        return np.maximum(seconds, launch_s)


def _curve(seconds: Floats) -> list[float]:
    """Values at 1.. as a list from 0. The running maximum makes waves monotone: a kernel for more tokens
    could always be used for fewer, by padding."""
    return [0.0, *np.maximum.accumulate(seconds).tolist()]
