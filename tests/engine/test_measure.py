"""A predictor is fitted to enough points, even if kernels were still compiled while they were timed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import engine.bench_loaded
import engine.measure
from engine.measure import FIRST_USES, LEAST_ROWS, LONGER, measure
from sim.core.work import Work
from tests.support import limits_of


def points(monkeypatch: pytest.MonkeyPatch, seconds: float) -> int:
    """How many points `measure` times in `seconds`, when each takes one."""
    now_s = itertools.count()
    timed = SimpleNamespace(work=Work(), seconds=np.ones(1), host_s=np.ones(1), ahead_s=1.0)
    rig = SimpleNamespace(space=None, time=lambda *_, **__: timed)
    monkeypatch.setattr(engine.measure, "Rig", lambda *_, **__: rig)
    monkeypatch.setattr(engine.measure, "design", lambda space: itertools.repeat(None))
    monkeypatch.setattr(engine.measure, "time", SimpleNamespace(perf_counter=lambda: float(next(now_s))))

    def table(columns: dict[str, Any], *_: Any) -> Any:
        return SimpleNamespace(model=lambda: len(next(iter(columns.values()))))

    monkeypatch.setattr(engine.measure, "timed_table", table)
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    job: Any = None
    found: Any = measure(model, limits_of(), job, seconds)
    return int(found)


def test_what_fits_the_time_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert points(monkeypatch, 2.0 * LEAST_ROWS) == 2 * LEAST_ROWS


def test_the_least_points_are_timed_even_if_that_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert points(monkeypatch, 1.2 * LEAST_ROWS / LONGER) == LEAST_ROWS


def test_but_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"measure_s must allow {LEAST_ROWS} points"):
        points(monkeypatch, 0.5 * LEAST_ROWS / LONGER)


@pytest.mark.parametrize(("device", "launched"), [("cuda", FIRST_USES), ("cpu", 0)])
def test_kernels_are_met_before_a_run_that_measures_nothing(
    device: str, launched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[tuple[Any, dict[str, int]]] = []
    rig = SimpleNamespace(space=None, time=lambda point, **how: met.append((point, how)))
    monkeypatch.setattr(engine.measure, "design", lambda space: itertools.count())
    monkeypatch.setattr(engine.measure, "Rig", lambda *_, **__: rig)
    monkeypatch.setattr(engine.bench_loaded.Loaded, "_jobs", lambda *_: [None])
    given: dict[str, Any] = dict.fromkeys(("spec", "limits", "plans", "assemble"))
    model: Any = SimpleNamespace(device=torch.device(device))
    engine.bench_loaded.Loaded(model=model, **given).first_uses()
    assert met == [(n, {"repeats": 1, "warm_ups": 0}) for n in range(launched)]
