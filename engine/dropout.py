"""Dropout of what the bypasses of a trained adapter read, as `peft` has it: a mask for every linear layer, in
training alone.

Masks follow from the job's seed, the step, the sample in it, the layer and the place of a number
(`engine.kernels.dropout`), so forward windows, backward slices and what runs again between them agree however the
sample is cut, on one device or several, and after a resumed run's first steps as in an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from engine.kernels.dropout import dropout, mixed
from engine.parallel import Group, splits_input
from sim.core.specs import LINEARS


class Dropout(NamedTuple):
    """Of one sample."""

    rate: float
    key: int
    targets: Collection[str]
    group: Group

    def __call__(self, x: torch.Tensor, target: str, layer: int, position: int) -> torch.Tensor:
        """x [N, in] with numbers dropped, the first row that of token `position`: what linear layer `target` reads
        on this rank, or the gradient there."""
        key = mixed(mixed(self.key + layer) + LINEARS.index(target))
        column = self.group.rank * x.shape[1] if splits_input(target) else 0
        return dropout(x, self.rate, key, position, column)


def sample_key(seed: int, step: int, sample: int) -> int:
    """For `Dropout.key`: of a step's sample, both counted from 0."""
    return mixed(mixed(mixed(seed) + step) + sample)


class Dropped(NamedTuple):
    """Rows of a batch that are a window of such a sample."""

    dropout: Dropout
    rows: slice
    position: int
    """Of the first."""
