"""Cutting finetuning slices: what comes next for a job, sized by a predictor or by a count."""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.finetune import (
    Backward,
    Forward,
    JobView,
    Slice,
    Step,
    after,
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


def add_slices(work: Work, jobs: tuple[JobView, ...], slices: tuple[Slice, ...]) -> Work:
    """`work` with `slices` of `jobs`, in order; at least one."""
    *before, last = slices
    standing = {job.id: job for job in jobs}
    for piece in before:
        job = standing[piece.job]
        work = add_slice(work, job, piece)
        standing[piece.job] = after(job, piece)
    return add_slice(work, standing[last.job], last)


def fill(
    work: Work,
    jobs: tuple[JobView, ...],
    predictor: Predictor,
    budget_s: float,
    max_forward_tokens: int,
) -> tuple[tuple[Slice, ...], float]:
    """As much finetuning as keeps the predicted iteration within the budget.

    The first job is served until its sample has no more work or the budget is used up; what is left goes to
    the next. Returns the slices, in order, and the predicted seconds of `work` with them.
    """
    slices: tuple[Slice, ...] = ()
    predicted_s = None
    for job in jobs:
        while True:
            piece, seconds, used_up = _next_slice(work, job, predictor, budget_s, max_forward_tokens)
            if seconds is not None:
                predicted_s = seconds
            if piece is None:
                break
            slices += (piece,)
            if used_up:
                assert predicted_s is not None, "a slice that was cut has been predicted"
                return slices, predicted_s
            work = add_slice(work, job, piece)
            job = after(job, piece)
    return slices, predictor.iteration_s(work) if predicted_s is None else predicted_s


def _next_slice(
    work: Work, job: JobView, predictor: Predictor, budget_s: float, max_forward_tokens: int
) -> tuple[Slice | None, float | None, bool]:
    """The largest next slice that fits, if any; the seconds with it, where they were predicted; whether it
    was cut by the budget."""
    id, layers, _, _, _, length, forward, backward, step_due = job
    if step_due:
        step = Step(id)
        seconds = predictor.iteration_s(add_slice(work, job, step))
        return (step, seconds, False) if seconds <= budget_s else (None, None, True)
    left = length - forward
    if left:
        most = max_forward_tokens - work.forward_tokens if work.forward else max_forward_tokens
        if most <= 0:
            return None, None, True
        tokens, seconds = predictor.largest_forward(work, forward, most if most < left else left, budget_s)
        return (_new(Forward, (id, tokens)) if tokens else None), seconds, tokens < left
    left = length * layers - backward
    if left:
        tokens, seconds = predictor.largest_backward(work, job, budget_s)
        return (_new(Backward, (id, tokens)) if tokens else None), seconds, tokens < left
    return None, None, False


def whole_layers(job: JobView, layers: int) -> Backward:
    """The next `layers` of the job's sample, or what is left of it; window-major a window of as many layer-tokens, at
    least one token."""
    tokens = layers * job.sample_tokens
    if job.order == "window_major":
        tokens = max(1, tokens // job.layers) * job.layers
    return Backward(job.id, min(tokens, job.backward_left))


def whole_step(work: Work, job: JobView) -> tuple[tuple[Slice, ...], Work]:
    """All that is left of the job's sample, forward and backward, after the step that may be due."""
    slices: list[Slice] = []
    if job.step_due:
        slices.append(Step(job.id))
        work = add_slice(work, job, slices[-1])
        job = after(job, slices[-1])
    if job.forward_left:
        slices.append(Forward(job.id, job.forward_left))
        work = add_slice(work, job, slices[-1])
        job = after(job, slices[-1])
    if job.backward_left:
        slices.append(Backward(job.id, job.backward_left))
        work = add_slice(work, job, slices[-1])
    return tuple(slices), work
