"""Finetuning data: passes, shuffles, cutoff, files of lengths, and pipelines that share them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from sim.core.finetune import Backward, Forward, Job, JobSpec, Step
from sim.core.specs import LoraSpec, ModelShape
from sim.workload.finetune import DrawnSamples, FileSamples, Finetune, FinetuneJob
from sim.workload.lengths import Lognormal

MODEL = ModelShape(name="tiny", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=1000)
LENGTHS = list(range(1, 11))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def data(write: Callable[[str, str], str]) -> FileSamples:
    return FileSamples(file=write("d.json", json.dumps(LENGTHS)))


def jobs_of(job: FinetuneJob) -> Finetune:
    return Finetune(jobs={"a": job}, lora=LoraSpec())


def lengths_of(job: FinetuneJob, seed: int = 0) -> Iterator[int]:
    [(name, lengths)] = jobs_of(job).samples(seed).items()
    assert name == "a"
    return lengths


def train(job: Job) -> None:
    """The present sample, and its step."""
    tokens = job.sample_tokens
    job.advance(Forward(job.spec.id, tokens))
    job.advance(Backward(job.spec.id, tokens * MODEL.layers))
    job.advance(Step(job.spec.id))


def test_every_pass_is_a_new_order_of_the_same_samples(data: FileSamples) -> None:
    tokens = list(lengths_of(FinetuneJob(data=data, epochs=3)))
    passes = [tokens[i : i + 10] for i in (0, 10, 20)]
    assert [sorted(p) for p in passes] == [LENGTHS] * 3
    assert passes[0] != passes[1] != passes[2]
    assert tokens == list(lengths_of(FinetuneJob(data=data, epochs=3)))
    assert tokens != list(lengths_of(FinetuneJob(data=data, epochs=3), seed=1))


def test_without_epochs_it_never_ends_and_long_samples_are_cut(data: FileSamples) -> None:
    lengths = lengths_of(FinetuneJob(data=data, cutoff_len=6, shuffle=False))
    assert list(islice(lengths, 12)) == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 1, 2]


def test_drawn_data_have_as_many_samples_as_were_asked_for() -> None:
    data = DrawnSamples(length=Lognormal(quantiles={"p50": 300, "p90": 900}, max_tokens=10**5), samples=1000)
    first, again = (list(lengths_of(FinetuneJob(data=data, epochs=1, shuffle=False), seed=5)) for _ in "ab")
    assert len(first) == 1000 and first == again


def test_pipelines_take_the_samples_of_one_data_set_as_they_need_them(data: FileSamples) -> None:
    lengths = lengths_of(FinetuneJob(data=data, epochs=1, shuffle=False))
    [spec] = jobs_of(FinetuneJob(data=data, accumulation=1)).specs(MODEL)
    slow, fast = Job(spec, lengths), Job(spec, lengths)
    trained = []
    while not fast.finished:
        trained.append(fast.sample_tokens)
        train(fast)
    assert (slow.sample_tokens, trained) == (1, LENGTHS[1:])
    train(slow)
    assert slow.finished


def test_the_spec_carries_every_setting(data: FileSamples) -> None:
    job = FinetuneJob(
        data=data, accumulation=2, weight=3.0, start_s=5.0, order="window_major", memory="recompute"
    )
    lora = LoraSpec(rank=8, targets=("q_proj", "v_proj"))
    [spec] = Finetune(jobs={"mine": job}, lora=lora).specs(MODEL)
    assert spec == JobSpec(
        id="mine", layers=4, optimizer_params=4 * 8 * (64 + 64 + 64 + 32), accumulation=2, weight=3.0,
        start_s=5.0, order="window_major", memory="recompute",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.json", "[5, 6]"),
        ("d.json", '[{"tokens": 5}, {"tokens": [1, 2, 3, 4, 5, 6]}]'),
        ("d.jsonl", "5\n6\n"),
        ("d.jsonl", '{"length": 5}\n{"length": 6}\n'),
        ("d.jsonl", '{"input_ids": [1, 1, 1, 1, 1]}\n{"input_ids": [1, 1, 1, 1, 1, 1]}\n'),
    ],
)
def test_files_of_lengths_or_tokens_are_read(write: Callable[[str, str], str], name: str, text: str) -> None:
    job = FinetuneJob(data=FileSamples(file=write(name, text)), epochs=1, shuffle=False)
    assert list(lengths_of(job)) == [5, 6]


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ('[{"text": "one two"}]', None, "holds text, whose length depends on a tokenizer"),
        ('[{"conversations": []}]', None, "holds text"),
        ('[{"id": 1}]', None, "row 1: no length under tokens or length or input_ids, got id"),
        ('[{"tokens": 5}, {"tokens": 0}]', None, "row 2, column tokens: .*got 0"),
        ('[{"tokens": 5}, {"tokens": []}]', None, "row 2, column tokens: .*got 0"),
        ('[{"tokens": 5}]', "size", "row 1, column size: .*got nothing"),
        ("[5, 1.5]", None, "row 2, column tokens: .*got 1.5"),
        ("[]", None, "not empty"),
    ],
)
def test_bad_data_sets_are_named(
    write: Callable[[str, str], str], text: str, column: str | None, says: str
) -> None:
    job = FinetuneJob(data=FileSamples(file=write("d.json", text), column=column))
    with pytest.raises(ValueError, match=says):
        lengths_of(job)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"shuffle": "no"}, {"cutoff_len": 0}, {"accumulation": 0}, {"weight": 0},
        {"start_s": float("nan")}, {"order": "window"}, {"memory": "keep"},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(data: FileSamples, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        FinetuneJob(data=data, **bad)
