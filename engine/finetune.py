"""Token-level finetuning of one adapter: forward windows, backward slices, optimizer steps.

`sim.core.finetune.Job` decides what is legal and counts, the compile plan what a sample keeps in memory; a
`Trainer` carries out both. It learns what to do from the slices of the plan alone, takes its samples in the
order in which the job drew their lengths, and keeps its own page range, which inference never touches.

Gradients are those of the *sum* of the losses; the optimizer divides them by the labels of all samples of a
step, so that a step is the mean over its tokens however they are spread over samples.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backward import backward_layer
from engine.dropout import Dropout, Dropped, sample_key
from engine.elementwise import rms_norm_backward
from engine.kept import Kept
from engine.kernels.loss import IGNORE_LABEL, linear_cross_entropy
from engine.lora import Adapter, AdapterBank
from engine.model import Batch, Model, Pages, Window
from engine.optimizer import MasterOptimizer, OptimizerSettings
from engine.packing import upload
from engine.placement import Placement
from engine.recall import BackwardWindow, LayerTensors, TrainedLora
from engine.shares import Shares
from engine.shelf import Segments
from sim.compile.plan import CompilePlan
from sim.core.finetune import JobSpec, JobView, backward_chunks


class Sample(NamedTuple):
    """One training sample; `labels[i]` is the token at i, or IGNORE_LABEL, not shifted."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int64]


class SampleFeed:
    """Samples for a job and its trainer: the job draws lengths, the trainer gets the samples they are of."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = iter(samples)
        self._drawn: deque[Sample] = deque()

    def lengths(self) -> Iterator[int]:
        """Tokens of each sample, for `sim.core.finetune.Job`."""
        for sample in self._samples:
            self._drawn.append(sample)
            yield len(sample.tokens)

    def put(self, sample: Sample) -> None:
        """A sample that was drawn elsewhere."""
        self._drawn.append(sample)

    def take(self) -> Sample:
        """The oldest sample that the job has drawn and the trainer has not taken."""
        return self._drawn.popleft()


class ForwardWindow(NamedTuple):
    """A window as the packed batch needs it."""

    tokens: NDArray[np.int32]
    start: int
    at: slice


class StepResult(NamedTuple):
    """An optimizer step; numbers are tensors until somebody reads them."""

    job: str
    step: int
    loss: torch.Tensor
    """Mean over the step's labels."""
    grad_norm: torch.Tensor
    sound: torch.Tensor
    """False when loss, gradient or new weights are not finite, in this step or an earlier one."""
    learning_rate: float
    slot: int
    """The bank's slot of the weights after it, held for whoever publishes them."""


class _Before(NamedTuple):
    """A job as a step left it, when the next is taken."""

    step: int
    masters: Adapter
    optimizer: dict[str, Any]


class Trainer:
    """One job's adapter, activations and optimizer on the device."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        plan: CompilePlan,
        model: Model,
        pages: Pages,
        blocks: range,
        bank: AdapterBank,
        adapter: Adapter,
        placements: Mapping[str, Placement],
        feed: SampleFeed,
        optimizer: OptimizerSettings,
        seed: int = 0,
    ) -> None:
        """`adapter`, this rank's part as `placements` have it, is copied as the masters; `blocks` are the job's
        own pages, for `plan.seq_tokens` tokens; `seed` is the dropout's."""
        assert (plan.mode, plan.order, plan.layers) == (spec.memory, spec.order, spec.layers)
        assert plan.tp == model.group.size
        self.spec = spec
        self.plan = plan
        self._model = model
        self._pages = pages
        self._layer_pages = pages.layers()
        self._bank = bank
        self._feed = feed
        self.table: NDArray[np.int32] = np.arange(blocks.start, blocks.stop, dtype=np.int32)
        """Blocks of the sample, as in `BlockTables.table`."""
        device = model.device
        self._table = torch.from_numpy(self.table).to(device)
        self.max_tokens = len(blocks) * pages.k.shape[2]
        assert self.max_tokens == plan.seq_tokens

        self.masters = _map(adapter, lambda t: t.to(device, model.compute, copy=True))
        grads = _map(self.masters, torch.zeros_like)
        tensors = [*self.masters.tensors()], [*grads.tensors()]
        self._shares: Shares | None = None
        """What other ranks have of the tensors."""
        if model.group.size > 1:
            self._shares = Shares(placements, model.group, self.masters.targets)
        self.optimizer = MasterOptimizer(optimizer, *tensors, self._shares)
        self._placements = placements
        self.slot = bank.put(self.masters, placements)
        """The bank's slot of the newest weights; training uses it, requests after it is published."""
        self._shelves = {target: bank.shelf(placements[target]) for target in self.masters.targets}
        self._grads = grads
        self._layer_grads = {
            target: [
                (da, db.T) for da, db in zip(grads.a[target].unbind(), grads.b[target].unbind(), strict=True)
            ]
            for target in grads.targets
        }

        shape = model.config.shape
        self._kept = None if plan.mode == "recompute" else self._new_kept()
        size = (plan.accumulator_layers, self.max_tokens, *pages.k.shape[3:])
        self._dk, self._dv = (torch.zeros(size, dtype=model.compute, device=device) for _ in "kv")
        self._layer_sums = list(zip(self._dk.unbind(), self._dv.unbind(), strict=True))
        self._dx = torch.empty((self.max_tokens, shape.hidden), dtype=model.dtype, device=device)
        self._loss = torch.zeros((), dtype=model.compute, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        assert self.held_bytes == plan.held_bytes
        self._sound = torch.ones((), dtype=torch.bool, device=device)
        self._told = 0
        """The last step whose result is out."""
        self._before: _Before | None = None
        """Its weights and moments, if the next step has been taken meanwhile."""

        self._seed = seed
        self._dropout: Dropout | None = None
        self._samples = 0
        """Begun since the last step."""
        self._sample: Sample | None = None
        self._labels = np.zeros(0, np.int64)
        self._forward_tokens = 0
        self._backward_layer_tokens = 0

    @property
    def held_bytes(self) -> int:
        """What a sample has between slices, its pages included."""
        k = self._pages.k
        pages = 2 * k.shape[0] * self.max_tokens * k[0, 0, 0].nbytes
        kept = 0 if self._kept is None else self._kept.nbytes
        return pages + kept + self._dk.nbytes + self._dv.nbytes + self._dx.nbytes

    def adapter(self) -> Adapter:
        """The masters after a step whose result is out, although the next may have been taken meanwhile; whole, not
        a copy. A collective."""
        masters = self.masters if self._before is None else self._before.masters
        return masters if self._shares is None else self._shares.whole(masters)

    def optimizer_state(self) -> dict[str, Any]:
        """What `restore` needs besides `adapter`. A collective."""
        return self.optimizer.state(None if self._before is None else self._before.optimizer)

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Go on after `steps` steps."""
        self.optimizer.restore(state, steps)
        self._told = steps

    def _new_kept(self) -> Kept:
        return Kept(self.plan, self._model.config.shape.head_dim, self._model.dtype, self._model.device)

    # Forward

    def next_window(self, tokens: int) -> ForwardWindow:
        """The next `tokens` of the sample, which the coming forward computes."""
        if self._sample is None:
            self._start_sample(self._feed.take())
        assert self._sample is not None
        start = self._forward_tokens
        self._forward_tokens = start + tokens
        at = slice(start, start + tokens)
        return ForwardWindow(self._sample.tokens[at], start, at)

    def keep(self, window: ForwardWindow, rows: slice) -> list[Window]:
        """What the model is to keep of a window that lies at `rows` of the batch."""
        return [] if self._kept is None else [Window(self._kept, rows, window.at)]

    def dropped(self, position: int, rows: slice) -> list[Dropped]:
        """What drops numbers of the window from `position` on, which lies at `rows` of a batch."""
        return [] if self._dropout is None else [Dropped(self._dropout, rows, position)]

    def loss(self, window: ForwardWindow, x: torch.Tensor) -> None:
        """Add the loss of a window whose last residual stream is x [N, E], and start its gradient."""
        labels = upload(torch.from_numpy(self._labels[window.at]), x.device)
        model = self._model
        loss, count, d_hidden = linear_cross_entropy(
            model.final_norm(x),
            model.weights.head,
            labels,
            chunk_tokens=self.plan.loss_chunk_tokens,
            group=model.group,
            first_row=model.vocab.start,
        )
        self._loss += loss
        self._count += count
        dx = rms_norm_backward(d_hidden, x, model.weights.norm, model.config.norm_eps)
        self._dx[window.at] = dx

    # Backward

    def backward(self, layer_tokens: int) -> None:
        """The next `layer_tokens` of the sample's backward, from where it stands."""
        assert self._sample is not None
        spec, length = self.spec, len(self._sample.tokens)
        view = JobView(
            spec.id,
            spec.layers,
            spec.order,
            spec.memory,
            spec.optimizer_params,
            length,
            length,
            self._backward_layer_tokens,
            False,
        )
        for chunk in backward_chunks(view, layer_tokens):
            if spec.order == "window_major":
                self._window(chunk.context, chunk.tokens)
            else:
                self._rectangle(chunk.layers, chunk.context, chunk.tokens, length)
            self._backward_layer_tokens += chunk.layer_tokens
        if self._backward_layer_tokens == length * spec.layers:
            self._sample = None

    def _window(self, start: int, tokens: int) -> None:
        """One window through all layers; where its forward was not kept, in pieces that are run again first."""
        lora, piece = self._lora(), self.plan.held_tokens
        kept = self._kept or self._new_kept()
        for end in range(start + tokens, start, -piece):
            first = max(start, end - piece)
            at = slice(first, end)
            if self._kept is None:
                at = slice(0, end - first)
                self._recompute(first, Window(kept, at, at))
            window = BackwardWindow(self._model, lora, self._dx, at, first)
            for layer in reversed(range(self.spec.layers)):
                self._layer(layer, kept, window)

    def _rectangle(self, layers: int, start: int, tokens: int, length: int) -> None:
        """The same tokens in each of the next `layers` layers."""
        assert self._kept is not None
        top = self.spec.layers - 1 - self._backward_layer_tokens // length
        at = slice(start, start + tokens)
        window = BackwardWindow(self._model, self._lora(), self._dx, at, start)
        for layer in range(top, top - layers, -1):
            if start + tokens == length:
                self._dk.zero_()
                self._dv.zero_()
            self._layer(layer, self._kept, window)

    def _layer(self, layer: int, kept: Kept, window: BackwardWindow) -> None:
        """A window through one layer."""
        pages = self._layer_pages[layer]
        saved = LayerTensors(self._model, self.plan, layer, window, kept, pages, self._table)
        dk = dv = None
        if saved.wants("q", "k", "v"):
            # One pair for every layer that wants it, the last for the highest, or one for all.
            dk, dv = self._layer_sums[max(0, layer - self.spec.layers + len(self._layer_sums))]
        backward_layer(self._model, saved, dk, dv)

    def _recompute(self, start: int, window: Window) -> None:
        """Run a window's forward again, alone; its keys and values are still in the pages."""
        assert self._sample is not None
        model, tokens = self._model, window.at.stop
        ids = upload(torch.from_numpy(self._sample.tokens[start : start + tokens]), model.device)
        ends = torch.zeros(2, dtype=torch.int32, device=model.device)
        ends[1:].fill_(tokens)
        lora = self._lora()
        batch = Batch(
            tokens=ids,
            positions=torch.arange(start, start + tokens, dtype=torch.int32, device=model.device),
            slots=None,
            block_tables=self._table[None],
            query_start=ends,
            context_lens=torch.full((1,), start, dtype=torch.int32, device=model.device),
            decodes=0,
            max_keys=start + tokens,
            lora=self._bank.batch(
                Segments(ends, lora.segment_slot),
                np.array([0, tokens], np.int32),
                np.array([self.slot], np.int32),
            )._replace(dropped=self.dropped(start, window.rows)),
        )
        model.forward(batch, self._pages, [window])

    def _lora(self) -> TrainedLora:
        slot = torch.full((1,), self.slot, dtype=torch.int32, device=self._model.device)
        return TrainedLora(
            shelves=self._shelves,
            scales=self._bank.scales,
            slot=self.slot,
            segment_slot=slot,
            scale=self._grads.scale,
            grads=self._layer_grads,
            dropout=self._dropout,
        )

    # Steps

    def step(self) -> StepResult:
        """Update the masters and put them into a slot of their own; `slot` is that one from now on.

        A step that is not sound leaves the masters as they were, and so do all after it: the host learns of
        it later, perhaps with the next step under way, and finds the last good weights.
        """
        rate = self.optimizer.settings.rate(self.optimizer.steps)
        masters = [*self.masters.tensors()]
        before_step = _map(self.masters, torch.clone)
        if self._told < self.optimizer.steps:
            self._before = _Before(self.optimizer.steps, before_step, self.optimizer.copied_state())
        norm = self.optimizer.step(self._count)
        loss = self._loss / self._count
        largest = torch.stack(torch._foreach_norm(masters, math.inf)).sum()
        finite = torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(largest)
        # All ranks decide the same: what one of them cannot use, none does.
        self._sound &= self._model.group.all_reduce((~finite).to(loss.dtype)) == 0
        for master, old in zip(masters, before_step.tensors(), strict=True):
            torch.where(self._sound, master, old, out=master)
        self._loss.zero_()
        self._count.zero_()
        self._samples = 0
        before, self.slot = self.slot, self._bank.put(self.masters, self._placements)
        self._bank.drop(before)
        published = self._bank.hold(self.slot)
        return StepResult(
            self.spec.id, self.optimizer.steps, loss, norm, self._sound.clone(), rate, published
        )

    def told(self, step: int) -> None:
        """The result of this step is out: `adapter` and `optimizer_state` are what it left."""
        self._told = step
        if self._before is not None and self._before.step < step:
            self._before = None

    def stand(self, sample: Sample, forward_tokens: int, backward_layer_tokens: int, fresh: bool) -> None:
        """Be so far in `sample`, as if all before had been computed. For timing: what comes out means nothing.

        `fresh` draws the gradient at hand anew, which otherwise goes through the same layers time and again.
        """
        if fresh or sample is not self._sample:
            self._start_sample(sample)
            self._dx.normal_()
        self._forward_tokens, self._backward_layer_tokens = forward_tokens, backward_layer_tokens

    def _start_sample(self, sample: Sample) -> None:
        self._sample = sample
        length = len(sample.tokens)
        if length > self.max_tokens:
            raise ValueError(
                f"job {self.spec.id}: samples may have {self.max_tokens} tokens, got one of {length}"
            )
        if self.masters.dropout:
            key = sample_key(self._seed, self.optimizer.steps, self._samples)
            self._dropout = Dropout(self.masters.dropout, key, self.masters.targets, self._model.group)
        self._samples += 1
        self._labels = np.append(sample.labels[1:], IGNORE_LABEL)
        self._forward_tokens = self._backward_layer_tokens = 0
        self._dk.zero_()
        self._dv.zero_()


def _map(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    a, b = ({target: change(t) for target, t in tensors.items()} for tensors in (adapter.a, adapter.b))
    return replace(adapter, a=a, b=b)
