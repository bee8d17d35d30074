"""Workloads of which it is known which prompts begin alike: the lists, when they apply, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiles import workloads
from profiles.validate import main
from profiles.workloads import Alike, known_workload, known_workloads, with_prompts
from sim.vllm.run import MeasuredRequests
from tests.vllm import vllm_folders as folders


def requests(lengths: list[int]) -> MeasuredRequests:
    zeros = np.zeros(len(lengths))
    return MeasuredRequests(
        arrival_s=np.arange(len(lengths), dtype=float),
        queued_s=zeros,
        first_token_s=zeros,
        last_token_s=zeros,
        prompt_tokens=np.array(lengths),
        output_tokens=np.ones(len(lengths), dtype=np.int64),
    )


def lengths_of(pairs: list[Alike]) -> list[int]:
    """Prompts of a workload that the list fits; 7 tokens where it says nothing."""
    lengths = [7] * (max(pair.row for pair in pairs) + 2)
    for pair in pairs:
        lengths[pair.row], lengths[pair.earlier] = pair.tokens, pair.earlier_tokens
    return lengths


@pytest.mark.parametrize("name", known_workloads())
def test_lists_are_of_later_rows_that_share_no_more_than_both_have(name: str) -> None:
    pairs = known_workloads()[name]
    assert [pair.row for pair in pairs] == sorted({pair.row for pair in pairs})
    lengths = lengths_of(pairs)
    for pair in pairs:
        assert 0 <= pair.earlier < pair.row
        assert 16 <= pair.common <= min(pair.tokens, pair.earlier_tokens)
        assert (lengths[pair.row], lengths[pair.earlier]) == (pair.tokens, pair.earlier_tokens)


@pytest.mark.parametrize("name", known_workloads())
def test_one_other_length_makes_it_another_workload(name: str) -> None:
    pairs = known_workloads()[name]
    lengths = lengths_of(pairs)
    assert known_workload(requests(lengths)) == pairs
    assert known_workload(requests(lengths[: pairs[-1].row])) is None
    for changed in (pairs[0].row, pairs[-1].earlier):
        other = [*lengths]
        other[changed] += 1
        assert known_workload(requests(other)) is None


def test_prompts_are_equal_in_the_common_tokens_and_nowhere_else() -> None:
    pairs = [Alike(1, 30, 0, 20, 20), Alike(3, 40, 1, 30, 25)]
    made = with_prompts(requests([20, 30, 12, 40]), pairs).prompts
    assert made is not None
    zero, one, two, three = (list(prompt) for prompt in made)
    assert [len(prompt) for prompt in (zero, one, two, three)] == [20, 30, 12, 40]
    assert one[:20] == zero and three[:25] == one[:25]
    tokens = {*zero, *one, *two, *three}
    assert len(tokens) == 20 + 10 + 12 + 15


def test_rows_are_counted_as_requests_arrive() -> None:
    swapped = replace(requests([30, 20]), arrival_s=np.array([1.0, 0.0]))
    made = with_prompts(swapped, [Alike(1, 30, 0, 20, 20)]).prompts
    assert made is not None and list(made[0])[:20] == list(made[1])


def test_validate_says_that_it_knows_the_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    zero, one, two = [0.0] * 2, [1.0] * 2, [2.0] * 2
    folder = folders.write_run(tmp_path / "run", folders.meta(), zero, zero, one, two, [300, 400], [10] * 2)
    arguments = [str(folder), str(profile), "--figure", str(tmp_path / "v.png")]
    assert main(arguments) == 0
    assert "the prompts are not known" in capsys.readouterr().out
    monkeypatch.setattr(workloads, "known_workloads", lambda: {"two": [Alike(1, 400, 0, 300, 300)]})
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "begin like an earlier one: 1; tokens of them found in blocks: 288" in printed
    assert "not known" not in printed
