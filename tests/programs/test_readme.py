"""What the README shows is what the programs do."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from sim.cli import COMMANDS, main
from sim.metrics import DEFINITIONS, LATENCIES, STATISTICS
from sim.results import read_run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BOTH = README + (ROOT / "engine/README.md").read_text()
FENCED = "".join(re.findall(r"^ *```\w*\n(.*?)^ *```", BOTH, re.MULTILINE | re.DOTALL)).replace("\\\n", "")
LINES = [line.strip() for line in FENCED.splitlines() if line.strip().startswith("coserve ")]
HYDRA = ("simulate", "compare", "frontier", "compile")
TORCH = ("bench", "finetune", "generate", "serve", "reference")


def test_every_metric_is_defined() -> None:
    latencies = {f"{key}_{name}_s" for key in LATENCIES for name in STATISTICS}
    for name, text in DEFINITIONS.items():
        if name in latencies:
            assert f"`{name.rsplit('_', 2)[0]}_mean_s`" in README
        else:
            assert f"| `{name}` | {text} |" in README


def test_every_policy_router_and_command_is_mentioned() -> None:
    for path in (ROOT / "configs/policy").glob("*.yaml"):
        assert path.stem.split("_25")[0].rstrip("0123456789_") in README
    for command in COMMANDS:
        assert f"coserve {command}" in BOTH


def test_nothing_is_left_to_fill_in_and_the_tree_is_there() -> None:
    assert "@@" not in BOTH
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        name = line.split()[0]
        assert (ROOT / name).exists() or (ROOT / "sim" / name).exists(), name


def test_there_are_commands_to_check() -> None:
    assert len(LINES) >= 6


def test_installs_are_of_the_pinned_versions() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    installs = re.findall(r"pip install (?!--no-index)(.*)", BOTH)
    assert len(installs) == 4 and "triton" in pinned
    assert all(install.startswith("-c constraints.txt ") for install in installs)
    assert f"-c constraints.txt 'torch=={pinned['torch']}'" in installs


@pytest.mark.parametrize("line", [line for line in LINES if line.split()[1] in HYDRA + TORCH])
def test_commands_of_the_readme_compose(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = line.split()[1:]
    if words[0] in TORCH:
        pytest.importorskip("torch")
    sweep = "-m" in words or words[0] == "compare"
    words[0] = "simulate" if words[0] == "compare" else words[0]
    # A sweep is composed with the first of its values.
    plain = [re.sub(r"=([^,\[]+),.*", r"=\1", word) if sweep else word for word in words if word != "-m"]
    assert main([*plain, "--cfg", "job"]) == 0
    assert "device:" in capfd.readouterr().out


def test_the_policy_of_the_readme_runs_from_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = README.split("- **A policy**")[1].split("- **A device**")[0]
    code, node = re.findall(r"^ *```\w+\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "policy").mkdir()
    for name, content in (("quiet.py", code), ("policy/quiet.yaml", node)):
        assert f"`{name}`" in text
        (tmp_path / name).write_text(dedent(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = re.findall(r"`PYTHONPATH=\. coserve (.*?)`", text)[0].split()
    own = ["cluster=single", "workload=poisson", "workload.rate_rps=2", "workload.duration_s=30"]
    trained = []
    for few in (0, 1000):
        assert main([*command, *own, "run.bounds=false", f"hydra.run.dir={few}", f"policy.few={few}"]) == 0
        summary = read_run(str(few)).summary
        assert summary["policy"] == f"quiet_{few}" and summary["attainment"] > 0.9
        trained.append(summary["finetune_fwd_tok_s"])
    assert 0 < 2 * trained[0] < trained[1]
