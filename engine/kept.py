"""What a finetuning sample keeps of its forward: exactly the tensors that the compile plan keeps.

Tensors go by the plan's roles (`sim.compile.roles`). A layer has a buffer of its own for each role that it
keeps, and the lowest layer keeps less than the others. Keys and values, which the plan pins, are in the pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.elementwise import compute_dtype
from sim.compile.plan import KEEP, CompilePlan, TensorPlan

BY_HEAD = ("q", "attention")


class Kept:
    """Room for `plan.held_tokens` tokens, in all layers."""

    def __init__(self, plan: CompilePlan, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(tensor: TensorPlan) -> torch.Tensor:
            kind = compute_dtype(dtype) if tensor.role == "lse" else dtype
            width = tensor.bytes_per_token // kind.itemsize
            shape = (width // head_dim, head_dim) if tensor.role in BY_HEAD else (width,)
            return torch.empty((plan.held_tokens, *shape), dtype=kind, device=device)

        self.layers = [
            {tensor.role: buffer(tensor) for tensor in plan.layer(index) if tensor.action == KEEP}
            for index in range(plan.layers)
        ]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.values())

    def put(self, index: int, at: slice, rows: slice, made: Mapping[str, torch.Tensor]) -> None:
        """Copy `rows` of what layer `index` made to `at`, as far as the plan keeps it. `made` has them by
        role."""
        for role, buffer in self.layers[index].items():
            tensor, width = made[role], buffer.shape[1]
            # The low-rank product of a batch is padded to the largest rank.
            buffer[at] = tensor[rows] if tensor.shape[1] == width else tensor[rows, :width]
