"""A session on a GPU may be cut into calls, and one step that fails costs only itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiles import session
from profiles.session import Session, main
from profiles.session_steps import COSERVE, SHORT, Step, steps_of
from sim.cli import COMMANDS

PYTHON = (sys.executable, "-c")
COUNT = (
    "import pathlib; p = pathlib.Path({path!r}); p.write_text((p.read_text() if p.exists() else '') + 'x')"
)


def step(name: str, code: str, limit_s: float = 60.0, **more: Any) -> Step:
    return Step(name=name, command=(*PYTHON, code), limit_s=limit_s, **more)


def counting(tmp_path: Path, name: str, then: str = "") -> tuple[Step, Path]:
    path = tmp_path / f"{name}.runs"
    return step(name, COUNT.format(path=str(path)) + then), path


def statuses(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "session.json").read_text())
    return {name: one["status"] for name, one in record["steps"].items()}


def test_a_failed_step_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    good, good_runs = counting(tmp_path, "good")
    bad, bad_runs = counting(tmp_path, "bad", "; print('it broke'); raise SystemExit(3)")
    of = Session(tmp_path / "out", "cpu", "tiny")
    assert not of.run([bad, good], 100)
    assert statuses(tmp_path / "out") == {"bad": "failed", "good": "done"}
    again = Session(tmp_path / "out", "cpu", "tiny")
    assert not again.run([bad, good], 100), "what is done or has failed is not run again"
    assert good_runs.read_text() == "x" and bad_runs.read_text() == "x"
    again.run([bad, good], 100, retry=True)
    assert good_runs.read_text() == "x" and bad_runs.read_text() == "xx"
    record = json.loads((tmp_path / "out" / "session.json").read_text())
    assert record["steps"]["bad"]["tail"][-1] == "it broke"
    page = (tmp_path / "out" / "gathered" / "RESULTS.md").read_text()
    assert re.search(r"\| failed \| \d+ \| it broke \|", page)


def test_a_step_over_its_time_is_ended_with_its_children_and_goes_on_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GRACE_S", 1.0)
    child, limit_s = tmp_path / "child.pid", 50.0
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"marker = pathlib.Path({str(tmp_path / 'marker')!r})\n"
        "if marker.exists(): sys.exit(0)\n"
        "marker.touch()\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(c.pid))\n"
        "time.sleep(60)\n"
    )

    class Over(subprocess.Popen):  # type: ignore[type-arg]
        """Its time is over when its child runs."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout == limit_s and self.poll() is None:
                if child.exists() and child.read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Over)
    slow = step("slow", code, limit_s=limit_s, goes_on=True)
    of = Session(tmp_path / "out", "cpu", "tiny")
    assert not of.run([slow], 1000)
    assert statuses(tmp_path / "out") == {"slow": "cut short"}
    assert _gone(int(child.read_text()))
    child.unlink()
    assert of.run([slow], 1000)
    assert statuses(tmp_path / "out") == {"slow": "done"}


def test_a_step_that_cannot_go_on_has_failed_at_its_own_limit_and_is_cut_short_at_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs would otherwise take its whole limit from every call."""
    monkeypatch.setattr(session, "GRACE_S", 1.0)
    monkeypatch.setattr(session, "LEAST_S", 0.1)
    code = "import time; print('under way', flush=True); time.sleep(60)"
    of = Session(tmp_path / "out", "cpu", "tiny")
    assert not of.run([step("hangs", code, limit_s=2.0, least_s=0.0)], 100)
    assert not of.run([step("long", code, limit_s=60.0, least_s=0.0)], 2)
    assert statuses(tmp_path / "out") == {"hangs": "failed", "long": "cut short"}


def test_a_step_waits_for_a_call_with_time_for_it_and_the_next_one_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, first_runs = counting(tmp_path, "first", "; import time; time.sleep(2)")
    whole, whole_runs = counting(tmp_path, "whole")
    whole = replace(whole, least_s=99.0)
    reads, reads_runs = counting(tmp_path, "reads")
    reads = replace(reads, after=("whole",))
    other, other_runs = counting(tmp_path, "other")
    of = Session(tmp_path / "out", "cpu", "tiny")
    assert not of.run([first, whole, reads, other], 100)
    assert not whole_runs.exists() and not reads_runs.exists() and other_runs.exists()
    assert re.search(r"whole: waits for another call, \d+ s are left", capsys.readouterr().err)
    assert of.run([first, whole, reads, other], 100)
    assert whole_runs.exists() and reads_runs.exists()
    assert of.run([replace(whole, name="short")], 50), "a shorter call begins what there is"
    of.run([replace(whole, name="more"), replace(reads, after=("more",))], 100)
    assert (first_runs.read_text(), reads_runs.read_text()) == ("x", "xx"), "what it reads has gone on"


def test_who_kills_a_session_ends_its_step_and_finds_what_was_gathered(tmp_path: Path) -> None:
    out, child = tmp_path / "out", tmp_path / "child.pid"
    waits = (
        f"import os, pathlib, time; pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    program = (
        "from pathlib import Path\n"
        "from profiles.session import Session\n"
        "from profiles.session_steps import Step\n"
        f"steps = [Step(name=n, command=({sys.executable!r}, '-c', c), limit_s=60) for n, c in "
        f"(('one', 'print(1)'), ('two', {waits!r}))]\n"
        f"Session(Path({str(out)!r}), 'cpu', 'tiny').run(steps, 100)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=session.ROOT)
    while not (child.exists() and child.read_text()):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert _gone(int(child.read_text()))
    assert statuses(out) == {"one": "done"}
    assert {
        one["name"]: one["status"]
        for one in json.loads((out / "gathered" / "session.json").read_text())["steps"]
    } == {"one": "done"}


def test_what_cannot_be_gathered_does_not_stop_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, good_runs = counting(tmp_path, "good")
    of = Session(tmp_path / "out", "cpu", "tiny")
    (tmp_path / "out" / "profile.parquet").write_text("whole")
    damaging = f"import pathlib; p = pathlib.Path({str(tmp_path / 'out' / 'reference')!r}); p.mkdir()"
    damaging += "; (p / 'reference.parquet').write_text('no table')"
    assert of.run([step("damages", damaging), good], 100)
    assert good_runs.exists()
    assert "gathered: ValueError" in capsys.readouterr().err
    assert (tmp_path / "out" / "gathered" / "profile.parquet").read_text() == "whole"


def test_ctrl_c_ends_the_step_that_runs_and_leaves_it_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Session(tmp_path / "out", "cpu", "tiny").run([step("slow", "import time; time.sleep(60)")], 100)
    assert started[0].returncode is not None, "its process has ended"
    assert not (tmp_path / "out" / "session.json").exists(), "it counts as not run"


def _gone(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody waits for stays as a zombie."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        try:
            if "zombie" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_nothing_is_started_that_the_time_does_not_allow(tmp_path: Path) -> None:
    one, runs = counting(tmp_path, "one")
    assert not Session(tmp_path / "out", "cpu", "tiny").run([one], session.LEAST_S / 2)
    assert not runs.exists()


def test_what_needs_a_gpu_is_left_out_without_one(tmp_path: Path) -> None:
    of = Session(tmp_path / "out", "cpu", "tiny")
    assert of.run([step("kernels", "raise SystemExit(1)", gpu=True)], 100)
    assert statuses(tmp_path / "out") == {"kernels": "left out"}


OWN = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100_80gb",
    "NVIDIA GeForce RTX 4090": "rtx_4090",
    "Tesla K80": None,
}
CHOOSE = "configs/device as --device"


def test_a_machine_that_lacks_something_is_told_so_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "NEEDED", ("json", "not_a_package"))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--device", "cpu", "--model", "tiny"])
    assert "cannot import not_a_package" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(session, "NEEDED", ())
    monkeypatch.setattr(session, "NEEDED_ON_A_GPU", ())
    monkeypatch.setattr(session, "_gpu_versions", lambda: {"gpu": "NVIDIA H100 80GB HBM3"})
    assert session.unready("h200") == "--device h200, but the GPU is NVIDIA H100 80GB HBM3"
    assert session.unready("h100") is None
    for name, own in OWN.items():
        monkeypatch.setattr(session, "_gpu_versions", lambda name=name: {"gpu": name})
        assert session._own_device() == own
        assert session.unready(None) == (None if own else f"the GPU is {name}: choose one of {CHOOSE}")
    monkeypatch.setattr(session, "_gpu_versions", lambda: {"gpu": None})
    for device in ("h100", None):
        assert session.unready(device) == "torch finds no GPU; --device cpu --model tiny needs none"
    assert session.unready("cpu") is None


def test_the_time_of_a_call_begins_before_the_machine_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, given = [1000.0], []

    def slowly(device: str) -> None:
        now_s[0] += 40

    def run(of: Session, steps: list[Step], seconds: float, **_: bool) -> bool:
        given.append(seconds)
        return True

    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(session, "unready", slowly)
    monkeypatch.setattr(Session, "run", run)
    assert main([str(tmp_path), "--device", "cpu", "--model", "tiny", "--minutes", "9"]) == 0
    assert given == [500.0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--device", "nonsense"], "no device named 'nonsense'; known: a10, "),
        (["--device", "cpu", "--model", "tiyn"], "no model named 'tiyn'; did you mean 'tiny'?; known: "),
        (["--device", "cpu", "--model", "tiny", "--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--device", "cpu", "--model", "tiny", "--minutes", "nan"], "--minutes must be above 0, got nan"),
    ],
)
def test_what_no_session_can_be_of_is_told_before_any_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], line: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "out"), *given])
    assert f"error: {line}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_programs_keep_lies_in_the_sessions_folder_unless_the_caller_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "elsewhere")
    told = step("told", "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['MPLCONFIGDIR'])")
    Session(tmp_path, "cpu", "tiny").run([told], 100)
    (line,) = (tmp_path / "told.log").read_text().splitlines()
    assert line == f"{tmp_path / 'cache' / 'triton'} elsewhere"


def test_a_folder_belongs_to_one_device_and_model(tmp_path: Path) -> None:
    Session(tmp_path, "cpu", "tiny").run([step("one", "")], 100)
    with pytest.raises(ValueError, match="is a session of tiny on cpu"):
        Session(tmp_path, "h200", "llama_3_1_8b")


def test_what_was_gathered_is_all_that_another_machine_needs(tmp_path: Path) -> None:
    first, first_runs = counting(tmp_path, "first")
    table = tmp_path / "out" / "reference" / "reference.parquet"
    writes = f"import pathlib; p = pathlib.Path({str(table)!r}); p.parent.mkdir(); p.write_bytes(b'rows')"
    second, second_runs = counting(tmp_path, "second", "; raise SystemExit(1)")
    Session(tmp_path / "out", "cpu", "tiny").run([first, step("writes", writes), second], 100)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out" / "gathered", other / "gathered")
    of = Session(other, "cpu", "tiny")
    assert (other / "reference" / "reference.parquet").read_bytes() == b"rows"
    of.run([first, second], 100, retry=True)
    assert (first_runs.read_text(), second_runs.read_text()) == ("x", "xx")
    assert statuses(other) == {"first": "done", "writes": "done", "second": "failed"}


@pytest.mark.parametrize("name", ["session.json", "runs.tar.xz"])
def test_what_was_gathered_and_is_damaged_is_named_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Session(tmp_path / "out", "cpu", "tiny").run([step("one", "")], 100)
    gathered = tmp_path / "out" / "gathered"
    (gathered / name).write_text("{")
    (tmp_path / "out" / "session.json").unlink()
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--device", "cpu", "--model", "tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m profiles.session: error: {gathered} is damaged (")
    assert not (tmp_path / "out" / "session.json").exists()


def test_the_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Session(tmp_path, "cpu", "tiny").run([step("one", "")], 100)

    def stopped(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        Session(tmp_path, "cpu", "tiny").run([step("two", "")], 100)
    assert statuses(tmp_path) == {"one": "done"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"device": "cpu"', "{}", '{"device": "cpu", "model": "tiny", "steps": {"one": {}}}']
)
def test_a_damaged_record_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "session.json").write_text(text)
    assert main([str(tmp_path), "--device", "cpu", "--model", "tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m profiles.session: error: {tmp_path / 'session.json'} is damaged (")


def test_every_step_is_a_command_of_this_project(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, "h200", "llama_3_1_8b")
    assert len({one.name for one in steps}) == len(steps)
    commands = [one.command[3] for one in steps if one.command[:3] == COSERVE]
    assert set(commands) <= set(COMMANDS) | {"fidelity"}
    for one in steps:
        if one.command[:3] != COSERVE:
            assert one.gpu


def test_the_same_commands_run_without_a_gpu_and_leave_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the reference and a sweep of one run with the tiny model, gathered into the page."""
    small = ["parts=[decode]", "sizes.product=64", "sizes.decode_sequences=[2]"]
    # A busy machine may not finish two optimizer steps in any peak_s.
    sweep = [*SHORT, "peak_s=0", "policy=separate_50", "workload.rate_rps=4"]

    def steps(folder: Path, device: str, model: str) -> list[Step]:
        found = {one.name: one for one in steps_of(folder, device, model)}
        reference, bench = found["reference"], found["bench"]
        return [
            Step(name="reference", command=(*reference.command, "seconds=0.01", *small), limit_s=1000),
            Step(name="bench", command=(*bench.command, *sweep), limit_s=1000),
        ]

    monkeypatch.setattr(session, "steps_of", steps)
    out = tmp_path / "out"
    assert main([str(out), "--device", "cpu", "--model", "tiny"]) == 0, (out / "bench.log").read_text()
    gathered = {path.name for path in (out / "gathered").iterdir()}
    assert gathered == {"session.json", "reference.parquet", "bench.json", "runs.tar.xz", "RESULTS.md"}
    text = (out / "gathered" / "RESULTS.md").read_text()
    assert "separate_50" in text and "2 x 64" in text and "not measured yet" in text
    assert (
        "coserve bench experiment=gpu_paper device=cpu model=tiny seed=0 hydra.sweep.dir=OUT/runs/gpu_paper"
        in text
    )
    (row,) = json.loads((out / "gathered" / "bench.json").read_text())["rows"]
    assert row["requests"] > 0 and row["pipelines"] == 2

    # The sweep was cut short, and goes on where there is nothing but what was gathered.
    other = tmp_path / "other"
    shutil.copytree(out / "gathered", other / "gathered")
    record = json.loads((other / "gathered" / "session.json").read_text())
    record["steps"][1]["status"] = "cut short"
    (other / "gathered" / "session.json").write_text(json.dumps(record))
    assert main([str(other), "--device", "cpu", "--model", "tiny"]) == 0, (other / "bench.log").read_text()
    assert not (other / "reference.log").exists(), "it was done"
    for name in ("before.json", "0/summary.json", "0/iterations.parquet"):
        path = Path("runs") / "gpu_paper" / name
        assert (other / path).read_bytes() == (out / path).read_bytes()
