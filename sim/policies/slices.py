"""Cutting finetuning slices: what comes next for a job, sized by a predictor or by a count."""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.finetune import (
    Backward,
    Forward,
    JobView,
    Slice,
    Step,
    backward_chunks,
    recompute_chunks,
)
from sim.core.work import Chunk, Work

_new = tuple.__new__


def add_slice(work: Work, job: JobView, piece: Slice) -> Work:
    """`work` with one more slice of `job`."""
    prefill, count, context, sampled, forward, backward, recompute, params, adapters, overlap = work
    if type(piece) is Forward:
        forward += (Chunk(piece.tokens, job.forward_tokens),)
    elif type(piece) is Backward:
        backward += backward_chunks(job, piece.layer_tokens)
        if job.memory == "recompute":
            recompute += recompute_chunks(job, piece.layer_tokens)
    else:
        params += job.optimizer_params
    # `_replace` costs five times as much, and this runs once per iteration.
    return _new(
        Work, (prefill, count, context, sampled, forward, backward, recompute, params, adapters, overlap)
    )


def advanced(job: JobView, piece: Slice) -> JobView:
    """Where `job` stands after the slice, as far as its present sample goes."""
    if type(piece) is Forward:
        return job._replace(forward_tokens=job.forward_tokens + piece.tokens)
    if type(piece) is Backward:
        return job._replace(backward_layer_tokens=job.backward_layer_tokens + piece.layer_tokens)
    return job._replace(step_due=False)


def fill(
    work: Work,
    jobs: tuple[JobView, ...],
    predictor: Predictor,
    budget_s: float,
    max_forward_tokens: int,
) -> tuple[tuple[Slice, ...], Work]:
    """As much finetuning as keeps the predicted iteration within the budget.

    The first job is served until its sample has no more work or the budget is used up; what is left goes to
    the next. Returns the slices, in order, and `work` with them.
    """
    slices: tuple[Slice, ...] = ()
    for job in jobs:
        while True:
            piece, used_up = _next_slice(work, job, predictor, budget_s, max_forward_tokens)
            if piece is None:
                break
            slices += (piece,)
            work = add_slice(work, job, piece)
            if used_up:
                return slices, work
            job = advanced(job, piece)
    return slices, work


def _next_slice(
    work: Work, job: JobView, predictor: Predictor, budget_s: float, max_forward_tokens: int
) -> tuple[Slice | None, bool]:
    """The largest next slice that fits, if any, and whether it was cut by the budget."""
    id, layers, _, _, _, length, forward, backward, step_due = job
    if step_due:
        step = Step(id)
        fits = predictor.iteration_s(add_slice(work, job, step)) <= budget_s
        return (step, False) if fits else (None, True)
    left = length - forward
    if left:
        most = max_forward_tokens - work.forward_tokens if work.forward else max_forward_tokens
        most = min(left, most)
        tokens = predictor.largest_forward(work, forward, most, budget_s) if most > 0 else 0
        return (Forward(id, tokens) if tokens else None), tokens < left
    left = length * layers - backward
    if left:
        layer_tokens = predictor.largest_backward(work, job, budget_s)
        return (Backward(id, layer_tokens) if layer_tokens else None), layer_tokens < left
    return None, False


def whole_step(work: Work, job: JobView) -> tuple[tuple[Slice, ...], Work]:
    """All that is left of the job's sample, forward and backward, after the step that may be due."""
    slices: list[Slice] = []
    if job.step_due:
        slices.append(Step(job.id))
        work = add_slice(work, job, slices[-1])
        job = advanced(job, slices[-1])
    if job.forward_left:
        slices.append(Forward(job.id, job.forward_left))
        work = add_slice(work, job, slices[-1])
        job = advanced(job, slices[-1])
    if job.backward_left:
        slices.append(Backward(job.id, job.backward_left))
        work = add_slice(work, job, slices[-1])
    return tuple(slices), work
