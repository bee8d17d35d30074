"""Recorded workloads of which it is known, from public files, which prompts begin alike.

A run's folder has the lengths of its prompts and not their tokens, though an engine with prefix caching computes
once what two prompts share. Where a workload is public under another tokenizer, or has been read by others, which
rows share how much is a fact about the workload that no run needs to be asked for: `tables/sharegpt_gpt4-300.yaml`
lists them. A run's workload is one of these when every row that the list names has the listed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from profiles.schema import TABLES
from sim.vllm.run import MeasuredRequests

LISTS = TABLES / "sharegpt_gpt4-300.yaml"


class Alike(NamedTuple):
    """Two prompts of one workload, rows counted from 0 in order of arrival."""

    row: int
    tokens: int
    earlier: int
    earlier_tokens: int
    common: int
    """Tokens at the beginning of both."""


def known_workloads() -> dict[str, list[Alike]]:
    """Name -> its pairs, by row."""
    lists = yaml.safe_load(LISTS.read_text(encoding="utf-8"))["workloads"]
    return {name: [Alike(*pair) for pair in pairs] for name, pairs in lists.items()}


def known_workload(requests: MeasuredRequests) -> list[Alike] | None:
    """The pairs of the workload that the requests are; None where it is not known."""
    lengths = requests.prompt_tokens[_by_arrival(requests)].tolist()
    return next((pairs for pairs in known_workloads().values() if _fits(pairs, lengths)), None)


def with_prompts(requests: MeasuredRequests, pairs: Sequence[Alike]) -> MeasuredRequests:
    """With `prompts`: made-up token ids, equal where those of the workload are known to be."""
    rows = _by_arrival(requests)
    prompts = _prompts(pairs, requests.prompt_tokens[rows].tolist())
    by_request = dict(zip(rows.tolist(), prompts, strict=True))
    return replace(requests, prompts=[by_request[i] for i in range(len(prompts))])


def _by_arrival(requests: MeasuredRequests) -> NDArray[np.int64]:
    return np.argsort(requests.arrival_s, kind="stable")


def _fits(pairs: Sequence[Alike], lengths: Sequence[int]) -> bool:
    return all(
        pair.row < len(lengths)
        and lengths[pair.row] == pair.tokens
        and lengths[pair.earlier] == pair.earlier_tokens
        for pair in pairs
    )


def _prompts(pairs: Sequence[Alike], lengths: Sequence[int]) -> list[list[int]]:
    shared = {pair.row: pair for pair in pairs}
    fresh = count()
    prompts: list[list[int]] = []
    for row, tokens in enumerate(lengths):
        pair = shared.get(row)
        begin = prompts[pair.earlier][: pair.common] if pair else []
        prompts.append([*begin, *(next(fresh) for _ in range(tokens - len(begin)))])
    return prompts
