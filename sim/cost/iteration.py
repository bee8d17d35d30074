"""Seconds of an iteration from `Curves`, and the scheduler's inverse questions.

With a = prefill + decode + logits + adapters (inference) and b = forward + loss + backward + recompute
(finetuning), T and F the inference and window tokens:

    fused      gpu = token_s[T + F] + a + b + optimizer
    overlap    x = token_s[T] + a, y = token_s[F] + b, gpu = optimizer + max(x, y) + kappa min(x, y)
    iteration  gpu + host, or max(gpu, host) when the loop plans one iteration ahead

An optimizer step may change the adapter that inference reads, so it comes before both streams.

The order of additions is the same wherever an iteration is predicted, so that an inverse is exact and says the
same seconds as `iteration_s`; how it is searched for is in `sim.cost.inverse`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

import numpy as np

from sim.core.cost import Fit
from sim.core.finetune import JobView, backward_chunks, recompute_chunks
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.backward import largest_slice
from sim.cost.curves import ChunkCost, Curves, extend, extended, window_lora_s
from sim.cost.inverse import ROUNDING, Coefficients, largest_chunk, left_beside, settled


class IterationCost:
    """A `Predictor` over `curves`. Its lists grow on demand, and the next search starts where the last one ended:
    neither changes what it says."""

    def __init__(self, curves: Curves, lookahead: int = 0) -> None:
        self.curves = curves
        self.lookahead = lookahead
        self.known_tokens = len(curves.token_s) - 1
        """Passes of more tokens are extended by the slope of the curves' upper half."""
        self._token_s = list(curves.token_s)
        self._sampled_s = list(curves.sampled_s)
        self._window_s = [s + window_lora_s(curves, n) for n, s in enumerate(curves.loss_s)]
        if curves.window_collective_s is not None:
            self._window_s = [a + b for a, b in zip(self._window_s, curves.window_collective_s, strict=True)]
        self._recompute_s = list(curves.recompute_s)
        self._backward_s = list(curves.backward_layer_s)
        self._prefill = _coefficients(curves.prefill)
        self._forward = _coefficients(curves.forward)
        self._recompute = _coefficients(curves.recompute)
        self._backward = _coefficients(curves.backward)
        self._nothing_s = [0.0] * len(curves.token_s)
        self._lora_s = [curves.lora_token_s * n for n in range(len(curves.token_s))]
        self._decode_fixed_s, self._decode_sequence_s, self._decode_context_s = curves.decode
        self._backward_start_s = curves.backward_start_s
        self._optimizer_param_s = curves.optimizer_param_s
        self._host_s = curves.host_s
        self._kappa = curves.overlap_contention
        self._last_window_tokens = 1
        """The last `largest_forward` that the budget decided, where the next search starts: successive
        windows are alike. Only the number of steps depends on it."""
        self._layer_s = self._layers_s()

    @property
    def region(self) -> dict[str, tuple[float, float]]:
        """What the curves were made for: name of a count (`sim.metrics`) -> least and largest value."""
        return {"pass_tokens": (0.0, float(self.known_tokens))}

    def iteration_s(self, work: Work) -> float:
        """Seconds of one iteration."""
        prefill, decodes, context, sampled, forward, backward, recompute, params, adapters, overlap = work
        if forward or backward or recompute or params:
            tokens, inference_s = self._inference(prefill, decodes, context, sampled, adapters)
            windows, f, b, r, optimizer = self._finetuning(forward, backward, recompute, params)
            return self._sum_s(tokens, inference_s, windows, f, b + r, optimizer, overlap)
        if decodes or prefill:
            tokens, inference_s = self._inference(prefill, decodes, context, sampled, adapters)
            return self._sum_s(tokens, inference_s, 0, 0.0, 0.0, 0.0, False)
        return self._host_s

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by part. `collective` is missing where the curves do not know it apart."""
        curves = self.curves
        gpu_s = self._gpu_s(work)
        tokens = work.decode_count + work.prefill_tokens
        windows, forward_s, backward_s, recompute_s, optimizer_s = self._finetuning(
            work.forward, work.backward, work.recompute, work.optimizer_params
        )
        lora_s = window_lora_s(curves, windows)
        if curves.window_collective_s is not None:
            lora_s += extended(curves.window_collective_s, windows)
        passes = (tokens, windows) if work.overlap else (tokens + windows,)
        parts = {
            "forward_pass": sum([self._token_s[n] for n in passes]),
            "attention_prefill": sum([curves.prefill.seconds(*chunk) for chunk in work.prefill]),
            "attention_decode": self._decode_s(work),
            "attention_forward": forward_s,
            "logits": self._sampled_s[work.sampled_tokens],
            "loss": self._window_s[windows] - lora_s,
            "backward": backward_s,
            "recompute": recompute_s,
            "optimizer": optimizer_s,
            "adapters": lora_s,
        }
        if work.adapters:
            parts["adapters"] += (
                curves.lora_fixed_s + curves.adapter_s * work.adapters + curves.lora_token_s * tokens
            )
        parts["overlap_saving"] = 0.0
        if work.overlap:
            alone = work._replace(optimizer_params=0, overlap=False)
            shorter_s = min(self._gpu_s(alone.inference), self._gpu_s(alone.finetuning))
            parts["overlap_saving"] = (self._kappa - 1.0) * shorter_s
        parts["host"] = self.iteration_s(work) - gpu_s
        self._set_collective_apart(parts, work, passes)
        return parts

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        """Most tokens (0..max_tokens) of one more prefill chunk; rows of logits stay as `work` says."""
        prefill, decodes, cached, sampled, forward, backward, recompute, params, adapters, overlap = work
        tokens, inference_s = self._inference(prefill, decodes, cached, sampled, adapters)
        windows, f, b, r, optimizer = self._finetuning(forward, backward, recompute, params)
        finetuning_s = f + self._window_s[windows] + b + r
        if overlap:
            beside_s = self._token_s[windows] + finetuning_s
            left_s, tolerance_s = self._left(budget_s, inference_s, beside_s, optimizer)
        else:
            left_s, tolerance_s = self._left(budget_s, inference_s + finetuning_s + optimizer)
            tokens += windows
        if tokens + max_tokens >= len(self._token_s):
            self._reach(tokens + max_tokens)
        lora_s = self._lora_s if adapters else self._nothing_s
        n, _, certain = largest_chunk(
            self._prefill,
            context,
            self._token_s,
            tokens,
            lora_s,
            0,
            max_tokens,  # most chunks fit whole
            max_tokens,
            left_s,
            tolerance_s,
        )
        if certain:
            return n
        return self._settled(work, partial(_with_chunk, work, context), n, 1, max_tokens, budget_s)[0]

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> Fit:
        """Most tokens (0..max_tokens) of one more forward window."""
        prefill, decodes, cached, sampled, forward, backward, recompute, params, adapters, overlap = work
        tokens, inference_s = self._inference(prefill, decodes, cached, sampled, adapters)
        windows, f, rest_s, optimizer = 0, 0.0, 0.0, 0.0
        if forward or backward or recompute or params:
            windows, f, b, r, optimizer = self._finetuning(forward, backward, recompute, params)
            rest_s = b + r
        if overlap:
            passes = windows
            beside_s = self._token_s[tokens] + inference_s
            left_s, tolerance_s = self._left(budget_s, f + rest_s, beside_s, optimizer)
        else:
            passes = tokens + windows
            left_s, tolerance_s = self._left(budget_s, f + rest_s + optimizer + inference_s)
        if passes + max_tokens >= len(self._token_s):
            self._reach(passes + max_tokens)
        n, chunk_s, certain = largest_chunk(
            self._forward,
            context,
            self._token_s,
            passes,
            self._window_s,
            windows,
            self._last_window_tokens,
            max_tokens,
            left_s,
            tolerance_s,
        )
        if not certain:
            return self._settled(work, partial(_with_window, work, context), n, 1, max_tokens, budget_s)
        if n == 0:
            return 0, self.iteration_s(work)
        if n < max_tokens:
            self._last_window_tokens = n
        return n, self._sum_s(tokens, inference_s, windows + n, f + chunk_s, rest_s, optimizer, overlap)

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> Fit:
        """Most layer-tokens of `job`'s backward that continue from where it stands.

        Layer-major: finishes the layer begun, adds whole layers by division, then part of the next.
        Window-major: the widest window, in tokens times layers.
        """
        prefill, decodes, cached, sampled, forward, backward, recompute, params, adapters, overlap = work
        tokens, inference_s = self._inference(prefill, decodes, cached, sampled, adapters)
        windows, f, b, r, optimizer = 0, 0.0, self._backward_start_s, 0.0, 0.0
        if forward or backward or recompute or params:
            windows, f, b, r, optimizer = self._finetuning(forward, backward, recompute, params)
            if not backward:
                b = self._backward_start_s
        length = job.sample_tokens
        if tokens + windows >= len(self._token_s) or length >= len(self._token_s):
            self._reach(max(tokens + windows, length))
        taken_s = f + self._window_s[windows] + b + r
        if overlap:
            taken_s += self._token_s[windows]
            beside_s = self._token_s[tokens] + inference_s
            left_s, tolerance_s = self._left(budget_s, taken_s, beside_s, optimizer)
        else:
            taken_s += optimizer + self._token_s[tokens + windows] + inference_s
            left_s, tolerance_s = self._left(budget_s, taken_s)
        n, b, r, certain = largest_slice(self, job, b, r, left_s, tolerance_s)
        if not certain:
            unit = job.layers if job.order == "window_major" else 1
            with_slice = partial(_with_slice, work, job)
            return self._settled(work, with_slice, n, unit, job.backward_left, budget_s)
        if n == 0:
            return 0, self.iteration_s(work)
        return n, self._sum_s(tokens, inference_s, windows, f, b + r, optimizer, overlap)

    def _settled(
        self, work: Work, with_tokens: Callable[[int], Work], n: int, unit: int, most: int, budget_s: float
    ) -> Fit:
        """The exact answer next to `n`."""
        n = settled(n, unit, most, lambda n: self.iteration_s(with_tokens(n)) <= budget_s)
        return n, self.iteration_s(with_tokens(n) if n else work)

    def _left(
        self, budget_s: float, taken_s: float, beside_s: float | None = None, before_s: float = 0.0
    ) -> tuple[float, float]:
        """What the budget leaves to a stream that has `taken_s` already, while another beside it has
        `beside_s` and `before_s` come before both, if there are two; and how much of that may be rounding."""
        gpu_s, tolerance_s = budget_s, ROUNDING * budget_s
        if not self.lookahead:
            gpu_s -= self._host_s
        elif self._host_s > budget_s:
            return -inf, 0.0
        if beside_s is not None:
            gpu_s, tolerance_s = left_beside(gpu_s - before_s, beside_s, self._kappa, tolerance_s)
        return gpu_s - taken_s, tolerance_s

    def _sum_s(
        self,
        tokens: int,
        inference_s: float,
        windows: int,
        forward_s: float,
        rest_s: float,
        optimizer_s: float,
        overlap: bool,
    ) -> float:
        """Seconds of the iteration: the one sum that decides. `rest_s` is backward + recompute."""
        largest = tokens + windows
        if largest > self.known_tokens:
            self._reach(largest)
        forward_s += self._window_s[windows]
        if not overlap:
            gpu_s = (self._token_s[largest] + inference_s) + (forward_s + (rest_s + optimizer_s))
        else:
            x = self._token_s[tokens] + inference_s
            y = self._token_s[windows] + (forward_s + rest_s)
            gpu_s = optimizer_s + (x + self._kappa * y if x > y else y + self._kappa * x)
        if self.lookahead:
            return gpu_s if gpu_s > self._host_s else self._host_s
        return gpu_s + self._host_s

    def _gpu_s(self, work: Work) -> float:
        """The same without host time, for `parts`."""
        host_s, self._host_s = self._host_s, 0.0
        seconds = self.iteration_s(work)
        self._host_s = host_s
        return seconds

    def _inference(
        self, prefill: tuple[Chunk, ...], decodes: int, context: int, sampled: int, adapters: int
    ) -> tuple[int, float]:
        """Tokens T, and seconds of a."""
        tokens = decodes
        prefill_s = rest_s = 0.0
        if decodes:
            rest_s = (
                self._decode_fixed_s + decodes * self._decode_sequence_s + context * self._decode_context_s
            )
        if prefill:
            fixed_s, each_s, pair_s, read_s, unhidden = self._prefill
            for n, c in prefill:
                tokens += n
                compute_s = n * each_s + pair_s * (n * (c + (n + 1) * 0.5))
                reading_s = read_s * (c + n)
                prefill_s += fixed_s + (
                    compute_s + unhidden * reading_s
                    if compute_s > reading_s
                    else reading_s + unhidden * compute_s
                )
        if tokens >= len(self._token_s):
            self._reach(tokens)
        rest_s += self._sampled_s[sampled]
        if adapters:
            curves = self.curves
            rest_s += curves.lora_fixed_s + curves.adapter_s * adapters
            return tokens, (prefill_s + rest_s) + curves.lora_token_s * tokens
        return tokens, prefill_s + rest_s

    def _finetuning(
        self,
        forward: tuple[Chunk, ...],
        backward: tuple[LayerChunk, ...],
        recompute: tuple[Chunk, ...],
        params: int,
    ) -> tuple[int, float, float, float, float]:
        """Tokens F, and seconds of the forward's attention, backward, recompute and optimizer."""
        windows = 0
        forward_s = backward_s = recompute_s = 0.0
        if forward:
            fixed_s, each_s, pair_s, read_s, unhidden = self._forward
            for n, c in forward:
                windows += n
                compute_s = n * each_s + pair_s * (n * (c + (n + 1) * 0.5))
                reading_s = read_s * (c + n)
                forward_s += fixed_s + (
                    compute_s + unhidden * reading_s
                    if compute_s > reading_s
                    else reading_s + unhidden * compute_s
                )
            if windows >= len(self._token_s):
                self._reach(windows)
        if backward:
            fixed_s, each_s, pair_s, read_s, unhidden = self._backward
            backward_s = self._backward_start_s
            for layers, n, c in backward:
                if n > self.known_tokens:
                    self._reach(n)
                if c == 0:
                    backward_s += layers * self._layer_s[n]
                    continue
                # A product of an integer and a float takes as long as four of floats.
                tokens, before = n + 0.0, c + 0.0
                compute_s = tokens * each_s + pair_s * (tokens * (before + (tokens + 1.0) * 0.5))
                reading_s = read_s * (before + tokens)
                chunk_s = fixed_s + (
                    compute_s + unhidden * reading_s
                    if compute_s > reading_s
                    else reading_s + unhidden * compute_s
                )
                backward_s += layers * (self._backward_s[n] + chunk_s)
        if recompute:
            for n, c in recompute:
                if n > self.known_tokens:
                    self._reach(n)
                recompute_s += self.recompute_window_s(n, c)
        return windows, forward_s, backward_s, recompute_s, params * self._optimizer_param_s

    def _reach(self, tokens: int) -> None:
        """Extend every list to index `tokens`; doubling keeps this rare."""
        length = len(self._token_s)
        if tokens < length:
            return
        for values in (
            self._token_s, self._sampled_s, self._window_s, self._recompute_s, self._backward_s,
            self._nothing_s, self._lora_s,
        ):  # fmt: skip
            extend(values, self.known_tokens, max(tokens + 1, 2 * length))
        self._layer_s = self._layers_s()

    def _layers_s(self) -> list[float]:
        """One layer's backward of a sample's first so many tokens: `rectangle_s` of all of them at once."""
        fixed_s, each_s, pair_s, read_s, unhidden = self._backward
        n = np.arange(len(self._backward_s), dtype=np.float64)
        compute_s = n * each_s + pair_s * (n * ((n + 1) * 0.5))
        reading_s = read_s * n
        longer_s, shorter_s = np.maximum(compute_s, reading_s), np.minimum(compute_s, reading_s)
        seconds: list[float] = (self._backward_s + (fixed_s + (longer_s + unhidden * shorter_s))).tolist()
        return seconds

    def rectangle_s(self, layers: int, tokens: int, context: int) -> float:
        """Backward of `tokens` through `layers` layers, as a term of the sum."""
        return layers * (self._backward_s[tokens] + self.curves.backward.seconds(tokens, context))

    def recompute_window_s(self, tokens: int, context: int) -> float:
        """Forward of a window run again, as a term of the sum."""
        return self._recompute_s[tokens] + self.curves.recompute.seconds(tokens, context)

    def _decode_s(self, work: Work) -> float:
        if not work.decode_count:
            return 0.0
        each_s, context_s = self._decode_sequence_s, self._decode_context_s
        return self._decode_fixed_s + work.decode_count * each_s + work.decode_context_tokens * context_s

    def _set_collective_apart(self, parts: dict[str, float], work: Work, passes: tuple[int, ...]) -> None:
        """Move the collectives out of the parts that contain them. Modifies `parts`."""
        forward, backward = self.curves.collective_s, self.curves.backward_collective_s
        if forward is None or backward is None:
            return
        seconds = {
            "forward_pass": sum([extended(forward, n) for n in passes], 0.0),
            "backward": sum([c.layers * extended(backward, c.tokens) for c in work.backward], 0.0),
            "recompute": sum([extended(forward, c.tokens) for c in work.recompute], 0.0),
        }
        bypasses = self.curves.window_collective_s
        if bypasses is not None:
            seconds["adapters"] = extended(bypasses, work.forward_tokens)
            seconds["recompute"] += sum([extended(bypasses, c.tokens) for c in work.recompute], 0.0)
        for name, collective_s in seconds.items():
            parts[name] -= collective_s
        parts["collective"] = sum(seconds.values())


def _coefficients(cost: ChunkCost) -> Coefficients:
    """A plain tuple is unpacked three times as fast as a NamedTuple."""
    fixed_s, token_s, pair_s, read_s, unhidden = cost
    return fixed_s, token_s, pair_s, read_s, unhidden


def _with_chunk(work: Work, context: int, tokens: int) -> Work:
    return work._replace(prefill=(*work.prefill, Chunk(tokens, context)))


def _with_window(work: Work, context: int, tokens: int) -> Work:
    return work._replace(forward=(*work.forward, Chunk(tokens, context)))


def _with_slice(work: Work, job: JobView, layer_tokens: int) -> Work:
    return work._replace(
        backward=work.backward + backward_chunks(job, layer_tokens),
        recompute=work.recompute + recompute_chunks(job, layer_tokens),
    )
