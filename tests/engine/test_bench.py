"""`coserve bench` serves and finetunes for real and leaves a simulator's run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from engine.bench import CONFIGS, _jobs, main
from engine.lora import read_adapter
from engine.text import BUNDLED, byte_tokens, packed_samples, read_text
from sim.assemble import CONFIGS as SIMULATOR
from sim.checked import build
from sim.core.rows import ITERATION_COLUMNS, REQUEST_COLUMNS, STEP_COLUMNS
from sim.core.specs import ModelShape
from sim.results import read_run

SHORT = ["workload.duration_s=3", "run.drain_s=10", "measure_s=3", "job.sample_tokens=64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_a_bench_serves_every_request_and_trains_an_adapter_that_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, f"hydra.run.dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "coserving" in out and "SLO met" in out
    run = read_run(folder)
    assert run.summary["source"] == "engine" and run.summary["device"] == "cpu"
    requests, iterations, steps = (run.table(name) for name in ("requests", "iterations", "steps"))
    assert list(requests.columns) == [*REQUEST_COLUMNS, "source"]
    assert list(iterations.columns) == [*ITERATION_COLUMNS, "source"]
    assert list(steps.columns) == [*STEP_COLUMNS, "source"]
    assert set(iterations["source"]) == {"engine"}
    assert run.summary["finished"] == run.summary["requests"] == len(requests) > 3
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert (iterations["end_s"] > iterations["start_s"]).all()
    assert np.isfinite(iterations["predicted_s"]).any()
    assert run.summary["finetune_tok_s"] > 0 and len(steps) > 0
    together = (iterations["forward_tokens"] > 0) & (iterations["decode_count"] > 0)
    assert together.any(), "windows and decodes shared iterations"
    shape = _model_shape()
    adapter = read_adapter(folder / "adapter", shape)
    assert any(bool(b.abs().max() > 0) for b in adapter.b.values()), "it was trained"
    losses = out.split("loss:")[1].split()
    assert float(losses[2]) < float(losses[0])


def _config(overrides: Sequence[str] = ()) -> DictConfig:
    OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("bench", list(overrides))


def _model_shape() -> ModelShape:
    return build(ModelShape, _config().model, "model")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("job.order=sideways", "order must be one of"),
        ("job.optimizer.kind=adam", "optimizer.kind must be one of adamw, sgd, got 'adam'"),
        ("job.data=nowhere.txt", "nowhere.txt does not exist"),
        ("policy=separate", "is for several pipelines; coserve bench runs one"),
        ("device=h100", "needs a CUDA device"),
        ("+more_jobs.second.weight=0", "weight must be above 0, got 0"),
        ("+more_jobs.second.rank=4", "more_jobs.second has no key 'rank'"),
        ("+more_jobs.job.weight=2", "more_jobs.job: a name must not be job"),
        ("+more_jobs.second=3", "more_jobs.second must be a group of keys of job, got 3"),
        ("limits.kv_tokens=few", "limits.kv_tokens must be a whole number, got 'few'"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    folder: Path, argument: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, argument, f"hydra.run.dir={folder}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (folder / "summary.json").exists()


def test_jobs_beside_the_first_differ_in_what_is_said_of_them() -> None:
    config = _config(["+more_jobs.second.weight=3", "+more_jobs.second.lora.rank=4", "job.accumulation=1"])
    first, second = _jobs(config).values()
    assert (first.weight, first.lora.rank, first.accumulation) == (1.0, 8, 1)
    assert second == replace(first, weight=3.0, lora=replace(first.lora, rank=4))


def test_two_jobs_leave_an_adapter_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = ["+more_jobs.second.weight=3", "+more_jobs.second.lora.rank=4", "job.accumulation=1"]
    assert main([*SHORT, *second, "policy=temporal", "policy.interval=4", f"hydra.run.dir={folder}"]) == 0
    counts = read_run(folder).table("steps")["job"].value_counts()
    assert counts["job"] > 0 and counts["second"] > 0
    shape = _model_shape()
    ranks = {name: read_adapter(folder / name, shape).rank for name in ("adapter", "adapter_second")}
    assert ranks == {"adapter": 8, "adapter_second": 4}
    out = capsys.readouterr().out
    assert ", job)" in out and ", second)" in out


def test_the_bundled_text_becomes_samples_of_bytes(tmp_path: Path) -> None:
    tokens = byte_tokens(read_text(BUNDLED))
    samples = packed_samples(tokens, 256)
    assert len(samples) > 8 and all(len(s.tokens) == 256 for s in samples)
    assert np.array_equal(np.concatenate([s.tokens for s in samples]), tokens[: 256 * len(samples)])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"text": "fine"}, {"words": "not"}]))
    with pytest.raises(ValueError, match="row 2 must be a record with a text"):
        read_text(path)
