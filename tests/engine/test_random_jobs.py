"""Whole jobs that nobody thought of: `coserve finetune` on a random dataset with random keys logs the steps, losses and
rates of a plain loop of torch around peft and comes to its adapter; ended anywhere and resumed with other keys of
checkpoints, some of them damaged, it writes the same log and the same adapter bit for bit.

`python -m tests.engine.test_random_jobs FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

from engine import evaluation, training
from engine.checkpoint import checkpoints
from engine.engine import Engine
from engine.finetune import Sample
from engine.lora import write_adapter
from engine.training import main as finetune
from engine.training_data import read_data
from engine.training_log import TrainingLog
from engine.training_settings import DTYPES, Settings
from sim.core.specs import LINEARS
from sim.policies.finetune_only import FinetuneOnly
from tests.engine.mixtures import try_seeds
from tests.engine.test_random_data import Draw, case_of, rates_of
from tests.engine.tiny import exact_norms, log_of

ADAPTER = "adapter_model.safetensors"


class Ended(BaseException):
    """The process is gone here."""


def job_of(draw: Draw, folder: Path) -> dict[str, Any]:
    """Keys of a short job that nothing refuses."""
    while True:
        case = case_of(draw, folder)
        keys = case.keys | {
            "cutoff_len": draw.some(16, 40, 64),
            "lora_rank": draw.count(1, 4),
            "lora_alpha": draw.some(1.0, 8.0),
            "lora_target": draw.some("all", draw.random.permutation(LINEARS)[: draw.count(1, 6)].tolist()),
            "use_rslora": draw.chance(0.3),
            "optim": draw.some("adamw", "adamw", "sgd"),
            "weight_decay": draw.some(0.0, 0.1),
            "max_grad_norm": draw.some(None, 1.0, 0.01),
            "learning_rate": draw.some(1e-3, 1e-2),
            "max_steps": draw.some(None, 3, 11),
            "num_train_epochs": draw.count(1, 3),
            "logging_steps": draw.count(1, 4),
            "save_steps": draw.count(1, 6),
            "save_total_limit": draw.some(None, 1, 2),
            "order": draw.some("layer_major", "window_major"),
        }
        if keys["optim"] == "adamw":
            keys |= {
                "adam_beta1": draw.some(0.9, 0.5),
                "adam_beta2": draw.some(0.999, 0.9),
                "adam_epsilon": draw.some(1e-6, 1e-4),  # of 1e-8, rounding decides the sign of a step
            }
        if keys["order"] == "window_major" and draw.chance(0.5):
            keys["memory"] = "recompute"
        if keys["val_size"]:
            keys["eval_steps"] = draw.count(1, 5)
        elif draw.chance(0.3):
            keys |= {"eval_dataset": keys["dataset"], "eval_steps": draw.count(1, 5)}
        with suppress(ValueError):
            if training.Training(Settings(**keys)).total <= 40:
                return keys


def run(keys: dict[str, Any], **changes: Any) -> None:
    training.train(Settings(**keys | changes), FinetuneOnly())


@contextmanager
def exact() -> Iterator[None]:
    """Everything in float64, and passes of evaluation that are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DTYPES, "float32", torch.float64)
        patch.setattr(evaluation, "PASS_TOKENS", 48)
        yield


def loss_of(model: Any, sample: Sample) -> tuple[Any, int]:
    """Summed over its labels, and how many they are."""
    tokens, labels = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.labels)
    logits = model(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits, labels[1:], reduction="sum"), int((labels[1:] != -100).sum())


def mean_loss(model: Any, samples: Sequence[Sample]) -> float:
    with torch.no_grad():
        losses, labels = zip(*(loss_of(model, sample) for sample in samples), strict=True)
    return float(sum(losses)) / sum(labels)


def expected_of(keys: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Rows of the log, and the adapter at the end."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    job = training.Training(Settings(**keys))
    with TemporaryDirectory() as start:
        write_adapter(job.job.adapter, start)
        base = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"], dtype=torch.float64)
        exact_norms(base)
        model = PeftModel.from_pretrained(base, start, is_trainable=True).double()
    own = [p for p in model.parameters() if p.requires_grad]
    if keys["optim"] == "sgd":
        optimizer: Any = torch.optim.SGD(own, weight_decay=keys["weight_decay"])
    else:
        betas = keys["adam_beta1"], keys["adam_beta2"]
        optimizer = torch.optim.AdamW(
            own, betas=betas, eps=keys["adam_epsilon"], weight_decay=keys["weight_decay"]
        )
    each, samples, rows, since = keys["gradient_accumulation_steps"], list(job.job.samples), [], []
    held_out = job.held_out
    epoch = len(read_data(Settings(**keys)).trained)
    rates = rates_of(keys, job.total)
    every = keys["eval_steps"]
    for step, rate in enumerate(rates, 1):
        batch = samples[(step - 1) * each : step * each]
        losses, labels = zip(*(loss_of(model, sample) for sample in batch), strict=True)
        loss = sum(losses) / sum(labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own, keys["max_grad_norm"] or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        since.append(loss.item())
        done = min(len(samples), step * each)
        if step % keys["logging_steps"] == 0 or step == len(rates):
            row = {"step": step, "loss": sum(since) / len(since), "grad_norm": float(norm)}
            rows.append(row | {"learning_rate": rate, "samples": done, "epoch": done / epoch})
            since = []
        if held_out and (step % every == 0 or step == len(rates)):
            row = {"step": step, "eval_loss": mean_loss(model, held_out), "epoch": done / epoch}
            rows.append(row)
    return rows, get_peft_model_state_dict(model)


def ended_somewhere(keys: dict[str, Any], draw: Draw) -> None:
    """Runs the job, or what is left of it, to a moment that nobody chose."""
    owner, name = draw.some(
        (Engine, "launch"),
        (Engine, "collect"),
        (Engine, "mean_loss"),
        (TrainingLog, "add"),
        (TrainingLog, "add_eval"),
        (os, "rename"),
        (shutil, "rmtree"),
        (training, "write_adapter"),
    )
    left, after, inner = draw.count(1, 30), draw.chance(0.5), getattr(owner, name)

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left <= 0 and not after:
            raise Ended
        result = inner(*given, **named)
        if left <= 0:
            raise Ended
        return result

    folder = Path(keys["output_dir"])
    whole = [path for path in checkpoints(folder) if (path / "optimizer.pt").stat().st_size]
    if len(whole) > 1 and draw.chance(0.5):
        (whole[0] / "optimizer.pt").write_bytes(b"")
    changed = {"save_steps": draw.count(1, 6), "save_total_limit": draw.some(None, 1, 2), "resume": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        with suppress(Ended):
            run(keys, **changed)


def check(seed: int) -> None:
    draw = Draw(seed, 5)
    with TemporaryDirectory() as name, exact():
        folder = Path(name)
        keys = job_of(draw, folder)
        rows, tensors = expected_of(keys)
        assert finetune([f"{key}={json.dumps(value)}" for key, value in keys.items()]) == 0
        log = log_of(folder / "out")
        assert len(log) == len(rows)
        for row, wanted in zip(log, rows, strict=True):
            assert row == pytest.approx(wanted, rel=1e-6)
        trained = load_file(folder / "out" / ADAPTER)
        assert set(trained) == set(tensors)
        for key, tensor in trained.items():
            torch.testing.assert_close(tensor, tensors[key], rtol=1e-6, atol=1e-7)

        cut = folder / "cut"
        for _ in range(draw.count(1, 3)):
            ended_somewhere(keys | {"output_dir": str(cut)}, draw)
        run(keys, output_dir=str(cut), resume=True)
        assert log_of(cut) == log
        assert (cut / ADAPTER).read_bytes() == (folder / "out" / ADAPTER).read_bytes()


@pytest.mark.parametrize("seed", range(2))
def test_a_job_trains_as_torch_and_peft_do_wherever_it_is_cut(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
