"""Iterations of one kind, repeated on a real engine: what `coserve reference` times.

Plans are written here instead of by a policy, and carried out by `Engine.launch` and `collect` as the driver
does, one iteration ahead, so that planning hides behind the device. Sequences are placed at their context
without computing it: the pages hold random numbers, and a decode takes as long over those as over real ones.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from engine.assemble import TrainingJob, assemble_engine
from engine.engine import Engine
from engine.launching import Launching, LaunchSettings
from engine.lora import new_adapter
from engine.machine import release
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.reference_timing import WARM_UP, Times, enough
from engine.sampling import Sampling
from engine.text import passes, random_samples
from sim.core.finetune import Backward, Forward, Job, Slice, Step
from sim.core.plan import Limits, Plan
from sim.core.request import Request
from sim.core.specs import LoraSpec, ModelShape

JOB = "job"
BLOCK_TOKENS = 16
ROOM = 50
"""Tokens that a placed sequence can still get, and so the most decodes of a measurement; half of them is how
much longer than stated contexts are."""


class Planned(NamedTuple):
    """An iteration to run, and the name under which its time is kept; None keeps it not."""

    plan: Plan
    name: str | None


class Memory(NamedTuple):
    """How a sample is trained: order and memory of a job, and the tokens of a backward slice."""

    order: str
    memory: str
    backward_tokens: int | None
    """None is the whole sample."""


class Setup(NamedTuple):
    """An engine, and its jobs as a loop would count them: they draw the samples."""

    engine: Engine
    jobs: list[Job]


def run(
    setup: Setup, plans: Iterator[Planned], after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each named iteration: from the end of the one before to its own, as one is always ahead.

    `after` is called when an iteration has been collected.
    """
    taken: dict[str, list[float]] = {}
    waiting: list[str | None] = []
    last_s = time.perf_counter()

    def collect() -> None:
        nonlocal last_s
        setup.engine.collect()
        after()
        now_s = time.perf_counter()
        name = waiting.pop(0)
        if name is not None:
            taken.setdefault(name, []).append(now_s - last_s)
        last_s = now_s

    for planned in plans:
        setup.engine.launch(planned.plan)
        for piece in planned.plan.finetune:
            setup.jobs[0].advance(piece)
        waiting.append(planned.name)
        if len(waiting) == 2:
            collect()
    while waiting:
        collect()
    return taken


def decode_times(model: Model, sequences: int, context: int, seconds: float) -> Times:
    """An iteration in which so many sequences at this context get their next token."""
    setup = _setup(model, [context + ROOM] * sequences)
    place(setup.engine, sequences, context)
    plans = (Planned(Plan(decode=True), "decode") for _ in itertools.islice(enough(seconds), ROOM - 2))
    return Times.of(run(setup, plans)["decode"][WARM_UP:])


def prefill_times(model: Model, tokens: int, seconds: float) -> Times:
    """An iteration that computes one prompt of so many tokens and its first token."""
    setup = _setup(model, [tokens + 1] * 3, max_tokens=tokens)
    ids = itertools.count()
    running: list[int] = []

    def plans() -> Iterator[Planned]:
        for _ in enough(seconds):
            id = next(ids)
            _arrive(setup.engine, id, tokens, 1)
            running.append(id)
            yield Planned(Plan(prefills=((id, tokens),)), "prefill")

    times = run(setup, plans(), lambda: setup.engine.ended(running.pop(0)))
    return Times.of(times["prefill"][WARM_UP:])


def window_times(
    model: Model, lora: LoraSpec, tokens: int, sequences: int, context: int, seconds: float
) -> dict[str, Times]:
    """`window`: the forward of a whole sample of so many tokens; `fused`: beside so many decodes, if any."""
    job = training_job(model, lora, tokens, Memory("layer_major", "stash", None))
    setup = _setup(model, [context + ROOM] * sequences, job=job)
    place(setup.engine, sequences, context)
    back = Backward(JOB, tokens * model.config.shape.layers)

    def plans() -> Iterator[Planned]:
        for n in itertools.islice(enough(seconds), ROOM - 2):
            for decode in (False, True) if sequences else (False,):
                if n or decode:
                    yield Planned(Plan(finetune=(Step(JOB),)), None)
                yield Planned(
                    Plan(decode=decode, finetune=(Forward(JOB, tokens),)), "fused" if decode else "window"
                )
                yield Planned(Plan(finetune=(back,)), None)

    return {name: Times.of(times[WARM_UP:]) for name, times in run(setup, plans()).items()}


def stream_times(
    model: Model, lora: LoraSpec, tokens: int, sequences: int, context: int, seconds: float
) -> dict[str, Times]:
    """So many decodes and the backward of a quarter of the layers of a sample: `after` them, and `beside` them on a
    stream of its own. Empty where there is only one stream."""
    launching = LaunchSettings(streams=2).on(model)
    if launching.second is None:
        return {}
    layers = model.config.shape.layers
    job = training_job(model, lora, tokens, Memory("layer_major", "stash", None))
    setup = _setup(model, [context + ROOM] * sequences, job=job, launching=launching)
    place(setup.engine, sequences, context)
    quarter = -(-layers // 4)

    def plans() -> Iterator[Planned]:
        for n in itertools.islice(enough(seconds), (ROOM - 2) // 4):
            if n:
                yield Planned(Plan(finetune=(Step(JOB),)), None)
            yield Planned(Plan(finetune=(Forward(JOB, tokens),)), None)
            for at in range(0, layers, quarter):
                beside = bool((at // quarter + n) % 2)
                piece = Backward(JOB, tokens * min(quarter, layers - at))
                whole = layers - at >= quarter
                yield Planned(
                    Plan(decode=True, finetune=(piece,), overlap=beside),
                    ("beside" if beside else "after") if whole else None,
                )

    return {name: Times.of(times[WARM_UP:]) for name, times in run(setup, plans()).items()}


def finetune_times(model: Model, lora: LoraSpec, tokens: int, how: Memory, seconds: float) -> Times:
    """A sample of so many tokens with its optimizer step, all iterations of it together."""
    setup = _setup(model, [], job=training_job(model, lora, tokens, how))
    layers = model.config.shape.layers
    each = tokens if how.backward_tokens is None else how.backward_tokens
    pieces: list[Slice] = [Forward(JOB, tokens)]
    pieces += [Backward(JOB, layers * min(each, tokens - at)) for at in range(0, tokens, each)]
    plans = (
        Planned(Plan(finetune=(piece,)), str(n)) for n in enough(seconds) for piece in (*pieces, Step(JOB))
    )
    taken = run(setup, plans)
    return Times.of([sum(taken[str(n)]) for n in range(WARM_UP, len(taken))])


def training_job(model: Model, lora: LoraSpec, tokens: int, how: Memory) -> TrainingJob:
    """A job of random samples of this length with a step after each."""
    shape = model.config.shape
    return TrainingJob(
        id=JOB,
        samples=passes(random_samples(8, tokens, shape.vocab), 0),
        max_sample_tokens=tokens,
        adapter=new_adapter(lora, shape, model.compute, model.device, 0),
        optimizer=OptimizerSettings(learning_rate=1e-4, schedule="constant"),
        accumulation=1,
        order=how.order,
        memory=how.memory,
    )


def place(engine: Engine, sequences: int, context: int) -> None:
    """Sequences that decode next, at this context; their pages hold random numbers."""
    for id in range(sequences):
        _arrive(engine, id, context, ROOM - 1)
        engine.tables.apply(Plan(prefills=((id, context),)))


def _arrive(engine: Engine, id: int, prompt_tokens: int, output_tokens: int) -> None:
    vocab = engine.model.config.shape.vocab
    prompt = np.random.default_rng(id).integers(0, vocab, prompt_tokens).tolist()
    engine.arrive(Request(id, 0.0, prompt_tokens, output_tokens), prompt, Sampling())


def _setup(
    model: Model,
    sequences: list[int],
    max_tokens: int = 1,
    job: TrainingJob | None = None,
    launching: Launching | None = None,
) -> Setup:
    """An engine with room for sequences of these lengths, its pages filled with random numbers."""
    release()
    blocks = sum(-(-tokens // BLOCK_TOKENS) for tokens in sequences) or 1
    count = max(1, len(sequences))
    limits = Limits(
        kv_tokens=blocks * BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        max_sequences=count,
        max_tokens=max(count, max_tokens),
        max_sequence_tokens=max(sequences, default=1),
    )
    if launching is None:
        # Captured graphs take memory that is none of a sample's: without sequences there is nothing to capture.
        launching = LaunchSettings().on(model) if sequences else Launching()
    engine, jobs = assemble_engine(model, limits, [] if job is None else [job], launching=launching)
    # The one shape that is decoded is captured in the repeats that are left out.
    engine.fill()
    return Setup(engine, jobs)


def decode_floor_s(shape: ModelShape, sequences: int, context: int, copy_bytes_s: float) -> float:
    """Every weight but the embedding once, and the K/V of every sequence, at the copy bandwidth."""
    embedding = 0 if shape.tied_embeddings else shape.vocab * shape.hidden * shape.dtype_bytes
    moved = shape.weight_bytes - embedding + sequences * context * shape.kv_bytes_per_token
    return moved / copy_bytes_s


def forward_flops(shape: ModelShape, tokens: int, logits: int, lora: LoraSpec | None = None) -> float:
    """Products of a forward of one sequence from its start: linear layers, causal attention, head, LoRA."""
    linear = 2 * tokens * shape.layers * sum(i * o for i, o in shape.linears.values())
    attention = 4 * shape.layers * shape.q_dim * tokens * (tokens + 1) / 2
    bypass = 0 if lora is None else 2 * tokens * lora.params(shape)
    return float(linear + attention + bypass + 2 * logits * shape.vocab * shape.hidden)
