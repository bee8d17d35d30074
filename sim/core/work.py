"""`Work`: the shape of one iteration in plain counts.

It is the only thing that a cost model sees. A profile row is Work + measured seconds, a cost model
maps Work to seconds, an iteration row is Work + predicted + actual. Inference and finetuning share
it because they share the iteration.
"""

from __future__ import annotations

from typing import NamedTuple


class Chunk(NamedTuple):
    """`tokens` consecutive tokens of one sequence computed after `context` cached ones, all layers."""

    tokens: int
    context: int

    @property
    def attention_pairs(self) -> float:
        """Query-key pairs under the causal mask: every token sees the context and itself."""
        return self.tokens * (self.context + (self.tokens + 1) / 2)


class LayerChunk(NamedTuple):
    """The same `tokens` after `context` in each of `layers` layers: a rectangle of backward work."""

    layers: int
    tokens: int
    context: int

    @property
    def layer_tokens(self) -> int:
        return self.layers * self.tokens

    @property
    def attention_pairs(self) -> float:
        """Query-key pairs, summed over the layers."""
        return self.layers * self.tokens * (self.context + (self.tokens + 1) / 2)


class Work(NamedTuple):
    """One iteration of one pipeline. Counts are of the whole replica, before tensor parallelism."""

    prefill: tuple[Chunk, ...] = ()
    decode_count: int = 0
    decode_context_tokens: int = 0
    """Cached tokens read by the decodes, summed; the new token is not among them."""
    sampled_tokens: int = 0
    """Rows of logits computed for inference: decodes plus prefills that end here."""
    forward: tuple[Chunk, ...] = ()
    """Finetuning forward windows, with loss and its gradient at the last hidden state."""
    backward: tuple[LayerChunk, ...] = ()
    recompute: tuple[Chunk, ...] = ()
    """Windows whose forward is run again, without loss, because their activations were not kept."""
    optimizer_params: int = 0
    """Adapter parameters updated by the optimizer steps of this iteration."""
    adapters: int = 0
    """Distinct adapters among the inference tokens; the base model alone is not one."""
    overlap: bool = False
    """Windows and backward run beside inference on a second stream instead of inside its kernels, after the
    optimizer steps."""

    @property
    def prefill_tokens(self) -> int:
        return sum(c.tokens for c in self.prefill)

    @property
    def forward_tokens(self) -> int:
        return sum(c.tokens for c in self.forward)

    @property
    def recompute_tokens(self) -> int:
        return sum(c.tokens for c in self.recompute)

    @property
    def backward_layer_tokens(self) -> int:
        return sum(c.layers * c.tokens for c in self.backward)

    @property
    def inference(self) -> Work:
        """This work without its finetuning part."""
        return self._replace(forward=(), backward=(), recompute=(), optimizer_params=0, overlap=False)

    @property
    def finetuning(self) -> Work:
        """This work without its inference part."""
        return self._replace(
            prefill=(), decode_count=0, decode_context_tokens=0, sampled_tokens=0, adapters=0
        )
