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


def add_slice(work: Work, job: JobView, piece: Slice) -> Work:
    """`work` with one more slice of `job`."""
    prefill, count, context, sampled, forward, backward, recompute, params, adapters, overlap = work
    if type(piece) is Forward:
        forward = (*forward, Chunk(piece.tokens, job.forward_tokens))
    elif type(piece) is Backward:
        backward = backward + backward_chunks(job, piece.layer_tokens)
        if job.memory == "recompute":
            recompute = recompute + recompute_chunks(job, piece.layer_tokens)
    else:
        params += job.optimizer_params
    # Positional: `_replace` costs three times as much, and this runs once per iteration.
    return Work(prefill, count, context, sampled, forward, backward, recompute, params, adapters, overlap)


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
    slices: list[Slice] = []
    for job in jobs:
        while True:
            piece, used_up = _next_slice(work, job, predictor, budget_s, max_forward_tokens)
            if piece is None:
                break
            slices.append(piece)
            work = add_slice(work, job, piece)
            if used_up:
                return tuple(slices), work
            job = advanced(job, piece)
    return tuple(slices), work


def _next_slice(
    work: Work, job: JobView, predictor: Predictor, budget_s: float, max_forward_tokens: int
) -> tuple[Slice | None, bool]:
    """The largest next slice that fits, if any, and whether it was cut by the budget."""
    if job.step_due:
        step = Step(job.id)
        fits = predictor.iteration_s(add_slice(work, job, step)) <= budget_s
        return (step, False) if fits else (None, True)
    left = job.sample_tokens - job.forward_tokens
    if left:
        most = min(left, max_forward_tokens - work.forward_tokens)
        tokens = predictor.largest_forward(work, job.forward_tokens, most, budget_s) if most > 0 else 0
        return (Forward(job.id, tokens) if tokens else None), tokens < left
    left = job.sample_tokens * job.layers - job.backward_layer_tokens
    if left:
        layer_tokens = predictor.largest_backward(work, job, budget_s)
        return (Backward(job.id, layer_tokens) if layer_tokens else None), layer_tokens < left
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
