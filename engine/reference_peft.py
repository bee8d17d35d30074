"""The same finetuning by `transformers` and `peft`: what most people run today, on the same weights.

The Hugging Face model is built around the engine's own tensors, so both fit one device and start from the
same numbers. Defaults are those of a `Trainer(bf16=True)`: SDPA, adapters in float32 under bfloat16 autocast,
HF's own loss over all logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from engine.config import hf_config
from engine.finetune import Sample
from engine.load import named_tensors
from engine.model import Model
from engine.reference_timing import Times, timed
from sim.core.specs import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to run PEFT."""

    checkpointing: bool = False
    float32_adapters: bool = True
    """PEFT's default; else adapters have the model's type."""
    liger: bool = False
    """Liger's kernels for norm, rotation, SwiGLU and the fused loss."""

    @property
    def name(self) -> str:
        parts = ["peft"]
        parts += ["liger"] * self.liger
        parts += ["half adapters"] * (not self.float32_adapters)
        parts += ["checkpointing"] * self.checkpointing
        return " + ".join(parts)


SETUPS = (
    Setup(),
    Setup(checkpointing=True),
    Setup(float32_adapters=False),
    Setup(liger=True, float32_adapters=False),
    Setup(liger=True, float32_adapters=False, checkpointing=True),
)
"""The default first; each of the others saves time or memory that a careful user would save."""


class LigerMissing(ImportError):
    """Liger's kernels cannot run here."""


def hf_model(model: Model, liger: bool = False) -> Any:
    """The engine's model as a `transformers` one that shares its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config(model.config))
    config.use_cache = False
    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        built = build(config, dtype=model.dtype, attn_implementation="sdpa")
    built.load_state_dict(dict(named_tensors(model)), assign=True, strict=False)
    built.tie_weights()
    with torch.device(model.device):
        built.model.rotary_emb = type(built.model.rotary_emb)(config)
    left = [name for name, tensor in [*built.named_parameters(), *built.named_buffers()] if tensor.is_meta]
    assert not left, f"without weights: {left}"
    if liger:
        _apply_liger(built, model.config.family)
    return built


def peft_model(model: Model, lora: LoraSpec, setup: Setup) -> Any:
    """The PEFT model in training mode, with a fresh adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    base = hf_model(model, setup.liger)
    if setup.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made: Any = get_peft_model(base, config, autocast_adapter_dtype=setup.float32_adapters)
    made.train()
    return made


def loss_of(made: Any, sample: Sample, autocast: bool) -> torch.Tensor:
    """HF's loss of one sample: the mean over its labels."""
    device = next(made.parameters()).device
    ids = torch.from_numpy(sample.tokens).to(device, torch.int64)[None]
    labels = torch.from_numpy(sample.labels).to(device)[None]
    context: AbstractContextManager[Any] = nullcontext()
    if autocast:
        context = torch.autocast(device.type, torch.bfloat16)
    with context:
        out = made(input_ids=ids, labels=labels)
    loss: torch.Tensor = out.loss
    return loss


def peft_times(
    model: Model, lora: LoraSpec, samples: list[Sample], setup: Setup, rate: float, seconds: float
) -> Times:
    """Forward, backward and an AdamW step with clipping, for one sample at a time."""
    made = peft_model(model, lora, setup)
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order: Iterator[Sample] = cycle(samples)
    autocast = model.dtype == torch.bfloat16

    def step() -> None:
        loss_of(made, next(order), autocast).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, model.device, seconds)


def _apply_liger(built: Any, family: str) -> None:
    """Liger's kernels in this instance. Raises LigerMissing where they cannot run."""
    if not torch.cuda.is_available():
        raise LigerMissing("needs a GPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2
    except ImportError as error:
        raise LigerMissing(f"not installed: {error}") from None
    apply = apply_liger_kernel_to_llama if family == "llama" else apply_liger_kernel_to_qwen2
    apply(model=built, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
