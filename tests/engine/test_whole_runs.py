"""Whole runs by other means: through the Triton kernels, interpreted, and in bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kernels import (
    attention_backward,
    dropout,
    grouped_lora,
    lora_expand,
    lora_shrink,
    lora_weight_grad,
    paged_attention,
    write_kv,
)
from engine.sampling import Sampling
from sim.core.request import Request
from tests.engine.kernels.watched import not_interpreted
from tests.engine.tiny import EngineRun, JobSetup, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import LinearCost, build_policy, limits_of

ROOT = Path(__file__).resolve().parents[2]


def small_run(dtype: torch.dtype = torch.float32) -> EngineRun:
    """Three requests, on the base model, an adapter and the job's own, beside a step of two samples."""
    prompts = {}
    for id, adapter in enumerate((None, "wide", "job")):
        prompt = tokens_of(5 + 9 * id, seed=id)
        prompts[id] = (Request(id, 0.0, len(prompt), 4, "default", adapter), prompt, Sampling())
    job = JobSetup(
        samples=[sample_of(18, seed=1), sample_of(9, seed=2)],
        adapter=replace(
            adapter_of("llama", 4, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]), dropout=0.1
        ),
        order="window_major",
        memory="recompute",
        max_tokens=32,
    )
    predictor = LinearCost(forward_s=2.0**-9, backward_s=2.0**-10, optimizer_s=0.0)
    return EngineRun(
        tiny_model("llama", dtype),
        build_policy("coserving", predictor=predictor, budget_s=0.03),
        limits_of(block_tokens=16, max_tokens=20),
        prompts,
        adapters={"wide": adapter_of("llama", 8, ["k_proj", "up_proj", "down_proj"], seed=3)},
        jobs=[job],
    )


def compare_kernels_with_references() -> None:
    """For a process that interprets Triton: the same run by references, then by the kernels."""
    reference = small_run()
    lora = (grouped_lora, lora_shrink, lora_expand, lora_weight_grad)
    for module in (attention_backward, dropout, *lora, paged_attention, write_kv):
        module.uses_triton = lambda tensor: True  # type: ignore[attr-defined]
    own = small_run()
    assert own.tokens == reference.tokens
    for id, rows in reference.logits.items():
        torch.testing.assert_close(torch.stack(own.logits[id]), torch.stack(rows), atol=1e-4, rtol=1e-4)
    assert len(own.engine.steps) == 1
    assert own.engine.steps[0].loss == pytest.approx(reference.engine.steps[0].loss, rel=1e-5)
    trained = zip(own.trainers[0].masters.tensors(), reference.trainers[0].masters.tensors(), strict=True)
    for ours, other in trained:
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_the_engine_through_its_kernels_equals_the_references() -> None:
    if reason := not_interpreted():
        pytest.skip(reason)
    program = (
        f"from tests.engine.{Path(__file__).stem} import compare_kernels_with_references\n"
        "from tests.engine.kernels.watched import watch\n"
        "watch(); compare_kernels_with_references()"
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_bfloat16_serves_and_trains_close_to_float32() -> None:
    """Eight bits of mantissa through three layers of large random weights: 5 % of the logits' spread."""
    half, full = small_run(torch.bfloat16), small_run()
    first = {id: rows[0] for id, rows in full.logits.items()}
    for id, row in first.items():
        assert half.logits[id][0].dtype == torch.bfloat16
        assert (half.logits[id][0].float() - row).abs().mean() < 0.05 * row.std()
    assert half.engine.steps[0].loss == pytest.approx(full.engine.steps[0].loss, rel=0.02)
    assert half.engine.steps[0].grad_norm == pytest.approx(full.engine.steps[0].grad_norm, rel=0.1)
    assert all(t.dtype == torch.float32 for t in half.trainers[0].masters.tensors())
