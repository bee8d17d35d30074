"""Finetuning progress: samples, windows, layers, accumulation, optimizer steps, versions.

A sample of L tokens goes forward left to right in windows; then backward, whose position is counted
in layer-tokens (one token through the backward of one layer), L * layers of them:

- `layer_major`: all tokens of the last layer from right to left, then the layer below. A slice may
  start and end anywhere.
- `window_major`: a window at the right end through all layers, then the next window to its left. A
  slice is a whole window, so its size is a multiple of `layers`. With `memory="recompute"` the
  window's forward is run again first.

After `accumulation` samples an optimizer step is due, and only then the next sample may start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sim.core.work import Chunk, LayerChunk

_new = tuple.__new__

ORDERS = ("layer_major", "window_major")
MEMORIES = ("stash", "recompute")
AUTO = "auto"
"""What a config may say instead: the compile plan and the free memory choose one of MEMORIES."""
LOSS_CHUNK_TOKENS = 512
"""Tokens of a window whose logits exist at a time: what plans count, the engine runs and cost models charge for."""


class Forward(NamedTuple):
    """The next `tokens` of the job's sample, forward."""

    job: str
    tokens: int


class Backward(NamedTuple):
    """The next `layer_tokens` of the job's sample, backward."""

    job: str
    layer_tokens: int


class Step(NamedTuple):
    """The optimizer step that is due; publishes the adapter's next version."""

    job: str


Slice = Forward | Backward | Step


class IllegalSlice(ValueError):
    """A finetuning slice that does not follow from where its job stands."""


class JobView(NamedTuple):
    """Where one job stands; what policies see of it."""

    id: str
    layers: int
    order: str
    memory: str
    optimizer_params: int
    sample_tokens: int
    forward_tokens: int
    """Tokens of the sample whose forward is done."""
    backward_layer_tokens: int
    """Layer-tokens of the sample whose backward is done."""
    step_due: bool

    @property
    def forward_left(self) -> int:
        return 0 if self.step_due else self.sample_tokens - self.forward_tokens

    @property
    def backward_left(self) -> int:
        """Layer-tokens to go once the forward is done."""
        return 0 if self.step_due else self.sample_tokens * self.layers - self.backward_layer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One finetuning job, without its data."""

    id: str = "job"
    layers: int
    optimizer_params: int
    """Trainable parameters updated by a step."""
    accumulation: int = 8
    weight: float = 1.0
    """Share of the finetuning work when several jobs are active."""
    start_s: float = 0.0
    order: str = "layer_major"
    memory: str = "stash"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.optimizer_params < 1 or self.accumulation < 1:
            raise ValueError(
                f"finetune job {self.id}: layers, optimizer_params and accumulation must be at least 1, "
                f"got {self.layers}, {self.optimizer_params}, {self.accumulation}"
            )
        if not self.weight > 0:
            raise ValueError(f"finetune job {self.id}: weight must be above 0, got {self.weight}")
        if not self.start_s >= 0:
            raise ValueError(f"finetune job {self.id}: start_s must be at least 0, got {self.start_s}")
        if self.order not in ORDERS:
            raise ValueError(f"finetune job {self.id}: order must be one of {ORDERS}, got {self.order!r}")
        if self.memory not in MEMORIES:
            raise ValueError(f"finetune job {self.id}: memory must be one of {MEMORIES}, got {self.memory!r}")
        if self.memory == "recompute" and self.order != "window_major":
            raise ValueError(
                f"finetune job {self.id}: memory=recompute needs order=window_major, got {self.order}"
            )


def backward_chunks(job: JobView, layer_tokens: int) -> tuple[LayerChunk, ...]:
    """The rectangles that the next `layer_tokens` of `job`'s backward consist of, in order."""
    _, layers, order, _, _, length, _, done, _ = job
    if order == "window_major":
        tokens = layer_tokens // layers
        return (LayerChunk(layers, tokens, length - done // layers - tokens),)
    chunks: tuple[LayerChunk, ...] = ()
    into_layer = done % length
    if into_layer:
        tokens = length - into_layer
        if layer_tokens <= tokens:
            return (_new(LayerChunk, (1, layer_tokens, tokens - layer_tokens)),)
        chunks = (_new(LayerChunk, (1, tokens, 0)),)
        layer_tokens -= tokens
    if layer_tokens >= length:
        whole = layer_tokens // length
        chunks += (_new(LayerChunk, (whole, length, 0)),)
        layer_tokens -= whole * length
    if layer_tokens:
        chunks += (_new(LayerChunk, (1, layer_tokens, length - layer_tokens)),)
    return chunks


def recompute_chunks(job: JobView, layer_tokens: int) -> tuple[Chunk, ...]:
    """The windows whose forward must be run again for the next `layer_tokens` of backward."""
    if job.memory == "stash":
        return ()
    return tuple(Chunk(c.tokens, c.context) for c in backward_chunks(job, layer_tokens))


def after(job: JobView, piece: Slice) -> JobView:
    """Where `job` stands after one slice, as far as its present sample goes.

    Raises IllegalSlice unless the slice follows from where it stands. Several slices of one job may share an
    iteration as long as they stay within one sample (or are the step that its last slice makes due, which the
    loop cannot know before: so a step comes alone or first).
    """
    id, layers, order, memory, params, length, forward, backward, step_due = job
    if type(piece) is Step:
        if not step_due:
            raise IllegalSlice(f"job {id}: no optimizer step is due")
    elif step_due:
        raise IllegalSlice(f"job {id}: the optimizer step is due before {piece}")
    elif type(piece) is Forward:
        tokens, left = piece.tokens, length - forward
        if not 1 <= tokens <= left:
            raise IllegalSlice(f"job {id}: forward must be 1..{left} tokens, got {tokens}")
        forward += tokens
    elif type(piece) is Backward:
        if forward < length:
            raise IllegalSlice(f"job {id}: backward before the forward is done")
        layer_tokens, left = piece.layer_tokens, length * layers - backward
        if not 1 <= layer_tokens <= left:
            raise IllegalSlice(f"job {id}: backward must be 1..{left} layer-tokens, got {layer_tokens}")
        if order == "window_major" and layer_tokens % layers:
            raise IllegalSlice(
                f"job {id}: a window-major slice is a multiple of {layers} layer-tokens, got {layer_tokens}"
            )
        backward += layer_tokens
    else:
        raise IllegalSlice(f"job {id}: not a finetuning slice: {piece!r}")
    return _new(JobView, (id, layers, order, memory, params, length, forward, backward, False))


class Job:
    """Mutable progress of one job. It moves by `advance`, or by `take` where `after` has been asked already."""

    def __init__(self, spec: JobSpec, sample_tokens: Iterator[int]) -> None:
        """`sample_tokens` yields the length of each sample in training order; it may be endless."""
        self.spec = spec
        self._lengths = sample_tokens
        self.accumulated_samples = 0
        self.accumulated_tokens = 0
        self.steps = 0
        self.virtual_s = 0.0
        """Work received over weight, in token passes; the job with the least is served first."""
        self.given_up = False
        """Its step failed: nothing of it counts any more, in this run or a later one."""
        self._data_ended = False
        self._next_sample()

    @property
    def finished(self) -> bool:
        return self.given_up or (self._data_ended and self.accumulated_samples == 0)

    @property
    def sample_tokens(self) -> int:
        return self._view.sample_tokens

    def view(self) -> JobView:
        """Where the job stands."""
        return self._view

    def stand(self, view: JobView, *, accumulated_samples: int, accumulated_tokens: int, steps: int) -> None:
        """Go on from where another run of the job stood; the present sample is the one of `view`."""
        self._view = view
        self.accumulated_samples = accumulated_samples
        self.accumulated_tokens = accumulated_tokens
        self.steps = steps

    def advance(self, piece: Slice) -> None:
        """Take one slice. Raises IllegalSlice, and then nothing has changed."""
        self.take(piece, after(self._view, piece))

    def take(self, piece: Slice, view: JobView) -> None:
        """Take one slice, after which the job stands at `view`, as `after` says."""
        self._view = view
        if type(piece) is Forward:
            self.virtual_s += piece.tokens / self.spec.weight
        elif type(piece) is Backward:
            spec = self.spec
            # A backward pass of a frozen linear layer costs what its forward costs, and the
            # attention's twice that: count a token's backward as one pass.
            self.virtual_s += piece.layer_tokens / (spec.layers * spec.weight)
            if view.backward_layer_tokens == view.sample_tokens * spec.layers:
                self.accumulated_samples += 1
                self.accumulated_tokens += view.sample_tokens
                self._next_sample()
        else:
            self.steps += 1
            self.accumulated_samples = self.accumulated_tokens = 0

    def _next_sample(self) -> None:
        spec = self.spec
        sample_tokens = next(self._lengths, 0)
        if sample_tokens == 0:
            self._data_ended = True
        due = self.accumulated_samples == spec.accumulation or (
            self._data_ended and self.accumulated_samples > 0
        )
        self._view = JobView(
            spec.id, spec.layers, spec.order, spec.memory, spec.optimizer_params, sample_tokens, 0, 0, due
        )
