"""Seconds of an iteration from `Curves`, and the scheduler's inverse questions.

The non-obvious idea is the order of additions. Each inverse searches on the very expression that
`iteration_s` evaluates, term by term, so its answer is exact in floating point and not only up to
rounding: with the answer the work fits the budget, with one token more it does not. Every term is
monotone in the count asked for, and rounded addition keeps that.

With a = prefill + decode + logits + adapters (inference) and b = forward + loss + backward + recompute +
optimizer (finetuning), T and F the inference and window tokens:

    fused      gpu = token_s[T + F] + a + b
    overlap    x = token_s[T] + a, y = token_s[F] + b, gpu = max(x, y) + kappa min(x, y)
    iteration  gpu + host, or max(gpu, host) when the loop plans one iteration ahead

The search is Newton's, since seconds are nearly linear in tokens, within a bracket that decides. A step that
would leave the bracket and every fourth one are bisections, since `token_s` is a staircase in places. With a
start near the answer that is 3 evaluations where bisection alone takes 12.
"""

from __future__ import annotations

from sim.core.finetune import JobView
from sim.core.work import Work
from sim.cost.backward import largest_backward
from sim.cost.curves import Curves, extend, extended

Terms = tuple[int, float, float, float, int, float, float, float, float]


class IterationCost:
    """A `Predictor` over `curves`. Its lists grow on demand; nothing else changes."""

    def __init__(self, curves: Curves, lookahead: int = 0) -> None:
        self.curves = curves
        self.lookahead = lookahead
        self.known_tokens = len(curves.token_s) - 1
        """Passes of more tokens are extended by the slope of the curves' upper half."""
        self.extrapolations = 0
        """Questions so far whose work had a pass beyond `known_tokens`."""
        self._token_s = list(curves.token_s)
        self._sampled_s = list(curves.sampled_s)
        fixed_s, token_s = curves.lora_fixed_s, curves.lora_token_s
        self._window_s = [s + fixed_s + token_s * n if n else 0.0 for n, s in enumerate(curves.loss_s)]
        self._recompute_s = list(curves.recompute_s)
        self._backward_s = list(curves.backward_layer_s)
        self._prefill = tuple(curves.prefill)
        self._forward = tuple(curves.forward)
        self._recompute = tuple(curves.recompute)
        self._backward = tuple(curves.backward)
        self._decode_fixed_s, self._decode_sequence_s, self._decode_context_s = curves.decode
        self._host_s = curves.host_s
        self._kappa = curves.overlap_contention
        self._last_window_tokens = 1
        """The last `largest_forward` that the budget decided, where the next search starts: successive
        windows are alike. Only the number of steps depends on it."""

    @property
    def region(self) -> dict[str, tuple[float, float]]:
        """What the curves were made for: name of a count (`sim.metrics`) -> least and largest value."""
        return {"pass_tokens": (0.0, float(self.known_tokens))}

    def iteration_s(self, work: Work) -> float:
        """Seconds of one iteration."""
        prefill, decodes, context, sampled, forward, backward, recompute, params, adapters, overlap = work
        if forward or backward or prefill or recompute or params or decodes > self.known_tokens:
            if overlap:
                gpu_s = self._gpu_s(work)
            else:
                # As `_gpu_s` does it; written out because this is the common case.
                tokens, p, rest, lora_token, windows, f, b, r, optimizer = self._terms(work)
                gpu_s = (self._token_s[tokens + windows] + (p + rest + lora_token * tokens)) + (
                    (f + self._window_s[windows]) + ((b + r) + optimizer)
                )
        elif decodes:
            rest_s = (
                self._decode_fixed_s + decodes * self._decode_sequence_s + context * self._decode_context_s
            ) + self._sampled_s[sampled]
            if adapters:
                curves = self.curves
                rest_s += curves.lora_fixed_s + curves.adapter_s * adapters
                rest_s += curves.lora_token_s * decodes
            gpu_s = self._token_s[decodes] + rest_s
        else:
            return self._host_s
        if self.lookahead:
            return gpu_s if gpu_s > self._host_s else self._host_s
        return gpu_s + self._host_s

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by part. `collective` is missing where the curves do not know it apart."""
        curves = self.curves
        tokens, prefill_s, _, lora_token_s, windows, forward_s, backward_s, recompute_s, optimizer_s = (
            self._terms(work)
        )
        lora_s = curves.lora_fixed_s + curves.lora_token_s * windows if windows else 0.0
        passes = (tokens, windows) if work.overlap else (tokens + windows,)
        parts = {
            "forward_pass": sum([self._token_s[n] for n in passes]),
            "attention_prefill": prefill_s,
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
                curves.lora_fixed_s + curves.adapter_s * work.adapters + lora_token_s * tokens
            )
        parts["overlap_saving"] = 0.0
        if work.overlap:
            alone = work._replace(overlap=False)
            shorter_s = min(self._gpu_s(alone.inference), self._gpu_s(alone.finetuning))
            parts["overlap_saving"] = (self._kappa - 1.0) * shorter_s
        parts["host"] = self.iteration_s(work) - self._gpu_s(work)
        self._set_collective_apart(parts, work, passes)
        return parts

    def extrapolates(self, work: Work) -> bool:
        """Whether a pass of `work` has more tokens than the curves were made for."""
        fused = work.decode_count + work.prefill_tokens + work.forward_tokens
        chunks = [fused, *[c.tokens for c in work.backward], *[c.tokens for c in work.recompute]]
        return max(chunks) > self.known_tokens

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        """Most tokens (0..max_tokens) of one more prefill chunk; rows of logits stay as `work` says."""
        base, p, rest, lora_token, windows, f, b, r, optimizer = self._terms(work)
        top = base + max_tokens
        if top + windows >= len(self._token_s):
            self._reach(top + windows)
        token_s, kappa = self._token_s, self._kappa
        fixed_s, each_s, pair_s, read_s, unhidden = self._prefill
        finetuning_s = (f + self._window_s[windows]) + ((b + r) + optimizer)
        overlap, host_s = work.overlap, self._host_s
        if overlap:
            finetuning_s = token_s[windows] + finetuning_s
        if self.lookahead:
            if host_s > budget_s:
                return 0
            host_s = 0.0
        shared = 0 if overlap else windows
        # Most chunks fit whole.
        low, high, n, step = 0, max_tokens + 1, max_tokens, 0
        while low + 1 < high:
            compute_s = n * each_s + pair_s * (n * (context + (n + 1) * 0.5))
            reading_s = read_s * (context + n)
            chunk_s = fixed_s + (
                compute_s + unhidden * reading_s
                if compute_s > reading_s
                else reading_s + unhidden * compute_s
            )
            x = base + n
            gpu_s = token_s[x + shared] + ((p + chunk_s) + rest + lora_token * x)
            if not overlap:
                gpu_s += finetuning_s
            elif gpu_s > finetuning_s:
                gpu_s += kappa * finetuning_s
            else:
                gpu_s = finetuning_s + kappa * gpu_s
            over_s = (gpu_s + host_s) - budget_s
            if over_s <= 0.0:
                low = n
            else:
                high = n
            if step == 0:
                slope_s = token_s[x + shared] - token_s[x + shared - 1] + lora_token + each_s
                slope_s += pair_s * (context + n)
            step += 1
            if step & 3 and -slope_s * (high - low) < over_s < slope_s * (high - low):
                n -= int(over_s / slope_s)
                n += (n == low) - (n == high)
            else:
                n = (low + high) >> 1
        return low

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        """Most tokens (0..max_tokens) of one more forward window."""
        tokens, p, rest, lora_token, base, f, b, r, optimizer = self._terms(work)
        if tokens + base + max_tokens >= len(self._token_s):
            self._reach(tokens + base + max_tokens)
        token_s, window_s, kappa = self._token_s, self._window_s, self._kappa
        fixed_s, each_s, pair_s, read_s, unhidden = self._forward
        inference_s = p + rest + lora_token * tokens
        finetuning_s = (b + r) + optimizer
        overlap, host_s = work.overlap, self._host_s
        if overlap:
            inference_s = token_s[tokens] + inference_s
        if self.lookahead:
            if host_s > budget_s:
                return 0
            host_s = 0.0
        low, high, step = 0, max_tokens + 1, 0
        n = self._last_window_tokens if self._last_window_tokens < max_tokens else max_tokens
        while low + 1 < high:
            compute_s = n * each_s + pair_s * (n * (context + (n + 1) * 0.5))
            reading_s = read_s * (context + n)
            chunk_s = fixed_s + (
                compute_s + unhidden * reading_s
                if compute_s > reading_s
                else reading_s + unhidden * compute_s
            )
            x = base + n
            gpu_s = ((f + chunk_s) + window_s[x]) + finetuning_s
            if not overlap:
                gpu_s = (token_s[tokens + x] + inference_s) + gpu_s
            else:
                gpu_s = token_s[x] + gpu_s
                if gpu_s > inference_s:
                    gpu_s += kappa * inference_s
                else:
                    gpu_s = inference_s + kappa * gpu_s
            over_s = (gpu_s + host_s) - budget_s
            if over_s <= 0.0:
                low = n
            else:
                high = n
            if step == 0:
                slope_s = token_s[tokens + x] - token_s[tokens + x - 1] + window_s[x] - window_s[x - 1]
                slope_s += each_s + pair_s * (context + n)
            step += 1
            if step & 3 and -slope_s * (high - low) < over_s < slope_s * (high - low):
                n -= int(over_s / slope_s)
                n += (n == low) - (n == high)
            else:
                n = (low + high) >> 1
        if 0 < low < max_tokens:
            self._last_window_tokens = low
        return low

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> int:
        """Most layer-tokens of `job`'s backward that continue from where it stands.

        Layer-major: finishes the layer begun, adds whole layers by division, then part of the next.
        Window-major: the widest window, in tokens times layers.
        """
        return largest_backward(self, work, job, budget_s)

    def _gpu_s(self, work: Work) -> float:
        tokens, p, rest, lora_token, windows, f, b, r, optimizer = self._terms(work)
        inference_s = p + rest + lora_token * tokens
        finetuning_s = (f + self._window_s[windows]) + ((b + r) + optimizer)
        if not work[9]:
            return (self._token_s[tokens + windows] + inference_s) + finetuning_s
        inference_s = self._token_s[tokens] + inference_s
        finetuning_s = self._token_s[windows] + finetuning_s
        if inference_s > finetuning_s:
            return inference_s + self._kappa * finetuning_s
        return finetuning_s + self._kappa * inference_s

    def _terms(self, work: Work) -> Terms:
        """Tokens T, prefill, decode + logits + adapters, LoRA per token; tokens F, forward, backward,
        recompute, optimizer; seconds unless tokens. Makes sure that the lists reach far enough."""
        prefill, decodes, context, sampled, forward, backward, recompute, params, adapters, _ = work
        curves = self.curves
        tokens, windows = decodes, 0
        prefill_s = forward_s = backward_s = recompute_s = rest_s = lora_token_s = 0.0
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
        largest = tokens + windows
        if backward:
            fixed_s, each_s, pair_s, read_s, unhidden = self._backward
            backward_s = curves.backward_start_s
            for layers, n, c in backward:
                if n > largest:
                    largest = n
                if n >= len(self._token_s):
                    self._reach(n)
                compute_s = n * each_s + pair_s * (n * (c + (n + 1) * 0.5))
                reading_s = read_s * (c + n)
                chunk_s = fixed_s + (
                    compute_s + unhidden * reading_s
                    if compute_s > reading_s
                    else reading_s + unhidden * compute_s
                )
                backward_s += layers * (self._backward_s[n] + chunk_s)
        if recompute:
            fixed_s, each_s, pair_s, read_s, unhidden = self._recompute
            for n, c in recompute:
                if n > largest:
                    largest = n
                if n >= len(self._token_s):
                    self._reach(n)
                compute_s = n * each_s + pair_s * (n * (c + (n + 1) * 0.5))
                reading_s = read_s * (c + n)
                recompute_s += self._recompute_s[n] + (
                    fixed_s
                    + (
                        compute_s + unhidden * reading_s
                        if compute_s > reading_s
                        else reading_s + unhidden * compute_s
                    )
                )
        if largest > self.known_tokens:
            self.extrapolations += 1
            if largest >= len(self._token_s):
                self._reach(largest)
        rest_s += self._sampled_s[sampled]
        if adapters:
            rest_s += curves.lora_fixed_s + curves.adapter_s * adapters
            lora_token_s = curves.lora_token_s
        optimizer_s = params * curves.optimizer_param_s
        return (
            tokens, prefill_s, rest_s, lora_token_s, windows, forward_s, backward_s, recompute_s, optimizer_s
        )  # fmt: skip

    def _reach(self, tokens: int) -> None:
        """Extend every list to index `tokens`; doubling keeps this rare."""
        length = len(self._token_s)
        if tokens < length:
            return
        for values in (
            self._token_s, self._sampled_s, self._window_s, self._recompute_s, self._backward_s
        ):  # fmt: skip
            extend(values, self.known_tokens, max(tokens + 1, 2 * length))

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
        """Move the all-reduces out of the parts that contain them. Modifies `parts`."""
        forward, backward = self.curves.collective_s, self.curves.backward_collective_s
        if forward is None or backward is None:
            return
        seconds = {
            "forward_pass": sum([extended(forward, n) for n in passes]),
            "backward": sum([c.layers * extended(backward, c.tokens) for c in work.backward]),
            "recompute": sum([extended(forward, c.tokens) for c in work.recompute]),
        }
        for name, collective_s in seconds.items():
            parts[name] -= collective_s
        parts["collective"] = sum(seconds.values())
