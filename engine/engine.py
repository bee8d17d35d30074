"""The device side of a pipeline: carries out plans, and gives the tokens that come out.

The engine decides nothing. It follows the loop through the same things that everybody sees: requests as they
arrive, plans as they are launched, and the ids of requests that have ended. Tokens stay on the device between
iterations: a decode reads its input from where the last iteration wrote it, so the next plan can be launched
before the host has seen a token.

An iteration is: the optimizer steps of the plan, one fused forward of inference and finetuning windows, the
loss of the windows, the sampled tokens, the backward slices. Where a plan asks for two streams (`overlap`),
windows are a forward of their own: it and the backward slices run beside inference where there is a second
stream (`engine.launching`), and after it on one, which takes the sum of both and gives the same numbers.
Optimizer steps always come first: they may move the bank that inference reads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.dropout import Dropped
from engine.evaluation import mean_loss
from engine.finetune import ForwardWindow, Sample, StepResult, Trainer
from engine.graphs import Decodes, Graphs
from engine.launching import Launching
from engine.lora import Adapter, AdapterBank
from engine.model import Batch, Model, Pages, Window
from engine.packing import Piece, Staging, pack
from engine.sampling import LOST, Sampling, sample, told
from engine.shelf import Segments
from sim.core.block_tables import BlockTables, Placement, Span
from sim.core.finetune import Backward, Forward, Step
from sim.core.plan import Limits, Plan
from sim.core.request import Request


class StepRecord(NamedTuple):
    """An optimizer step in numbers."""

    job: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float

    @property
    def failure(self) -> str:
        """What to say of a step after which its job was given up."""
        numbers = f"loss {self.loss:g}, gradient norm {self.grad_norm:g}"
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            numbers += ", weights that are not finite"
        return f"job {self.job}: step {self.step} gave {numbers}; the job stopped before it"


class Collected(NamedTuple):
    """What an iteration brought to light."""

    ended: tuple[int, ...] = ()
    """Requests whose token is one of their stop tokens."""
    failed: tuple[str, ...] = ()
    """Jobs whose step was not sound."""


class _Live:
    """A request that has arrived and not ended."""

    __slots__ = ("adapter", "prompt_tokens", "sampled", "sampling", "slot", "tokens")

    def __init__(self, tokens: list[int], sampling: Sampling, adapter: str | None) -> None:
        self.tokens = tokens
        self.prompt_tokens = len(tokens)
        self.sampling = sampling
        self.adapter = adapter
        self.slot: int | None = None
        """The adapter's version that it runs on; None until it is admitted, and for the base model."""
        self.sampled = 0
        """Output tokens launched, known to the host or not."""

    @property
    def segment_adapter(self) -> int:
        """Its slot as batches have it: -1 for the base model."""
        return -1 if self.slot is None else self.slot


class _InFlight(NamedTuple):
    """An iteration between `launch` and `collect`."""

    ids: list[int]
    tokens: torch.Tensor | None
    steps: list[StepResult]
    numbers: torch.Tensor | None
    """Loss, gradient norm and soundness of each step."""
    event: torch.cuda.Event | None


class Engine:
    """One model replica with its pages, adapters and finetuning jobs."""

    def __init__(
        self,
        *,
        model: Model,
        pages: Pages,
        limits: Limits,
        bank: AdapterBank | None = None,
        adapters: Mapping[str, int] | None = None,
        trainers: Iterable[Trainer] = (),
        on_token: Callable[[int, int], None] | None = None,
        launching: Launching = Launching(),  # noqa: B008 - a value without state
    ) -> None:
        """`pages` hold the inference blocks of `limits` first, then those of the trainers. Requests name one
        of `adapters`, whose slots in the bank are the engine's from now on, or a trainer's job.
        `on_token(id, token)` is called for each token in order."""
        self.model = model
        self.tables = BlockTables(limits)
        self.trainers = {trainer.spec.id: trainer for trainer in trainers}
        self.steps: list[StepRecord] = []
        """Optimizer steps so far; those of a job that failed end with the last good one."""
        self.failures: dict[str, StepRecord] = {}
        """Job -> the step after which it was given up. Its adapter stays at the version before."""
        self.on_token = on_token
        self.on_step: Callable[[StepRecord], None] | None = None
        """Called for each optimizer step; finds `adapter` and `optimizer_state` as this left them."""
        self.on_failure: Callable[[StepRecord], None] | None = None
        """Called for the step after which a job is given up."""
        self.on_lost: Callable[[int], None] | None = None
        """Called for a request whose logits are not numbers, which then ends without that token; None: some token
        takes its place."""
        self._pages = pages
        self._bank = bank
        self._versions: dict[str, int] = {}
        """Adapter -> the bank's slot that newly admitted requests take."""
        if bank is not None:
            self._versions = {**(adapters or {})}
            self._versions |= {name: bank.hold(t.slot) for name, t in self.trainers.items()}
        self._live: dict[int, _Live] = {}
        self._last_token = torch.zeros(limits.max_sequences, dtype=torch.int32, device=model.device)
        self._staging = Staging(model.device)
        self._second_staging = Staging(model.device)
        self._second = launching.second
        self._graphs: Graphs | None = None
        if launching.captures is not None:
            self._graphs = Graphs(
                model=model,
                pages=pages,
                bank=bank,
                last_token=self._last_token,
                table=self.tables.table,
                block_tokens=limits.block_tokens,
                captures=launching.captures,
            )
        self._launched: deque[_InFlight] = deque()

    @torch.no_grad()
    def warm_up(self, adapters: bool = True) -> int:
        """Capture what can be captured, before time counts. Returns how many shapes there are.

        Without `adapters`, half of them: what a request that names one needs is captured when it comes.
        """
        return 0 if self._graphs is None else self._graphs.warm_up(adapters)

    # What training leaves

    def adapter(self, job: str) -> Adapter:
        """A job's masters after a step that has been collected, although the next may be under way; whole, not a
        copy."""
        return self.trainers[job].adapter()

    def optimizer_state(self, job: str) -> dict[str, Any]:
        """What `restore` needs besides the adapter."""
        return self.trainers[job].optimizer_state()

    def restore(self, job: str, state: dict[str, Any], steps: int) -> None:
        """Go on after `steps` steps of the job, which was made with the adapter of then."""
        self.trainers[job].restore(state, steps)

    @torch.no_grad()
    def mean_loss(self, job: str, samples: Sequence[Sample]) -> float:
        """Of samples that nothing is trained on, by a job's newest weights. For an engine without requests, whose
        pages hold `evaluation.room_for` these."""
        assert self._bank is not None and not self._live
        trainer = self.trainers[job]
        return mean_loss(self.model, self._pages, self._bank, trainer.slot, samples, self._staging)

    # What the loop shows

    def arrive(self, request: Request, tokens: Sequence[int], sampling: Sampling) -> None:
        """A request with its prompt."""
        if len(tokens) != request.prompt_tokens:
            raise ValueError(
                f"request {request.id}: the prompt must have {request.prompt_tokens} tokens, "
                f"got {len(tokens)}"
            )
        if request.adapter is not None and request.adapter not in self._versions:
            known = ", ".join(self._versions) or "none"
            raise ValueError(f"request {request.id}: no adapter named {request.adapter!r}; known: {known}")
        self._live[request.id] = _Live(list(tokens), sampling, request.adapter)
        self.tables.arrive(request)

    def ended(self, id: int) -> None:
        """The loop says that a request has ended, however."""
        live = self._live.pop(id)
        self.tables.ended(id)
        if live.slot is not None:
            assert self._bank is not None
            self._bank.drop(live.slot)

    @torch.no_grad()
    def launch(self, plan: Plan) -> None:
        """Start one iteration."""
        placement = self.tables.apply(plan)
        steps = [self.trainers[piece.job].step() for piece in plan.finetune if type(piece) is Step]
        windows = [
            (self.trainers[piece.job], self.trainers[piece.job].next_window(piece.tokens))
            for piece in plan.finetune
            if type(piece) is Forward
        ]
        fused, apart = ([], windows) if plan.overlap else (windows, [])
        stream = self._second.from_here() if plan.overlap and self._second is not None else nullcontext()
        ids, tokens = self._forward(placement, fused, self._staging)
        with stream:
            self._forward(_NO_INFERENCE, apart, self._second_staging)
            for piece in plan.finetune:
                if type(piece) is Backward:
                    self.trainers[piece.job].backward(piece.layer_tokens)
        self._launched.append(self._in_flight(ids, tokens, steps))

    def collect(self) -> Collected:
        """Wait for the oldest iteration, hand out its tokens and publish its steps."""
        done = self._launched.popleft()
        if done.event is not None:
            done.event.synchronize()
        failed = () if done.numbers is None else self._publish(done.steps, done.numbers.tolist())
        if done.tokens is None:
            return Collected((), failed)
        ended = []
        for id, token in zip(done.ids, done.tokens.tolist(), strict=True):
            live = self._live.get(id)
            if live is None:
                continue  # it ended while this iteration was already launched
            if token == LOST:
                assert self.on_lost is not None
                self.on_lost(id)
                ended.append(id)
                continue
            live.tokens.append(token)
            if self.on_token is not None:
                self.on_token(id, token)
            if token in live.sampling.stop_tokens:
                ended.append(id)
        return Collected(tuple(ended), failed)

    @property
    def overlaps(self) -> bool:
        """Whether finetuning may run beside inference, on a stream of its own."""
        return self._second is not None

    # Reaching a state without computing it, for timing (`engine.rig`): what comes out means nothing

    def fill(self) -> None:
        """Random keys and values in every page."""
        for pages in self._pages:
            # Layer by layer: the pages are most of the memory, and nothing of their size must come beside them.
            for layer in pages:
                layer.normal_()

    def skip(self, plan: Plan) -> None:
        """Count the inference of a plan as done."""
        self.tables.apply(plan)

    def stand(
        self, job: str, sample: Sample, forward_tokens: int, backward_layer_tokens: int, fresh: bool
    ) -> None:
        """Bring a job to a place in `sample`; see `Trainer.stand`."""
        self.trainers[job].stand(sample, forward_tokens, backward_layer_tokens, fresh)

    # Forward

    def _forward(
        self,
        placement: Placement,
        windows: Sequence[tuple[Trainer, ForwardWindow]],
        staging: Staging,
    ) -> tuple[list[int], torch.Tensor | None]:
        """The fused forward; the ids that got a token, and their tokens on the device."""
        if self._graphs is not None and placement.decodes and not placement.chunks and not windows:
            return self._decode(self._by_adapter(placement.decodes), self._graphs)
        spans = [*self._by_adapter(placement.decodes), *placement.chunks]
        pieces = [self._piece(span, n < len(placement.decodes)) for n, span in enumerate(spans)]
        pieces += [Piece(w.tokens, w.start, trainer.table, trainer.slot) for trainer, w in windows]
        if not pieces:
            return [], None
        batch, keeping, slots, rows = self._batch(pieces, spans, len(placement.decodes), windows, staging)
        x = self.model.forward(batch, self._pages, keeping)
        at = sum(span.tokens for span in spans)
        for trainer, window in windows:
            end = at + len(window.tokens)
            trainer.loss(window, x[at:end])
            at = end
        sampled = [span for span in spans if span.sampled]
        if not sampled:
            return [], None
        return self._sample(sampled, x[rows], slots)

    def _decode(self, spans: Sequence[Span], graphs: Graphs) -> tuple[list[int], torch.Tensor]:
        """The same for decodes alone, replayed."""
        x, slots = graphs.run(
            Decodes(
                slots=np.array([span.slot for span in spans], np.int32),
                contexts=np.array([span.context for span in spans], np.int32),
                adapters=np.array([self._live[span.id].segment_adapter for span in spans], np.int32),
            )
        )
        return self._sample(spans, x, slots)

    def _sample(
        self, spans: Sequence[Span], x: torch.Tensor, slots: torch.Tensor
    ) -> tuple[list[int], torch.Tensor]:
        """The next token of each span from its last residual stream x [n, E], kept at its slot."""
        live = [self._live[span.id] for span in spans]
        logits = self.model.logits(x)
        tokens = sample(logits, [n.sampling for n in live], [n.sampled for n in live])
        # Ranks that drew from equal logits may differ: a cumulative sum on CUDA has no fixed order.
        self.model.group.broadcast(tokens)
        for n in live:
            n.sampled += 1
        self._last_token[slots] = tokens
        return [span.id for span in spans], tokens if self.on_lost is None else told(tokens, logits)

    def _batch(
        self,
        pieces: Sequence[Piece],
        spans: Sequence[Span],
        decodes: int,
        windows: Sequence[tuple[Trainer, ForwardWindow]],
        staging: Staging,
    ) -> tuple[Batch, list[Window], torch.Tensor, torch.Tensor]:
        """The batch, what it keeps, and for each sampled token its sequence's slot and its row."""
        packed = pack(pieces, self.tables.block_tokens)
        ends = packed.query_start[1:]
        sampled = [n for n, span in enumerate(spans) if span.sampled]
        slots = np.array([spans[n].slot for n in sampled], np.int32)
        decoding = np.array([span.slot for span in spans[:decodes]], np.int32)
        arrays = [*packed[:-1], slots, ends[sampled] - 1, decoding]
        up = staging.upload(arrays)
        tokens, positions, kv_slots, tables, start, context, segment_start, segment_adapter = up[:8]
        if decodes:
            tokens[:decodes] = self._last_token[up[10]]
        keeping: list[Window] = []
        dropped: list[Dropped] = []
        for (trainer, window), first in zip(windows, packed.query_start[len(spans) :].tolist(), strict=False):
            rows = slice(first, first + len(window.tokens))
            keeping += trainer.keep(window, rows)
            dropped += trainer.dropped(window.start, rows)
        lora = None
        if self._bank is not None and (packed.segment_adapter >= 0).any():
            segments = Segments(segment_start, segment_adapter)
            kept = [window.rows for window in keeping]
            lora = self._bank.batch(segments, packed.segment_start, packed.segment_adapter, kept)
            lora = lora._replace(dropped=dropped)
        batch = Batch(
            tokens=tokens,
            positions=positions,
            slots=kv_slots,
            block_tables=tables,
            query_start=start,
            context_lens=context,
            decodes=decodes,
            max_keys=packed.max_keys,
            lora=lora,
        )
        return batch, keeping, up[8], up[9]

    def _piece(self, span: Span, decode: bool) -> Piece:
        live = self._live[span.id]
        if live.slot is None and live.adapter is not None:
            assert self._bank is not None
            live.slot = self._bank.hold(self._versions[live.adapter])
        tokens = (
            np.zeros(1, np.int32)  # replaced on the device by the last sampled token
            if decode
            else np.array(live.tokens[span.context : span.context + span.tokens], np.int32)
        )
        row = self.tables.table[span.slot]
        return Piece(tokens, span.context, row, live.segment_adapter)

    def _by_adapter(self, decodes: tuple[Span, ...]) -> list[Span]:
        """Decodes of one adapter beside each other, so that they are one segment."""
        if self._bank is None:
            return list(decodes)
        return sorted(decodes, key=lambda span: self._live[span.id].segment_adapter)

    # Ends

    def _in_flight(self, ids: list[int], tokens: torch.Tensor | None, steps: list[StepResult]) -> _InFlight:
        numbers = None
        if steps:
            kind = steps[0].loss.dtype
            columns = [(s.loss, s.grad_norm.to(kind), s.sound.to(kind)) for s in steps]
            numbers = torch.stack([torch.stack(column) for column in columns])
        if self.model.device.type == "cpu":
            return _InFlight(ids, tokens, steps, numbers, None)
        host = None if tokens is None else tokens.to("cpu", non_blocking=True)
        host_numbers = None if numbers is None else numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _InFlight(ids, host, steps, host_numbers, event)

    def _publish(self, steps: Sequence[StepResult], numbers: Sequence[Sequence[float]]) -> tuple[str, ...]:
        """New requests get what sound steps made; the jobs of the others."""
        assert self._bank is not None
        failed = []
        for result, (loss, norm, sound) in zip(steps, numbers, strict=True):
            record = StepRecord(result.job, result.step, loss, norm, result.learning_rate)
            self.trainers[result.job].told(result.step)
            if not sound:
                self._bank.drop(result.slot)
                # The next step of a job may have been launched before the loop gave it up.
                if result.job not in self.failures:
                    self.failures[result.job] = record
                    failed.append(result.job)
                    if self.on_failure is not None:
                        self.on_failure(record)
                continue
            self.steps.append(record)
            self._bank.drop(self._versions[result.job])
            self._versions[result.job] = result.slot
            if self.on_step is not None:
                self.on_step(record)
        return tuple(failed)


_NO_INFERENCE = Placement((), ())
