"""The settings of a finetuning run, by LLaMA-Factory's names where it has one, and what they may be."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from engine.load import check_model_folder
from engine.lora import LARGEST_SCALE
from engine.optimizer import CONSTANT, KINDS, LARGEST_RATE, SCHEDULES, OptimizerSettings
from sim.core.finetune import AUTO, MEMORIES, ORDERS
from sim.core.specs import LINEARS, LoraSpec
from sim.errors import keys_as

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAY_CHANGE = (
    "output_dir",
    "resume",
    "device",
    "tp",
    "save_steps",
    "save_total_limit",
    "report_to",
    "order",
    "memory",
    "dataset",
    "eval_dataset",
    "eval_steps",
    "model_name_or_path",
)
"""Settings that a resumed run may state differently; paths may have moved."""
CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": tuple(DTYPES),
    "optim": KINDS,
    "lr_scheduler_type": SCHEDULES,
    "order": ORDERS,
    "memory": (*MEMORIES, AUTO),
    "report_to": ("none", "tensorboard"),
}
LEAST = {
    "tp": 1,
    "cutoff_len": 2,  # a token is trained on to follow from another
    "max_samples": 1,
    "lora_rank": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_steps": 1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "seed": 0,
    "weight_decay": 0,
    "val_size": 0,
    "eval_steps": 1,
}
ABOVE_0 = ("learning_rate", "lora_alpha", "max_grad_norm")
MOST = {
    "val_size": 1e9,
    "learning_rate": LARGEST_RATE["adamw"],
    "weight_decay": LARGEST_RATE["adamw"],
    "lora_alpha": LARGEST_SCALE,
}
ADAMS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""Of AdamW alone, as they are unless given."""
OPTIMIZER_KEYS = {
    "optimizer.betas ": "adam_beta1 and adam_beta2 ",
    "optimizer.eps ": "adam_epsilon ",
    "optimizer.warmup_steps ": "warmup_steps or warmup_ratio ",
}
"""What the optimizer's own errors call a key -> what it is called here."""
OPTIONAL = ("max_samples", "max_steps", "save_total_limit", "max_grad_norm", "eval_steps")
"""May be null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of `finetune.yaml`."""

    model_name_or_path: str
    dataset: str
    output_dir: str
    resume: bool
    device: str
    tp: int
    dtype: str
    seed: int
    cutoff_len: int
    max_samples: int | None
    packing: bool
    train_on_prompt: bool
    eval_dataset: str | None
    val_size: float
    eval_steps: int | None
    lora_rank: int
    lora_alpha: float
    lora_target: tuple[str, ...] | str
    lora_dropout: float
    use_rslora: bool
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_steps: int | None
    optim: str
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    lr_scheduler_type: str
    warmup_steps: int
    warmup_ratio: float
    logging_steps: int
    report_to: str
    save_steps: int
    save_total_limit: int | None
    order: str
    memory: str

    def __post_init__(self) -> None:
        check_model_folder(self.model_name_or_path)
        for key, what in (("dataset", "a file"), ("eval_dataset", "a file"), ("output_dir", "a folder")):
            given = getattr(self, key)
            if given is not None and not given.strip():
                raise ValueError(f"{key} must be {what}, got nothing")
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key, least in LEAST.items():
            self._require(key, f"at least {least}", least, MOST.get(key, math.inf))
        for key in ABOVE_0:
            self._require(key, "above 0", math.ulp(0.0), MOST.get(key, math.inf))
        self._require("warmup_ratio", "between 0 and 1", 0, 1)
        self._require("lora_dropout", "at least 0 and below 1", 0, math.nextafter(1, 0))
        if self.val_size > 1 and self.val_size % 1:
            raise ValueError(f"val_size must be a share below 1 or a number of samples, got {self.val_size}")
        if self.eval_dataset is not None and self.val_size:
            raise ValueError(
                "only one of eval_dataset and val_size may be given, "
                f"got {self.eval_dataset} and {self.val_size:g}"
            )
        if self.eval_steps is not None and not self.evaluates:
            raise ValueError(
                f"eval_steps changes nothing without eval_dataset or val_size, got {self.eval_steps}"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                "only one of warmup_steps and warmup_ratio may be given, "
                f"got {self.warmup_steps} and {self.warmup_ratio}"
            )
        unknown = [target for target in self.targets if target not in LINEARS]
        if unknown or not self.targets:
            raise ValueError(
                f"lora_target must be all, or a list of {', '.join(LINEARS)}, got {self.lora_target!r}"
            )
        if self.memory == "recompute" and self.order != "window_major":
            raise ValueError(f"memory=recompute needs order=window_major, got {self.order}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a CUDA device, and torch finds none")
        if self.optim != "adamw":
            for key in ADAMS:
                if getattr(self, key) != ADAMS[key]:
                    raise ValueError(
                        f"{key} changes nothing with optim={self.optim}, got {getattr(self, key)}"
                    )
        with keys_as(OPTIMIZER_KEYS):
            self.optimizer(1)

    def _require(self, key: str, rule: str, least: float, most: float) -> None:
        value = getattr(self, key)
        if value is None and key in OPTIONAL:
            return
        if not (math.isfinite(value) and least <= value <= most):
            bound = f" and at most {MOST[key]:g}" if key in MOST else ""
            or_null = " or null" if key in OPTIONAL else ""
            raise ValueError(f"{key} must be {rule}{bound}{or_null}, got {value}")

    @property
    def targets(self) -> tuple[str, ...]:
        given = self.lora_target
        if given == "all":
            return LINEARS
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        return tuple(dict.fromkeys(names))

    @property
    def evaluates(self) -> bool:
        """Whether there are samples that nothing is trained on."""
        return self.eval_dataset is not None or self.val_size > 0

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(rank=self.lora_rank, alpha=self.lora_alpha, targets=self.targets)

    def optimizer(self, total_steps: int) -> OptimizerSettings:
        """Of a run of so many steps."""
        return OptimizerSettings(
            kind=self.optim,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            schedule=self.lr_scheduler_type,
            # As transformers rounds the ratio.
            warmup_steps=self.warmup_steps or math.ceil(total_steps * self.warmup_ratio),
            total_steps=None if self.lr_scheduler_type in CONSTANT else total_steps,
        )

    @property
    def fixed(self) -> dict[str, Any]:
        """What a checkpoint's successor must agree with."""
        return {
            key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in MAY_CHANGE
        }
