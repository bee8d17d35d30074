"""What `--help` offers exists: every choice of every group composes, every key can be set, the example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sim import cli
from sim.assemble import CONFIGS
from sim.compile_program import SHOWS
from sim.usage import all_groups

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "simulate": (CONFIGS, "config"),
    "compare": (CONFIGS, "config"),
    "frontier": (CONFIGS, "config"),
    "compile": (CONFIGS, "compile"),
    "bench": (ROOT / "engine" / "configs", "bench"),
    "finetune": (ROOT / "engine" / "programs", "finetune"),
    "generate": (ROOT / "engine" / "programs", "generate"),
    "serve": (ROOT / "engine" / "configs", "serve"),
    "reference": (ROOT / "engine" / "configs", "reference"),
    "profile collect": (ROOT / "engine" / "configs", "profile"),
}
ENGINES = ["bench", "finetune", "generate", "profile collect", "reference", "serve"]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    try:
        code = cli.main([*command.split(), "--help"])
    except SystemExit as end:  # argparse leaves by it
        code = end.code
    assert code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_choice_and_key_of_the_help_can_be_given(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(command, capsys)
    folder, name = COMMANDS[command]
    groups = all_groups(folder, name)
    assert max(map(len, lines)) <= 115
    entries = re.sub(r"\n {3,}", " ", "\n".join(lines)).splitlines()
    shown = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in entries
        if line.startswith("  ") and "=" not in line
    }
    assert {
        group: re.sub(r"\*| \(\w+\)", "", text).split(", ")
        for group, text in shown.items()
        if group in groups
    } == groups
    keys = [
        line.split()[0]
        for line in lines[lines.index("Keys:") + 1 :]
        if line.startswith("  ") and line[2] != " " and "=" in line.split()[0]
    ]
    keys = [key for key in keys if not key.startswith(("-", "hydra"))]
    assert len(keys) > 5 or (folder == CONFIGS and name == "config")
    with initialize_config_dir(str(folder), version_base="1.3"):
        compose(name, [key.replace("=...", "=x") for key in keys])
        for group, names in groups.items() if name != "config" else ():  # its choices are tested elsewhere
            for choice in names:
                compose(name, [f"{group}={choice}"])


@pytest.mark.parametrize("command", [*COMMANDS, "fetch", "report", "reproduce", "results", "validate"])
def test_every_key_and_option_is_described(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(command, capsys)
    entries = re.sub(r"\n {4,}", "  ", "\n".join(lines)).splitlines()
    keys = [line for line in entries if re.match(r"  (-|[a-z_.]+=|[A-Za-z_]+ {2,})", line)]
    assert len(keys) > 2
    assert [line for line in keys if not re.search(r"\S {2,}\w", line.replace("(must be given)", ""))] == []


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_example_of_the_help_is_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [line for line in help_of(command, capsys) if line.startswith("Example: ")]
    words = example.removeprefix(f"Example: coserve {command} ").split()
    assert words and words[0] != "Example:"
    folder, name = COMMANDS[command]
    with initialize_config_dir(str(folder), version_base="1.3"):
        compose(name, words)


def test_the_help_of_bench_lists_the_simulators_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(help_of("bench", capsys))
    groups = all_groups(*COMMANDS["bench"])
    for group in ("policy", "workload", "slo", "model", "device"):
        own = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        assert own <= set(groups[group])
    assert "tiny" in groups["model"] and "cpu" in groups["device"]
    assert set(groups["experiment"]).isdisjoint(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
    assert "tiny*" in text and "coserving*" in text


@pytest.mark.parametrize("command", ["compare", "frontier"])
def test_commands_that_share_a_config_say_what_they_do_themselves(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(command, capsys)
    assert not any("coserve simulate" in line for line in lines)
    assert lines[2] != help_of("simulate", capsys)[2]


@pytest.mark.parametrize("program", ["collect", "show", "fit", "check", "curves"])
def test_each_program_of_profile_has_help_of_its_own(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usages = [line for line in help_of(f"profile {program}", capsys) if "coserve profile" in line]
    assert usages[0].startswith(f"usage: coserve profile {program} ")


def test_a_policy_with_two_names_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "temporal (temporal_64)," in "\n".join(help_of("compare", capsys))


def test_the_help_of_compile_names_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {line.split()[0] for line in help_of("compile", capsys) if line.startswith("  --")}
    assert {f"--{name}" for name in SHOWS if name != "plan"} <= flags


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from sim.cli import main
for command in sys.argv[1:]:
    main(command.split())
"""


def without_torch(commands: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *commands],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_programs_of_the_engine_say_alike_what_brings_torch() -> None:
    install = "pip install -c constraints.txt -e '.[engine]'"
    assert install in (ROOT / "README.md").read_text(), "the same as there"
    told = f"needs torch, which is not installed; {install} in the folder of coserve brings it"
    names = [f"coserve {command.split()[0]}" for command in ENGINES]
    assert without_torch(ENGINES).stderr.splitlines() == [f"{name}: error: {told}" for name in names]


def test_the_help_of_the_engines_programs_is_read_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    done = without_torch([f"{command} --help" for command in ENGINES])
    assert done.stderr == ""
    assert done.stdout.splitlines() == [line for command in ENGINES for line in help_of(command, capsys)]
