"""A finetuning run that is killed, runs out of disk or finds damage goes on as if nothing had happened."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from engine import checkpoint, saver, training
from engine.checkpoint import Progress, last_checkpoint
from engine.engine import Engine, StepRecord
from engine.lora import Adapter, read_adapter, write_adapter
from engine.saver import Frozen, Saver
from engine.training import main as finetune
from sim.core.finetune import Step
from tests.engine.tiny import (
    EngineRun,
    JobSetup,
    adapter_of,
    config_of,
    log_of,
    sample_of,
    tiny_model,
    without_notes,
)
from tests.support import build_policy, limits_of


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A forked process has no pool of threads; and the same sums need the same threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    torch.set_num_threads(before)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# Kills


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, count: int, after: bool = False) -> None:
    """Die in the `count`-th call, before or after it is done."""
    inner, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*given: Any, **named: Any) -> Any:
        now = next(calls) == count
        if now and not after:
            kill()
        result = inner(*given, **named)
        if now:
            kill()
        return result

    setattr(owner, name, wrapped)


def half_a_file() -> None:
    write = Path.write_bytes

    def half(self: Path, data: Any) -> int:
        if self.name == "optimizer.pt":
            write(self, data[: len(data) // 2])
            kill()
        return write(self, data)

    Path.write_bytes = half  # type: ignore[method-assign, assignment]


def while_removing() -> None:
    remove = shutil.rmtree

    def half(path: Path, *given: Any, **named: Any) -> None:
        if path.name.endswith(".removed") and path.exists():
            (path / "optimizer.pt").unlink()
            kill()
        remove(path, *given, **named)

    shutil.rmtree = half  # type: ignore[assignment]


def between_the_last_files() -> None:
    write = training.write_adapter

    def last(*given: Any) -> None:
        at(os, "replace", 1, after=True)
        write(*given)

    training.write_adapter = last


KILLS: dict[str, Callable[[], None]] = {
    "in an iteration": lambda: at(Engine, "launch", 5),
    "in the middle of a file": half_a_file,
    "before a checkpoint has its name": lambda: at(os, "rename", 1),
    "after a checkpoint has its name": lambda: at(os, "rename", 1, after=True),
    "while an old checkpoint is removed": while_removing,
    "waiting for the device": lambda: at(Engine, "collect", 9),
    "between the files of the last adapter": between_the_last_files,
}


def forked(arguments: list[str], prepare: Callable[[], None]) -> int:
    """`coserve finetune` in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            finetune([*arguments, "resume=true"])
        finally:
            os._exit(1)
    return pid


def test_a_killed_run_goes_on_to_the_same_adapter_bit_for_bit(arguments: list[str]) -> None:
    """Killed wherever it hurts, one after the other, and at moments that nobody chose."""
    arguments = [*arguments, "logging_steps=2", "save_total_limit=2", "lora_dropout=0.1"]
    assert finetune([*arguments, "output_dir=whole"]) == 0
    random = np.random.default_rng()
    for where, prepare in KILLS.items():
        if where.startswith("between"):
            for _ in range(2):
                pid = forked(arguments, lambda: None)
                # The run goes on for a few hundred milliseconds; one that is through is killed too late.
                time.sleep(float(random.uniform(0.05, 0.4)))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        _, status = os.waitpid(forked(arguments, prepare), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, where
    assert finetune([*arguments, "resume=true"]) == 0
    assert adapter_bytes(Path("out")) == adapter_bytes(Path("whole"))
    assert log_of(Path("out")) == log_of(Path("whole"))
    kept = {name for name in names("out") if not name.startswith(".")}
    assert kept == names("whole") and {"checkpoint-21", "checkpoint-24"} < kept


def before_an_old_one_is_removed() -> None:
    remove = checkpoint._remove

    def last(path: Path) -> None:
        if path.name != "checkpoint-6" and Path("out/checkpoint-6").exists():
            kill()
        remove(path)

    checkpoint._remove = last


def test_a_run_that_was_killed_at_its_end_leaves_as_many_checkpoints_as_another(arguments: list[str]) -> None:
    arguments = [*arguments, "max_steps=6", "save_total_limit=1"]
    _, status = os.waitpid(forked(arguments, before_an_old_one_is_removed), 0)
    assert os.WIFSIGNALED(status) and {"checkpoint-3", "checkpoint-6"} < names("out")
    assert finetune([*arguments, "resume=true"]) == 0
    assert [name for name in names("out") if name.startswith("checkpoint")] == ["checkpoint-6"]


# Disks


def quota(save: Callable[..., Any]) -> Callable[..., Any]:
    """The system refuses files above 4,000 bytes."""

    def limited(*given: Any) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        try:
            return save(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def full(save: Callable[..., Any]) -> Callable[..., Any]:
    """All is written, and then the disk has no room for it after all."""

    def limited(*given: Any) -> Any:
        def fsync(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", fsync)
            return save(*given)

    return limited


@pytest.mark.parametrize(("refuse", "words"), [(quota, "File too large"), (full, "No space left on device")])
def test_a_full_disk_stops_training_with_older_checkpoints_whole_and_no_half_one(
    refuse: Any, words: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save, calls = training.save_checkpoint, itertools.count(1)

    def third(*given: Any) -> Any:
        return refuse(save)(*given) if next(calls) == 3 else save(*given)

    monkeypatch.setattr(training, "save_checkpoint", third)
    assert finetune(arguments) == 2
    error = capsys.readouterr().err
    assert f"checkpoint of step 9: {words}" in error and len(without_notes(error)) == 1
    assert names("out") == {"checkpoint-3", "checkpoint-6", "trainer_log.jsonl"}


def test_a_full_disk_does_not_cost_a_run_that_goes_on_its_log(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(arguments) == 0
    log = Path("out/trainer_log.jsonl")
    rows = log.read_bytes()
    assert len(rows) > 4000
    monkeypatch.setattr(training.TrainingLog, "__enter__", quota(training.TrainingLog.__enter__))
    assert finetune([*arguments, "resume=true"]) == 0
    assert log.read_bytes() == rows


# Damage

DAMAGES: dict[str, Callable[[Path], object]] = {
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "state.json is not JSON": lambda path: (path / "state.json").write_text('{"step": 6'),
    "state.json must hold an object": lambda path: (path / "state.json").write_text("[6]"),
    "state.json.sha256 must be a group of keys, got None": lambda path: restate(path, sha256=None),
    "state.json.sha256.optimizer.pt must be text": lambda path: restate(path, sha256={"optimizer.pt": 3}),
    "state.json.sha256.adapter_config.json is missing": lambda path: restate(path, sha256={}),
    "state.json.samples must be a whole number, got '12'": lambda path: restate(path, samples="12"),
    "state.json.samples must be at least 1, got -1": lambda path: restate(path, samples=-1),
    "state.json.unlogged[0] must be a number": lambda path: restate(path, unlogged=["x"]),
    "state.json.settings must be a group of keys": lambda path: restate(path, settings=3),
    "state.json is of step 9": lambda path: restate(path, step=9),
    "optimizer.pt is missing": lambda path: (path / "optimizer.pt").unlink(),
    "optimizer.pt is damaged": lambda path: os.truncate(path / "optimizer.pt", 1000),
    "adapter_model.safetensors is damaged": lambda path: flip(path / "adapter_model.safetensors"),
}


def restate(path: Path, **changes: Any) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "max_steps=6"]
    assert finetune(arguments) == 0
    good = adapter_bytes(Path("out"))
    shutil.copytree("out", "kept")
    for words, damage in DAMAGES.items():
        shutil.rmtree("out")
        shutil.copytree("kept", "out")
        damage(Path("out/checkpoint-6"))
        capsys.readouterr()
        assert finetune([*arguments, "resume=true"]) == 0
        error = capsys.readouterr().err
        assert f"checkpoint-6 is not a whole checkpoint: {words}" in error
        assert "; it is passed over" in error
        assert not without_notes(error)
        assert adapter_bytes(Path("out")) == good
        assert last_checkpoint("out", pytest.fail) == Path("out/checkpoint-6"), "made anew"


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """save_total_limit counts from the one that was written last."""
    arguments = [*arguments, "max_steps=9", "save_total_limit=1", "resume=true"]
    assert finetune(arguments[:-2]) == 0
    for damaged in ("checkpoint-6", "checkpoint-9"):
        DAMAGES["optimizer.pt is damaged"](Path("out", damaged))
    save = checkpoint.save_checkpoint

    def saved(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", saved)
    assert finetune([*arguments, "save_steps=4"]) != 0
    assert last_checkpoint("out", lambda _: None) == Path("out/checkpoint-4")


def test_without_a_whole_checkpoint_nothing_goes_on(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune([*arguments, "max_steps=3"]) == 0
    DAMAGES["optimizer.pt is damaged"](Path("out/checkpoint-3"))
    before = adapter_bytes(Path("out"))
    assert finetune([*arguments, "max_steps=3", "resume=true"]) == 2
    assert "out has no whole checkpoint to go on from" in capsys.readouterr().err
    assert adapter_bytes(Path("out")) == before


def test_two_processes_do_not_train_into_one_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    other = os.open("out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert finetune([*arguments, "max_steps=1"]) == 2
    assert "output_dir: another process trains into out\n" in capsys.readouterr().err
    assert not names("out")
    os.close(other)
    assert finetune([*arguments, "max_steps=1"]) == 0
    other = os.open("out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run has left nothing that holds it
    os.close(other)


# What a checkpoint holds


def steps_of(lookahead: int) -> dict[int, Frozen]:
    """Every step as a checkpoint would have it, of a job whose samples fit an iteration."""
    job = JobSetup(
        samples=[sample_of(9, seed=n) for n in range(5)],
        adapter=adapter_of("llama", 2, ("q_proj", "down_proj")),
        accumulation=1,
    )
    found = {}

    def watch(engine: Engine) -> None:
        def on_step(record: StepRecord) -> None:
            found[record.step] = Frozen(engine, "job")

        engine.on_step = on_step

    policy, limits = build_policy("finetune_only"), limits_of(lookahead=lookahead)
    run = EngineRun(tiny_model("llama"), policy, limits, {}, jobs=[job], watch=watch)
    ahead = [type(plan.finetune[0]) is Step for plan in run.policy.plans]
    assert ahead == [False, *[True] * 5], "a step in every iteration"
    return found


def test_a_checkpoint_is_of_its_step_although_the_next_is_under_way() -> None:
    """With a lookahead the next step is launched before the result of the last is out."""
    plain, ahead = steps_of(0), steps_of(1)
    assert [*ahead] == [*plain] == [1, 2, 3, 4, 5]
    for step, wanted in plain.items():
        adapters = (frozen.adapter("job").tensors() for frozen in (ahead[step], wanted))
        assert all(torch.equal(own, other) for own, other in zip(*adapters, strict=True)), step
        states, other_states = (frozen.optimizer_state("job") for frozen in (ahead[step], wanted))
        assert states["param_groups"] == other_states["param_groups"]
        for n, values in other_states["state"].items():
            assert all(torch.equal(states["state"][n][key], value) for key, value in values.items()), step


def test_an_adapter_comes_back_in_the_order_in_which_its_moments_are_kept(tmp_path: Path) -> None:
    """Whatever the order in which its layers were named."""
    adapter = adapter_of("llama", 2, ("up_proj", "v_proj", "gate_proj", "k_proj"))
    write_adapter(adapter, tmp_path)
    again = read_adapter(tmp_path, config_of("llama").shape)
    assert again.targets == adapter.targets
    for own, other in zip(again.tensors(), adapter.tensors(), strict=True):
        assert torch.equal(own, other)


# Another run's folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "has checkpoint-3; resume=true goes on"),
        (
            ["resume=true", "learning_rate=1e-3", "lora_rank=2"],
            "was made with lora_rank=8, got 2; learning_rate=0.005, got 0.001; training cannot go on",
        ),
    ],
)
def test_a_folder_with_a_checkpoint_is_not_overwritten_by_another_run(
    changes: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune([*arguments, "max_steps=3"]) == 0
    assert finetune([*arguments, "max_steps=3", *changes]) == 2
    assert words in capsys.readouterr().err


def test_a_dataset_that_has_changed_is_another_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one with more rows, these would come in another order, and others be held out."""
    arguments = [*arguments, "val_size=3", "max_steps=6"]
    assert finetune(arguments) == 0
    Path("d.jsonl").rename("moved.jsonl")
    arguments += ["resume=true", "dataset=moved.jsonl"]
    assert finetune(arguments) == 0
    moved = Path("moved.jsonl")
    rows = moved.read_text().splitlines()
    for changed, told in (
        (
            [*rows, '{"text": "Nobody asked the ferryman."}'],
            "dataset_samples=21, got 22; dataset_fingerprint=",
        ),
        ([rows[1], rows[0], *rows[2:]], "dataset_fingerprint="),
    ):
        moved.write_text("\n".join(changed))
        assert finetune(arguments) == 2
        error = capsys.readouterr().err
        assert f"was made with {told}" in error and "; training cannot go on" in error


def test_a_saver_that_is_behind_leaves_checkpoints_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[int] = []
    told: list[str] = []
    slow, waits = threading.Event(), saver.MOST_WAITING

    def save(folder: Path, trained: object, job: str, progress: Progress, *_: object) -> None:
        assert slow.wait(60)
        written.append(progress.step)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    monkeypatch.setattr(saver, "Frozen", lambda *_: None)
    behind, nobody = Saver(told.append), cast("Engine", None)
    for step in range(1, waits + 3):
        behind(tmp_path, nobody, "job", Progress(step=step, samples=step, settings={}), "base", None)
    slow.set()
    behind.finish()
    assert written == list(range(1, waits + 1)) and behind.failures == []
    assert [line.partition(":")[0] for line in told] == [
        f"checkpoint of step {n}" for n in (waits + 1, waits + 2)
    ]


def test_what_a_saver_cannot_write_is_told_once() -> None:
    told: list[str] = []
    guard = Saver(told.append)

    def broken(error: Exception) -> None:
        raise error

    for error in (OSError(28, "full", "x"), OSError(28, "full", "x"), RuntimeError("odd")):
        guard.submit(broken, error)
    guard.finish()
    assert told == guard.failures == ["full: x", "RuntimeError: odd"]


def test_a_saver_that_keeps_up_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    written = threading.Semaphore(0)
    monkeypatch.setattr(saver, "save_checkpoint", lambda *_: written.release())
    monkeypatch.setattr(saver, "Frozen", lambda *_: None)
    prompt, nobody = Saver(told.append), cast("Engine", None)
    for step in range(1, 3 * saver.MOST_WAITING):
        prompt(tmp_path, nobody, "job", Progress(step=step, samples=step, settings={}), "base", None)
        assert written.acquire(timeout=60)
    prompt.finish()
    assert told == []


def test_what_a_saver_remembers_has_an_end() -> None:
    told: list[str] = []
    guard, lines = Saver(told.append), [f"line {n}" for n in range(saver.MOST_FAILURES + 2)]
    for line in lines:
        guard.fail(line)
    assert told == lines and guard.failures == lines[: saver.MOST_FAILURES]


def test_what_is_saved_is_the_job_as_it_stood() -> None:
    adapter = adapter_of("llama", 4, ("q_proj", "down_proj"))
    state = {"groups": [{"lr": 0.5, "betas": (0.5, torch.tensor(0.75))}], "m": {0: torch.ones(2)}, "steps": 3}

    class Job:
        def adapter(self, job: str) -> Adapter:
            return adapter

        def optimizer_state(self, job: str) -> dict[str, Any]:
            return state

    frozen = Frozen(cast("Engine", Job()), "job")
    before = {name: tensor.clone() for name, tensor in adapter.a.items()}
    for tensors in (adapter.a, adapter.b):
        for tensor in tensors.values():
            tensor.add_(1.0)
    state["m"][0].add_(1.0)  # type: ignore[index]
    state["groups"][0]["betas"][1].add_(1.0)  # type: ignore[index]
    kept = frozen.adapter("job")
    assert (kept.rank, kept.targets) == (adapter.rank, adapter.targets)
    assert all(torch.equal(kept.a[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(kept.b[name] + 1.0, tensor) for name, tensor in adapter.b.items())
    assert repr(frozen.optimizer_state("job")) == repr(
        {"groups": [{"lr": 0.5, "betas": (0.5, torch.tensor(0.75))}], "m": {0: torch.ones(2)}, "steps": 3}
    )
