"""A Hydra command: what it writes, what it refuses and how, sweeps, failures and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import hydra_plugins.coserve
from sim.pool import run_calls
from tests.cli.small_app import failing_over, main

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_leaves_its_folder_with_the_resolved_config_and_nothing_else(
    app_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["seed=3"]) == 0
    out = app_folder / "out"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "seed.txt", "summary.json", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml",
    }  # fmt: skip
    assert capfd.readouterr() == ("rows: plain/3\n", "")


NO_POLICY = "no policy named 'eagr'; did you mean 'eager'?; known: broken, eager, plain"
NO_KEY = "no key or group named"
NOT_OF_ALL = "'policy.margin' is no key of policy=plain, broken; of those in this sweep, policy=eager alone"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["polcy=eager"], f"{NO_KEY} 'polcy'; did you mean 'policy'?"),
        (["policy=eagr"], NO_POLICY),
        (["workload.rate_rsp=1"], f"{NO_KEY} 'workload.rate_rsp'; did you mean 'workload.rate_rps'?"),
        (["policy=eager", "sede=1"], f"{NO_KEY} 'sede'; did you mean 'seed'?"),
        (["-m", "policy=plain,eagr"], NO_POLICY),
        (["-m", "sede=1,2"], f"{NO_KEY} 'sede'; did you mean 'seed'?"),
        (["seed=1,2"], "'seed=1,2' gives several values: add -m to run each, or write KEY=[A,B] for a list"),
        (["policy=5"], "policy must be one of broken, eager, plain, got 5"),
        (["policy=null"], "policy must be one of broken, eager, plain, got null"),
        (["policy=[1,2]"], "policy must be one of broken, eager, plain, got [1,2]"),
        (["policy=[]"], "policy must be one of broken, eager, plain, got []"),
        (["-m", "policy=plain,2"], "policy must be one of broken, eager, plain, got plain,2"),
        (["policy={a:1}"], f"{NO_KEY} 'policy.a'; did you mean 'policy'?"),
        (["+policy=eager"], "'policy' is a group; without the + its choice is set"),
        (["++policy=eager"], "'policy' is a group; without the + its choice is set"),
        (["workload=[1]"], "workload must be a group of keys, got [1]"),
        (
            ["hydra.job.name=[1]"],
            "hydra.job.name cannot be set: Cannot convert 'list' to string: '[1]', got [1]",
        ),
        (
            ["workload=5", "workload.rate_rps=2"],
            "'workload.rate_rps' cannot be set: another argument takes it away",
        ),
        (["~sede"], f"{NO_KEY} 'sede'; did you mean 'seed'?"),
        (["=5"], "cannot read '=5': expected KEY=VALUE"),
        (["seed 1"], "cannot read 'seed 1': expected KEY=VALUE, quotes around unusual values"),
        (["policy"], "cannot read 'policy': expected KEY=VALUE, quotes around unusual values"),
        (["policy=(a"], "cannot read 'policy=(a': expected KEY=VALUE, quotes around unusual values"),
        (
            ["policy=[eager,eagr]"],
            "policy takes one choice, got [eager,eagr]; -m and policy=eager,eagr run each",
        ),
        (["--multrun", "seed=1"], "unrecognized arguments: --multrun; did you mean '--multirun'?"),
        (["--cfg", "jobs", "hydra.run.dir=${seed}"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["policy=broken"], "policy broken cannot run"),
        (
            ["hydra.run.dir=configs/config.yaml/out"],
            "hydra.run.dir: configs/config.yaml/out cannot be written: Not a directory",
        ),
        (
            ["-m", "seed=1,2", "hydra.sweep.dir=configs/config.yaml/out"],
            "hydra.sweep.dir: configs/config.yaml/out cannot be written: Not a directory",
        ),
        (
            ["seed=${nothing}"],
            "seed is taken from nothing, which is not there; give it with +nothing=..., or seed=... itself",
        ),
        (["+workloads.rate_rps=1"], f"{NO_KEY} 'workloads'; did you mean 'workload'?"),
        (["-m", "seed=1,2", "++sede=1"], f"{NO_KEY} 'sede'; did you mean 'seed'?"),
        (["+seed=1"], "'seed' is there already; without the + it is set"),
        (["wait_s=???"], "wait_s is missing; it must be given: wait_s=..."),
        (["policy.margin=1"], "'policy.margin' is a key of policy=eager alone"),
        (["-m", "policy=plain,eager,broken", "policy.margin=1"], NOT_OF_ALL),
        (["-m", "policy=plain,broken,eager", "policy.margin=1,2"], NOT_OF_ALL),
        (["-m", "policy=plain,eager,broken", "+policy.margin=1"], NOT_OF_ALL),
        (["-m", "policy=plain,broken", "policy.margin=1"], "'policy.margin' is a key of policy=eager alone"),
        (["policy=eager", "policy.marin=1"], f"{NO_KEY} 'policy.marin'; did you mean 'policy.margin'?"),
        (
            ["policy=eager", "policy.target_=1"],
            f"{NO_KEY} 'policy.target_'; known: policy.name, policy.margin",
        ),
        (
            ["hydra.launcher.workers=0", "-m", "seed=1,2"],
            "hydra.launcher.workers must be null or a whole number of at least 1, got 0",
        ),
        (
            ["hydra.sweeper.max_batch_size=0", "-m", "seed=1,2"],
            "hydra.sweeper.max_batch_size must be null or a whole number of at least 1, got 0",
        ),
        (
            ["hydra.sweeper.params=5", "-m", "seed=1,2"],
            "hydra.sweeper.params must be null or a group of keys, got 5",
        ),
        (["-m", "seed=range(3,0)"], "'seed=range(3,0)' gives no value, and nothing would run"),
        (["-m", "policy=glob(x*)"], "'policy=glob(x*)' gives no value, and nothing would run"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_and_exit_code_2(
    app_folder: Path, capfd: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"coserve small: error: {told}")
    assert err.count("\n") == 1
    assert out == ""
    assert not (app_folder / "out").exists()


@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_of_a_sweep_only_runs_that_came_to_something_leave_a_folder(app_folder: Path, launcher: str) -> None:
    config = app_folder / "configs" / "config.yaml"
    config.write_text(config.read_text().replace("  launcher: {workers: 2}\n", ""))
    sweep = ["-m", "policy=broken,plain", "seed=1,2", f"hydra/launcher={launcher}"]
    assert main([*sweep, "hydra.sweep.dir=a/b"]) == 1
    assert sorted(path.name for path in (app_folder / "a" / "b").iterdir()) == ["2", "3", "multirun.yaml"]
    assert main(["-m", "policy=broken", "seed=1,2", f"hydra/launcher={launcher}", "hydra.sweep.dir=c/d"]) == 1
    assert not (app_folder / "c").exists()


def test_a_refused_run_leaves_folders_that_were_there(app_folder: Path) -> None:
    (app_folder / "mine").mkdir()
    assert main(["policy=broken", "hydra.run.dir=mine"]) == 2
    assert (app_folder / "mine").is_dir()
    assert main(["policy=broken", "hydra.run.dir=mine/below/it"]) == 2
    assert not (app_folder / "mine" / "below").exists() and (app_folder / "mine").is_dir()
    assert main(["seed=1"]) == 0 and main(["policy=broken"]) == 2
    assert (app_folder / "out" / "seed.txt").is_file()


@pytest.mark.parametrize(
    "told",
    [
        "hydra.run.dir=${oc.env:FOLDER}",
        "hydra.run.dir=mine/${policy.name}_${seed}",
        "hydra.run.dir='mine/${hydra.job.name}'",
        "++hydra.run.dir=mine/below",
        "hydra.run={dir:mine/below}",
    ],
)
def test_a_folder_that_is_not_written_out_is_known_before_the_run(
    app_folder: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """One that was there stays, and one that was not goes."""
    monkeypatch.setenv("FOLDER", "mine/below")
    assert main(["policy=broken", told]) == 2
    assert not (app_folder / "mine").exists()
    for name in ("below", "broken_0", "small_app"):
        (app_folder / "mine" / name).mkdir(parents=True)
    assert main(["policy=broken", told]) == 2
    assert sorted(path.name for path in (app_folder / "mine").iterdir()) == ["below", "broken_0", "small_app"]
    assert main(["policy=broken", told, "hydra.run.dir=${nowhere}"]) == 2


def test_a_refused_sweep_leaves_the_runs_of_another(app_folder: Path) -> None:
    """Its own run's folder goes; one beside it that holds nothing yet is somebody's who is still at work."""
    other = app_folder / "both" / "theirs" / ".hydra"
    other.mkdir(parents=True)
    assert main(["-m", "policy=broken,plain", "hydra.sweep.dir=both"]) == 1
    assert other.is_dir()
    assert sorted(path.name for path in (app_folder / "both").iterdir()) == ["1", "multirun.yaml", "theirs"]


def test_a_key_of_ones_own_may_be_added_where_another_refers_to_it(app_folder: Path) -> None:
    assert main(["+mine=3", "seed=${mine}"]) == 0
    assert (app_folder / "out" / "seed.txt").read_text() == "3"
    assert main(["+workload.more=1", "++hydra.job.name=small"]) == 0


def test_a_mistake_of_ours_keeps_its_traceback(app_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["seed=99"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_debugging_shows_the_traceback_of_every_error(
    app_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSERVE_DEBUG", "1")
    assert main(["policy=broken"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_a_file_that_is_no_yaml_is_named_with_its_line(
    app_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (app_folder / "configs/policy/torn.yaml").write_text("name: torn\nmargin: [0.1\n")
    assert main(["policy=torn"]) == 2
    err = capfd.readouterr().err
    assert "configs/policy/torn.yaml, line 3: not YAML: expected ',' or ']'" in err and err.count("\n") == 1


def test_a_machine_without_enough_memory_is_one_line(
    app_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["seed=97"]) == 2
    err = capfd.readouterr().err
    assert "the memory of this machine is not enough: Unable to allocate" in err and err.count("\n") == 1


def test_hydras_own_flags_work(app_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["seed=4", "--cfg", "job"]) == 0
    assert "seed: 4" in capfd.readouterr().out
    assert not (app_folder / "out").exists()


def test_help_lists_groups_choices_and_keys_of_the_folder(
    app_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    assert "policy  broken, eager, plain*" in text
    assert "workload.rate_rps=5.0" in text
    assert "Write the seed" in text
    assert "-m policy=broken,eager" in text


@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_a_sweep_runs_every_combination_and_sums_up_in_order(
    app_folder: Path, capfd: pytest.CaptureFixture[str], launcher: str
) -> None:
    sweep = ["-m", "policy=eager,plain", "seed=range(1,4)", f"hydra/launcher={launcher}"]
    # The keys of one launcher are not those of another.
    config = app_folder / "configs" / "config.yaml"
    config.write_text(config.read_text().replace("  launcher: {workers: 2}\n", ""))
    assert main(sweep) == 0
    out, err = capfd.readouterr()
    assert out == "rows: eager/1 eager/2 eager/3 plain/1 plain/2 plain/3\n"
    seeds = [(app_folder / "out" / str(job) / "seed.txt").read_text() for job in range(6)]
    assert seeds == ["1", "2", "3", "1", "2", "3"]
    assert "run/s" not in err  # a bar is for a terminal
    assert "HYDRA" not in out + err


@pytest.mark.parametrize(
    ("choices", "names"),
    [("eager,keen", ["eager", "keen"]), ("choice(keen,eager)", ["keen", "eager"]), ("glob(ke*)", ["keen"])],
)
@pytest.mark.parametrize(
    ("given", "margin"), [("2.5", 2.5), ("null", None), ("'a b'", "a b"), ("${seed}", 3)]
)
def test_a_key_that_all_choices_of_a_sweep_have_is_set_though_the_default_has_it_not(
    choices: str, names: list[str], given: str, margin: object, app_folder: Path
) -> None:
    path = app_folder / "configs" / "policy" / "keen.yaml"
    path.write_text("name: keen\nmargin: 0.5\n")
    assert main(["-m", f"policy={choices}", f"policy.margin={given}", "seed=3"]) == 0
    runs = [OmegaConf.load(app_folder / f"out/{n}/.hydra/config.yaml") for n in range(len(names))]
    assert [(run.policy.name, run.policy.margin) for run in runs] == [(name, margin) for name in names]


def test_failed_runs_of_a_sweep_stop_no_other(app_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "policy=glob(*)", "seed=1,98"]) == 1
    out, err = capfd.readouterr()
    assert out == "rows: eager/1 plain/1\n"
    assert "run policy=broken seed=1 failed: policy broken cannot run\n" in err
    assert "run policy=eager seed=98 failed: its process ended with exit code 7\n" in err
    assert err.endswith("coserve small: 4 of 6 runs failed\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_a_sweep_whose_ends_fail_alike_is_told_once_and_not_run(
    app_folder: Path, capfd: pytest.CaptureFixture[str], launcher: str
) -> None:
    config = app_folder / "configs" / "config.yaml"
    config.write_text(config.read_text().replace("  launcher: {workers: 2}\n", ""))
    sweep = ["-m", "seed=range(1,9)", f"hydra/launcher={launcher}"]
    assert main([*sweep, "policy=broken"]) == 2
    out, err = capfd.readouterr()
    told = err.splitlines()[-1]
    assert told.startswith(
        "coserve small: error: policy broken cannot run; the first and the last run fail so"
    )
    assert err.count("policy broken") == 1 and out == ""
    assert main([*sweep, "policy=broken,plain"]) == 1
    out, err = capfd.readouterr()
    assert out == "rows: " + " ".join(f"plain/{seed}" for seed in range(1, 9)) + "\n"
    assert err.count("failed: policy broken cannot run") == 8


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.small_app", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


STOPS = pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


@STOPS
def test_a_run_that_is_stopped_without_results_leaves_no_folder(
    number: int, code: int, told: str, app_folder: Path
) -> None:
    process = start(app_folder, "wait_s=600")
    while not (app_folder / "out" / "waiting.log").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, f"coserve small: {told}\n")
    assert not (app_folder / "out").exists()


@STOPS
def test_a_sweep_that_is_stopped_keeps_what_is_finished(
    number: int, code: int, told: str, app_folder: Path
) -> None:
    """While its two workers are in runs that do not end."""
    process = start(app_folder, "-m", "wait_s=0,600", "seed=range(0,20)")
    folder = app_folder / "out"
    while not all((folder / run / "waiting.log").exists() for run in ("20", "39")):
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:  # to the whole group, as a terminal does
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    stopped, how_to_go_on = err.splitlines()[-2:]
    assert stopped.endswith(f"coserve small: {told}")
    assert how_to_go_on.startswith(
        f"coserve small: coserve report {folder} shows again what is finished (20)"
    )
    assert how_to_go_on.endswith(f"with run.resume=true hydra.sweep.dir={folder} runs the others")
    assert out.removeprefix("rows: ").split() == [f"plain/{seed}" for seed in range(20)]
    for seed in range(20):
        assert (folder / str(seed) / "seed.txt").read_text() == str(seed)
    # One that was stopped has no folder.
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 20


def test_a_sweep_that_fails_over_a_stop_keeps_what_is_finished(
    app_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*given: Any) -> Iterator[tuple[int, Any]]:
        results = run_calls(*given)
        yield next(results)
        results.close()
        raise failing_over(KeyboardInterrupt())

    monkeypatch.setattr(hydra_plugins.coserve, "run_calls", stopped)
    assert main(["-m", "seed=1,2,3"]) == 130
    out, err = capsys.readouterr()
    # Both ends of a sweep are begun first.
    assert out in ("rows: plain/1\n", "rows: plain/3\n")
    assert "shows again what is finished (1)" in err and "half a config" not in err
