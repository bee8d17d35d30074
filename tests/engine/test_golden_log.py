"""Real runs that were recorded: told the same times, loop and policy decide the same, plan by plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.golden_log import FOLDER, assert_decided_again, read_log

LOGS = sorted(FOLDER.glob("*.json.gz"))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.name.partition(".")[0])
def test_the_loop_decides_what_it_decided_then(path: Path) -> None:
    assert_decided_again(read_log(path))


def test_the_recorded_runs_hold_what_matters() -> None:
    assert len(LOGS) == 2
    lookaheads = set()
    for path in LOGS:
        log = read_log(path)
        lookaheads.add(log["limits"]["lookahead"])
        assert path.stat().st_size < 200 * 1024
        assert len(log["plans"]) >= 200
        assert sum(bool(plan[2]) for plan in log["plans"]) >= 2, "preemptions"
        kinds = {piece[0] for plan in log["plans"] for piece in plan[3]}
        assert kinds == {"Forward", "Backward", "Step"}
        assert any(plan[0] and plan[1] and plan[3] for plan in log["plans"]), "decodes, prefill, finetuning"
    assert lookaheads == {0, 1}
