"""LoRA of many adapters, of different ranks, in one packed batch; forward, and the gradient of its input.

Tokens lie in segments of one adapter. Two kernels: the shrink (`lora_shrink`), whose long contraction is split
over programs, and the expand (`lora_expand`), which adds their partial sums when it reads them. The gradient with
respect to x is the same pair of products with the factors exchanged and transposed, so it is the same pair of
kernels on transposed views; those of the factors are `lora_weight_grad`.

    forward    s = x A^T       y += scale * s B^T
    backward   u = dy B        dx += scale * u A          = grouped_lora(dx, dy, B^T, A^T)
               dA += scale * u^T x       dB += scale * dy^T s

Where ranks send something between the two products, each is called alone.

Shapes: T packed tokens, I input and O output features, N adapters, R padded rank (the buffers'), r an
adapter's own rank, G segments, C splits of the contraction. Sums are float32.
"""

from __future__ import annotations

import torch

from engine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from engine.kernels.jit import Launch, by_layout, uses_triton
from engine.kernels.lora_expand import expand_launch, lora_expand_reference
from engine.kernels.lora_segments import MAX_RANK, check_factor, check_scales, rank_parts
from engine.kernels.lora_shrink import check_shrink, lora_shrink_reference, shrink_launch


def grouped_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """y[t] += scales[n] * (x[t] @ A_n^T) @ B_n^T for the tokens of each segment, n its adapter.

    y [T, O] is modified; x [T, I]; a [N, R, I] and b [N, O, R] with one of the last two strides 1, so
    that transposed views do; ranks [N] int32 and scales [N] float32; segment_start [G + 1] and
    segment_adapter [G] int32, all on the device. Adapter -1 is the base model: its tokens are left
    alone, as are those outside of all segments; segments may be empty. Padding beyond an adapter's
    rank may be anything.

    Returns s = x A^T [T, R] (float32; float64 for float64 on the CPU), unscaled, defined for the
    first r columns of tokens with an adapter. Raises ValueError for tensors that do not fit together.
    """
    run = grouped_lora_triton if uses_triton(x) else grouped_lora_reference
    return run(y, x, a, b, ranks, scales, segment_start, segment_adapter)


def grouped_lora_triton(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`grouped_lora` by the two kernels."""
    if a.shape[1] > MAX_RANK:
        index = (segment_start, segment_adapter)
        found = [
            grouped_lora_triton(y, x, a[:, part], b[:, :, part], ranks - part.start, scales, *index)
            for part in rank_parts(a.shape[1])
        ]
        return torch.cat(found, dim=1)
    launches, s = lora_launches(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    for launch in launches:
        launch.run()
    return s


def lora_launches(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[list[Launch], torch.Tensor]:
    """The shrink and the expand, and s, which the expand writes."""
    index = (segment_start, segment_adapter)
    shrink, expand, splits = _pair(y, x, a, b, ranks, scales, *index)
    size = (x.shape[0], a.shape[1])
    s = x.new_empty(size, dtype=torch.float32)
    parts = s if splits == 1 else x.new_empty((splits, *size), dtype=torch.float32)
    return [shrink.on(x, a, parts, ranks, *index), expand.on(y, b, parts, s, ranks, scales, *index)], s


@by_layout
def _pair(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> tuple[Launch, Launch, int]:
    """Both launches as `Launch.on` takes them, and the splits of the contraction."""
    check_lora(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    check_dtype("x", x, FLOATS)
    shrink, splits = shrink_launch(x, a, segment_adapter.shape[0])
    return shrink, expand_launch(y, b, segment_adapter.shape[0], splits), splits


def check_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors of one grouped LoRA fit together."""
    check_shape("y", y, (x.shape[0], None))
    check_shape("b", b, (a.shape[0], y.shape[1], a.shape[1]))
    check_dtype("y", y, (x.dtype,))
    check_device("y", y, x.device)
    check_shrink(x, a, ranks, segment_start, segment_adapter)
    check_factor("y", y, "b", b)
    check_scales(scales, b)


def grouped_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scales: torch.Tensor,
    segment_start: torch.Tensor,
    segment_adapter: torch.Tensor,
) -> torch.Tensor:
    """`grouped_lora` in torch, segment by segment; s is NaN where it is undefined."""
    check_lora(y, x, a, b, ranks, scales, segment_start, segment_adapter)
    s = lora_shrink_reference(x, a, ranks, segment_start, segment_adapter)
    lora_expand_reference(y, s, b, ranks, scales, segment_start, segment_adapter)
    return s
