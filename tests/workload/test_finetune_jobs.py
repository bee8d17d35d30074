"""Finetuning data: stripes, passes, shuffles, cutoff, and files of lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from sim.core.finetune import JobSpec
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


def test_a_data_set_is_striped_over_pipelines(data: FileSamples) -> None:
    finetune = jobs_of(FinetuneJob(data=data, epochs=1, shuffle=False))
    shares = [list(finetune.build(MODEL, p, 0, pipelines=3)[0][1]) for p in range(3)]
    assert shares == [[1, 4, 7, 10], [2, 5, 8], [3, 6, 9]]


def test_every_pass_is_a_new_order_of_the_same_samples(data: FileSamples) -> None:
    [(_, lengths)] = jobs_of(FinetuneJob(data=data, epochs=3)).build(MODEL, 0, 0)
    tokens = list(lengths)
    passes = [tokens[i : i + 10] for i in (0, 10, 20)]
    assert [sorted(p) for p in passes] == [LENGTHS] * 3
    assert passes[0] != passes[1] != passes[2]
    assert tokens == list(jobs_of(FinetuneJob(data=data, epochs=3)).build(MODEL, 0, 0)[0][1])
    assert tokens != list(jobs_of(FinetuneJob(data=data, epochs=3)).build(MODEL, 0, 1)[0][1])


def test_without_epochs_it_never_ends_and_long_samples_are_cut(data: FileSamples) -> None:
    [(_, lengths)] = jobs_of(FinetuneJob(data=data, cutoff_len=6, shuffle=False)).build(MODEL, 0, 0)
    assert list(islice(lengths, 12)) == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 1, 2]


def test_pipelines_draw_different_samples_of_one_data_set() -> None:
    data = DrawnSamples(length=Lognormal(quantiles={"p50": 300, "p90": 900}, max_tokens=10**5), samples=1000)
    finetune = jobs_of(FinetuneJob(data=data, epochs=1))
    whole = sorted(finetune.build(MODEL, 0, 5)[0][1])
    shares = [list(finetune.build(MODEL, p, 5, pipelines=2)[0][1]) for p in (0, 1)]
    assert sorted(shares[0] + shares[1]) == whole
    assert shares[0][:20] != shares[1][:20]


def test_the_spec_carries_every_setting(data: FileSamples) -> None:
    job = FinetuneJob(
        data=data, accumulation=2, weight=3.0, start_s=5.0, order="window_major", memory="recompute"
    )
    lora = LoraSpec(rank=8, targets=("q_proj", "v_proj"))
    [(spec, _)] = Finetune(jobs={"mine": job}, lora=lora).build(MODEL, 0, 0)
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
    assert list(jobs_of(job).build(MODEL, 0, 0)[0][1]) == [5, 6]


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
        jobs_of(job).build(MODEL, 0, 0)


def test_a_data_set_smaller_than_the_cluster_is_refused(data: FileSamples) -> None:
    with pytest.raises(ValueError, match=r"finetune.jobs.a: .* each of 11 finetuning pipelines, got 10"):
        jobs_of(FinetuneJob(data=data)).build(MODEL, 0, 0, pipelines=11)
    with pytest.raises(ValueError, match=r"pipeline must be in 0..1, got 2"):
        jobs_of(FinetuneJob(data=data)).build(MODEL, 2, 0, pipelines=2)


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
