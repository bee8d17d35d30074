"""The optimizer of an adapter: fp32 masters, clipping, and the learning rate as users know it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from engine.shares import Shares

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
CONSTANT = SCHEDULES[:2]
"""After the warm-up, if there is one."""
KINDS = ("adamw", "sgd")
READ_BY = {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}
"""Setting -> the only kind that has it."""
LEAST_EPS = 1.2e-38
"""The least number that single precision holds in full."""
LARGEST_RATE = {"adamw": 1e37, "sgd": 3.4e38}
"""Of learning and decay: what single precision holds, for AdamW after its first bias correction has divided it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How an adapter is updated. Names are those of LLaMA-Factory and transformers."""

    kind: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    """Of sgd."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are scaled to this length; None does not clip."""
    schedule: str = "cosine"
    warmup_steps: int = 0
    total_steps: int | None = None
    """Steps after which the rate has fallen to 0; needed by linear and cosine."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"optimizer.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        most = LARGEST_RATE[self.kind]
        if not 0 < self.learning_rate <= most:
            raise ValueError(
                f"optimizer.learning_rate must be above 0 and at most {most:g}, got {self.learning_rate}"
            )
        if not 0 <= self.weight_decay <= most:
            raise ValueError(
                f"optimizer.weight_decay must be at least 0 and at most {most:g}, got {self.weight_decay}"
            )
        # Of 0, in single precision, an entry without a gradient, as all of A at the first step, makes 0 / 0.
        if not LEAST_EPS <= self.eps <= most:
            raise ValueError(
                f"optimizer.eps must be at least {LEAST_EPS:g} and at most {most:g}, got {self.eps}"
            )
        for key, shares in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= share < 1 for share in shares):
                raise ValueError(f"optimizer.{key} must be in [0, 1), got {getattr(self, key)}")
        own = {field.name: field.default for field in fields(self)}
        for key, kind in READ_BY.items():
            if kind != self.kind and getattr(self, key) != own[key]:
                raise ValueError(
                    f"optimizer.{key} changes nothing with kind={self.kind}, which has none; "
                    f"got {getattr(self, key)}"
                )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                "optimizer.warmup_steps changes nothing with the schedule constant, but with constant_with_warmup; "
                f"got {self.warmup_steps}"
            )
        if self.schedule not in CONSTANT and self.total_steps is None:
            raise ValueError(f"optimizer.total_steps must be given for schedule {self.schedule}")
        if self.schedule in CONSTANT and self.total_steps is not None:
            raise ValueError(
                f"optimizer.total_steps changes nothing with schedule={self.schedule}, got {self.total_steps}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warmup, then the schedule (transformers' get_scheduler)."""
        if step < self.warmup_steps:
            return self.learning_rate * step / max(1, self.warmup_steps)
        if self.schedule in CONSTANT:
            return self.learning_rate
        assert self.total_steps is not None
        left = self.total_steps - self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, left)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, 1.0 - progress)
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    def build(self, masters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer of masters on one device; on CUDA one kernel updates many of them, and none waits."""
        fused = masters[0].device.type == "cuda"
        if self.kind == "adamw":
            return torch.optim.AdamW(
                masters,
                lr=self.learning_rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                fused=fused,
            )
        return torch.optim.SGD(
            masters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=fused,
        )


class MasterOptimizer:
    """Updates masters from summed gradients; nothing is read back to the host."""

    def __init__(
        self,
        settings: OptimizerSettings,
        masters: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        shares: Shares | None = None,
    ) -> None:
        """`shares` say what other ranks have of the tensors; None: nothing."""
        self.settings = settings
        self._shares = shares
        self._grads = list(grads)
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
        self._optimizer = settings.build(masters)
        self.steps = 0

    def state(self, own: dict[str, Any] | None) -> dict[str, Any]:
        """What `restore` needs, besides the masters, whole: now, or when `own` was copied. A collective."""
        state = self._optimizer.state_dict() if own is None else own
        return state if self._shares is None else self._shares.whole_state(state)

    def copied_state(self) -> dict[str, Any]:
        """This rank's part of `state`, which no step changes any more."""
        state = self._optimizer.state_dict()
        copied = {
            n: {key: v.clone() if torch.is_tensor(v) else v for key, v in values.items()}
            for n, values in state["state"].items()
        }
        return {**state, "state": copied}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Go on after `steps` steps, which may have been taken on another device."""
        state = state if self._shares is None else self._shares.own_state(state)
        own = self._optimizer.param_groups
        groups = [
            {**group, "fused": now["fused"]} for group, now in zip(state["param_groups"], own, strict=True)
        ]
        self._optimizer.load_state_dict({**state, "param_groups": groups})
        self.steps = steps

    def step(self, count: torch.Tensor) -> torch.Tensor:
        """One update by the mean over `count` labels, after which the gradients are 0.

        `count` [] is on the device. Returns the norm [] of the gradient before clipping.
        """
        if self._shares is not None:
            self._shares.reduce(self._grads)
        share = 1.0 / count.clamp(min=1).to(self._grads[0].dtype)
        torch._foreach_mul_(self._grads, share)
        norms = torch._foreach_norm(self._grads)
        if self._shares is None:
            norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        else:
            norm = self._shares.norm(norms)
        if self.settings.max_grad_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ has it.
            torch._foreach_mul_(self._grads, (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate(self.steps)
        self._optimizer.step()
        torch._foreach_zero_(self._grads)
        self.steps += 1
        return norm
