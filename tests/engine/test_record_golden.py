"""A log recorded now, of the tiny model on the wall clock, is decided again plan by plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.golden_log import FOLDER, assert_decided_again, read_log, write_log
from tests.engine.record_golden import COMMON, RUNS, record

SHORT = [
    "measure_s=3",
    "workload.duration_s=1",
    "workload.rate_rps=10",
    "run.drain_s=120",
    "policy.budget_s=0.1",
]
"""With room for finetuning in an iteration of the slowest machine."""


@pytest.mark.parametrize("name", list(RUNS))
def test_a_recorded_log_is_decided_again(name: str, tmp_path: Path) -> None:
    log = record([*COMMON, *RUNS[name], *SHORT])
    write_log(tmp_path / "log", log)
    assert_decided_again(read_log(tmp_path / "log"))
    assert len(log["plans"]) >= 20 and any(plan[1] and plan[3] for plan in log["plans"])
    assert log.keys() == read_log(FOLDER / f"{name}.json.gz").keys()
