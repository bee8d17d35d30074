from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CONFIG = """
defaults:
  - policy: plain
  - _self_
  - override hydra/launcher: processes
  - override hydra/sweeper: grid
  - override hydra/hydra_logging: disabled
  - override hydra/job_logging: disabled
seed: 0
wait_s: 0.0
workload: {rate_rps: 5.0}
hydra:
  run: {dir: out}
  sweep: {dir: out, subdir: "${hydra:job.num}"}
  launcher: {workers: 2}
"""


@pytest.fixture
def app_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with configs of its own; the command writes into its `out`."""
    configs = tmp_path / "configs"
    own = Path(__file__).resolve().parents[2] / "configs" / "hydra"
    shutil.copytree(own, configs / "hydra")
    (configs / "policy").mkdir()
    (configs / "config.yaml").write_text(CONFIG)
    for name in ("plain", "eager", "broken"):
        (configs / "policy" / f"{name}.yaml").write_text(f"name: {name}\n")
    (configs / "policy/eager.yaml").write_text("name: eager\nmargin: 0.1\n_target_: nowhere\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
