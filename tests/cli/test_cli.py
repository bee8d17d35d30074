from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim import cli
from sim.errors import Terminated, nearest
from tests.cli.small_app import failing_over


def test_help_names_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (text, _) in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [[name, text]]


def test_help_loads_no_heavy_package() -> None:
    program = (
        "import sys; from sim.cli import main; main(['--help']);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {"hydra", "omegaconf", "numpy", "pandas", "simpy", "matplotlib", "torch"}


def test_an_unknown_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulte"]) == 2
    assert "no command named 'simulte'; did you mean 'simulate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Llama-3.1-8B", "llama_3_1_8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama_3_1_8b"),
        ("A100", "a100_80gb"),
        ("lama_3_8b", "llama_3_8b"),
        ("", None),
        ("mamba", None),
    ],
)
def test_a_name_as_others_write_it_is_near(given: str, meant: str | None) -> None:
    known = ("llama_3_8b", "llama_3_1_8b", "a100_80gb")
    assert nearest(given, known) == ("" if meant is None else f"; did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("stop", "code", "told"), [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated")]
)
def test_what_fails_over_a_stop_is_the_stop(
    stop: KeyboardInterrupt,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "failing", raising(failing_over(stop)), raising=False)
    monkeypatch.setitem(cli.COMMANDS, "failing", ("fails", "sim.cli:failing"))
    assert cli.main(["failing"]) == code
    assert capsys.readouterr().err == f"coserve failing: {told}\n"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (failing_over(Terminated()), 143, "coserve compare: terminated\n"),
        (TypeError("a mistake of ours"), 1, "TypeError: a mistake of ours\n"),
    ],
)
def test_what_is_looked_at_before_a_run_hides_no_stop_and_no_mistake_of_ours(
    error: Exception,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hydra.compose", raising(error))
    monkeypatch.setattr("sim.simulate.hydra_main", lambda *_, **__: 0)
    assert cli.main(["compare"]) == code
    assert capsys.readouterr().err.endswith(told)


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: coserve" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["report", "fetch", "results", "validate", "reproduce"])
def test_an_unknown_option_is_refused_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--nope", "a", "b"])
    error = capsys.readouterr().err
    assert error.startswith(f"coserve {command}: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["report", "nowhere"], ["results", "nowhere"], ["fetch", "nowhere"]])
def test_every_command_says_error_in_the_same_form(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"coserve {argv[0]}: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("report --keep most runs", "--keep: must be a number, got most"),
        ("report --keep 0 runs", "--keep: must be above 0 and at most 100, got 0"),
        ("reproduce --workers all", "--workers: must be a whole number of at least 1, got all"),
        ("validate --max-error small a b", "--max-error: must be a number, got small"),
        ("validate --max-tpot-error nan a b", "--max-tpot-error: must be a percentage from 0, got nan"),
        ("validate --layers 0 a b", "--layers: must be a whole number of at least 1, got 0"),
    ],
)
def test_an_argument_that_is_no_number_is_told_with_what_is_allowed(
    command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"coserve {command.split()[0]}: error: argument {told}\n"


@pytest.mark.parametrize(
    ("command", "key"), [("reproduce --out file/x", "--out"), ("results --page file/x", "--page")]
)
def test_an_output_that_cannot_be_written_is_told_by_its_key(
    command: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert cli.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"error: {key}: file/x cannot be written: Not a directory\n")


def raising(error: BaseException) -> object:
    def command(*_: object) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("rate_rps must be above 0,\n got -1"), 2, "error: rate_rps must be above 0,; got -1\n"),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "error: No such file: x.csv\n"),
        (ModuleNotFoundError("torch", name="torch"), 2, "error: needs torch, which is not installed;"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            2,
            "the memory of this machine is not",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("a mistake of ours"), 1, "Traceback"),
        (KeyError("a mistake of ours"), 1, "Traceback"),
        (ModuleNotFoundError("sim.missing", name="sim.missing"), 1, "Traceback"),
    ],
)
def test_an_error_of_a_command_gives_its_line_and_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr(cli, "failing", raising(error), raising=False)
    monkeypatch.setitem(cli.COMMANDS, "failing", ("fails", "sim.cli:failing"))
    assert cli.main(["failing"]) == code
    err = capsys.readouterr().err
    assert told in err
    assert ("Traceback" in err) == (code == 1)


@pytest.mark.parametrize(
    ("number", "code", "told"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_a_stop_while_a_command_is_imported_is_one_whatever_the_import_swallows(
    number: str, code: int, told: str, tmp_path: Path
) -> None:
    """Packages try imports of others, and take a stop in them for what is not installed."""
    (tmp_path / "swallowing.py").write_text(
        "import signal\n"
        "try:\n    signal.raise_signal(signal.NUMBER)\n    whole = True\nexcept BaseException:\n    pass\n"
        "def main(argv):\n    return 0\n".replace("NUMBER", number)
    )
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from sim import cli;"
        "cli.COMMANDS['swallowing'] = ('', 'swallowing:main'); code = cli.main(['swallowing']);"
        "print(sys.modules['swallowing'].whole); sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, "True\n", f"coserve swallowing: {told}\n")


@pytest.mark.parametrize("command", ["--help", "report --definitions", "profile --help", "profile show"])
def test_a_reader_who_has_seen_enough_is_no_error(command: str) -> None:
    """The pipe is closed before anything is written, however little that is."""
    program = "import sys; from sim.cli import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, *command.split()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
