"""The loss of samples that nothing is trained on is what peft gives for the adapter of the same step."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine import evaluation, training
from engine.engine import Engine
from engine.training import main as finetune
from engine.training_log import TrainingLog
from engine.training_settings import Settings
from tests.engine.tiny import log_of, without_notes


@pytest.fixture(params=[40, 2048], ids=["windows", "one pass"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a forward pass."""
    monkeypatch.setattr(evaluation, "PASS_TOKENS", request.param)
    return int(request.param)


def peft_loss(model_folder: Path, adapter: Path, rows: list[list[int]]) -> float:
    """Mean over all labels."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()
    with torch.no_grad():
        parts = [
            F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            for ids in map(torch.tensor, rows)
        ]
    return float(sum(parts)) / sum(len(row) - 1 for row in rows)


def held_out_rows(tokenizer: Any) -> list[list[int]]:
    """Of texts of up to 160 tokens."""
    texts = ["The harbour " * n + "ends." for n in (1, 25, 2, 3, 9, 1, 28)]
    Path("e.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]


def test_the_loss_is_that_of_peft_at_every_measured_step(
    passes: int, arguments: list[str], model_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout in training, and none here."""
    rows = held_out_rows(tokenizer)
    assert 80 < max(map(len, rows)) < 160
    own = ["cutoff_len=160", "eval_dataset=e.jsonl", "lora_dropout=0.2", "num_train_epochs=1", "eval_steps=6"]
    assert finetune([*arguments, *own, "max_steps=10"]) == 0
    log = log_of(Path("out"))
    measured = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    assert [*measured] == [6, 10]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 11))
    assert measured[6] == pytest.approx(peft_loss(model_folder, Path("out/checkpoint-6"), rows), rel=1e-5)
    assert measured[10] == pytest.approx(peft_loss(model_folder, Path("out"), rows), rel=1e-5)
    assert f"eval loss {measured[10]:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "count"), [("0.2", 5), ("5", 5), ("0.01", 1), ("23", 23)])
def test_what_is_evaluated_is_not_trained_on(size: str, count: int, arguments: list[str]) -> None:
    settings = Settings(**settings_of(arguments, val_size=float(size), eval_steps=2))
    made = training.Training(settings)
    trained = [sample.tokens.tobytes() for sample in made.job.samples]
    held_out = [sample.tokens.tobytes() for sample in made.held_out]
    assert len(held_out) == count == 24 - len(set(trained))
    assert not set(held_out) & set(trained)
    other = training.Training(Settings(**settings_of(arguments, val_size=float(size), seed=1)))
    assert {sample.tokens.tobytes() for sample in other.held_out} != set(held_out) or count == 23


def test_as_many_rows_are_evaluated_as_are_trained_on(arguments: list[str]) -> None:
    """As in LLaMA-Factory, where max_samples is of each data set."""
    for most in (5, 30):
        given = settings_of(arguments, eval_dataset="d.jsonl", max_samples=most, num_train_epochs=1)
        made = training.Training(Settings(**given))
        assert len(made.held_out) == len(list(made.job.samples)) == min(most, 24)


def settings_of(arguments: list[str], **changes: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    given = OmegaConf.merge(
        OmegaConf.load(training.CONFIGS / "finetune.yaml"), OmegaConf.from_dotlist(arguments), changes
    )
    plain: Any = OmegaConf.to_container(given)
    return {key: plain[key] for key in plain if key not in ("defaults", "hydra", "policy")}


def test_a_resumed_run_has_the_log_of_one_that_was_not_stopped(arguments: list[str]) -> None:
    """And trains the same: measuring changes nothing."""
    plain = [*arguments, "max_steps=9"]
    evaluated = [*plain, "val_size=0.25", "lora_dropout=0.1"]
    assert finetune([*evaluated, "output_dir=whole"]) == 0
    shutil.copytree("whole/checkpoint-3", "out/checkpoint-3")
    rows = Path("whole/trainer_log.jsonl").read_text().splitlines(keepends=True)
    Path("out/trainer_log.jsonl").write_text("".join(rows[:6]))
    assert finetune([*evaluated, "resume=true"]) == 0
    assert log_of(Path("out")) == log_of(Path("whole"))
    steps = [row["step"] for row in log_of(Path("out")) if "eval_loss" in row]
    assert steps == [3, 6, 9], "with the checkpoints, unless eval_steps says otherwise"
    assert all(math.isfinite(row["eval_loss"]) for row in log_of(Path("out")) if "eval_loss" in row)


@pytest.mark.parametrize("stopped_at", [3, 9])
def test_a_run_that_is_stopped_while_it_measures_loses_neither_training_nor_the_measurement(
    stopped_at: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks its engine for nothing more: ranks may be anywhere in the measurement."""
    evaluated = [*arguments, "max_steps=9", "val_size=0.25"]
    assert finetune([*evaluated, "output_dir=whole"]) == 0
    measure, stopped = Engine.mean_loss, []

    def stop(engine: Engine, *given: Any) -> float:
        if engine.steps[-1].step < stopped_at:
            return measure(engine, *given)
        stopped.append(True)
        raise KeyboardInterrupt

    def adapter(engine: Engine, job: str) -> Any:
        assert not stopped
        return engine.trainers[job].adapter()

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "mean_loss", stop)
        patch.setattr(Engine, "adapter", adapter)
        assert finetune(evaluated) == 130
    assert Path(f"out/checkpoint-{stopped_at}").is_dir()
    assert finetune([*evaluated, "resume=true"]) == 0
    assert log_of(Path("out")) == log_of(Path("whole"))


def test_the_time_of_measuring_is_no_training_time(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still but for a second in each measurement, so that training takes no time at all."""
    now_s = [0.0]

    def slow(*given: Any) -> float:
        now_s[0] += 1.0
        return 1.0

    monkeypatch.setattr("engine.engine.mean_loss", slow)
    monkeypatch.setattr("engine.training_log.time.perf_counter", lambda: now_s[0] + 1e-3 * next(ticks))
    ticks = iter(range(10**6))
    assert finetune([*arguments, "max_steps=4", "val_size=2", "eval_steps=1"]) == 0
    rows = [json.loads(line) for line in Path("out/trainer_log.jsonl").read_text().splitlines()]
    rates = [row["tok_s"] for row in rows if "tok_s" in row]
    assert len(rates) == 4 and min(rates) > 1000
    assert [row["elapsed_s"] >= n for n, row in enumerate(row for row in rows if "tok_s" in row)] == [
        True
    ] * 4


def test_a_loss_that_is_no_number_is_null_in_the_log(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.mean_loss", lambda *given: math.nan)
    assert finetune([*arguments, "max_steps=1", "val_size=2"]) == 0
    last = Path("out/trainer_log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=lambda name: pytest.fail(name))["eval_loss"] is None


def test_a_disk_that_is_full_when_the_loss_is_written_is_one_line_and_costs_no_checkpoint(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter = TrainingLog.__enter__

    def full(self: TrainingLog) -> TrainingLog:
        enter(self)
        self._file.close()
        self._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the log
        return self

    monkeypatch.setattr(TrainingLog, "__enter__", full)
    own = ["max_steps=5", "save_steps=1", "val_size=2", "logging_steps=100", "eval_steps=2"]
    assert finetune([*arguments, *own]) == 2
    assert without_notes(capsys.readouterr().err) == [
        "coserve finetune: error: No space left on device: out/trainer_log.jsonl"
    ]
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
