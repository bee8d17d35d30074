"""Least squares with non-negative coefficients: min |A x - b| subject to x >= 0.

The active-set method of Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23, on the
normal equations. Non-negative increments are what makes a fitted curve monotone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def nnls(a: Floats, b: Floats) -> Floats:
    """x of shape (columns,) for `a` (rows, columns) and `b` (rows,). Columns of zeros get 0."""
    scale = np.linalg.norm(a, axis=0)
    used = scale > 0
    scale = np.where(used, scale, 1.0)
    normal = a / scale
    gram, moment = normal.T @ normal, normal.T @ b
    x = np.zeros(a.shape[1])
    passive = np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-12 * float(np.abs(moment).max(initial=0.0))
    # Each round adds one column for good or ends; the bound only guards against cycling by rounding.
    for _ in range(10 * a.shape[1]):
        gradient = np.where(used & ~passive, moment - gram @ x, -np.inf)
        best = int(np.argmax(gradient))
        if not gradient[best] > tolerance:
            break
        passive[best] = True
        x = _step(gram, moment, x, passive)
    return x / scale


def _step(gram: Floats, moment: Floats, x: Floats, passive: NDArray[np.bool_]) -> Floats:
    """Towards the unconstrained solution on `passive`, dropping columns that would turn negative.

    Modifies `passive`.
    """
    while True:
        index = np.flatnonzero(passive)
        target = np.zeros_like(x)
        # The small ridge keeps nearly equal columns from trading large coefficients of either sign.
        block = gram[np.ix_(index, index)] + 1e-11 * np.eye(len(index))
        target[index] = np.linalg.solve(block, moment[index])
        negative = passive & (target <= 0)
        if not negative.any():
            return target
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(negative, x / (x - target), np.inf)
        limit = int(np.argmin(ratio))
        x = x + float(ratio[limit]) * (target - x)
        passive &= x > 1e-15
        passive[limit] = False
        x = np.where(passive, x, 0.0)
