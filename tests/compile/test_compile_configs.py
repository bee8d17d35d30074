"""Every PEFT configuration that is shipped builds and compiles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sim import compile_program
from sim.cli import main
from sim.compile.compiler import compile_plan
from sim.compile.peft import PeftSpec
from sim.core.specs import DeviceSpec, ModelShape

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "peft"
SMALL = ModelShape(name="s", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=64)
DEVICE = DeviceSpec(
    name="d", peak_flops=1e12, memory_bandwidth_bytes_s=1e11, memory_bytes=1e9, link_bandwidth_bytes_s=1e10,
    sms=8, source="made up",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("tp", [1, 2])
def test_configuration_compiles(path: Path, tp: int) -> None:
    values = yaml.safe_load(path.read_text())
    assert values.pop("_target_") == "sim.compile.peft.PeftSpec"
    plan = compile_plan(SMALL, PeftSpec(**values), seq_tokens=64, device=DEVICE, tp=tp)
    assert plan.targets == tuple(values["targets"])
    assert plan.kept_bytes_per_token > 0


def test_a_sample_beyond_the_context_of_the_model_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "note: finetune.seq_len 131073 is longer than the context of llama_3_1_8b, 131072 tokens\n"
    for seq_len, told in ((131072, ""), (131073, note)):
        assert main(["compile", f"finetune.seq_len={seq_len}", "hydra.run.dir=out"]) == 0
        assert capfd.readouterr().err == told


@pytest.mark.parametrize("shown", ["plan", "all", "placements", "published"])
@pytest.mark.parametrize("group", ["model", "peft", "device", "finetune"])
def test_unknown_keys_are_refused_whatever_is_shown(
    shown: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", f"show={shown}", f"+{group}.more=1"]) == 2
    assert f"coserve compile: error: {group} has no key 'more'; " in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("tp=x", "tp must be a whole number or null, got 'x'"),
        ("tp=0", "tp must divide heads 32"),
        ("memory_utilization=x", "memory_utilization must be a number, got 'x'"),
    ],
)
def test_numbers_that_are_none_are_refused(
    argument: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", argument]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"coserve compile: error: {told}") and error.count("\n") == 1


def test_what_is_only_printed_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "--published"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_model_whose_file_is_incomplete_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "configs/peft")
    models = tmp_path / "configs" / "model"
    models.mkdir()
    for name in ("llama_3_1_8b", "qwen2_5_14b"):
        shutil.copy(FOLDER.parent / "model" / f"{name}.yaml", models)
    monkeypatch.setattr(compile_program, "CONFIGS", tmp_path / "configs")
    assert main(["compile", "--all", "finetune.seq_len=512"]) == 0
    whole = capfd.readouterr().out
    assert "llama_3_1_8b on 1" in whole and "qwen2_5_14b on 2" in whole
    (models / "half.yaml").write_text("name: half\nlayers: 3\n")
    (models / "odd.yaml").write_text((models / "llama_3_1_8b.yaml").read_text() + "heads_: 3\n")
    assert main(["compile", "--all", "finetune.seq_len=512"]) == 2
    said = capfd.readouterr()
    assert said.out == whole and said.err.count("\n") == 1
    assert said.err.startswith(
        "coserve compile: error: half.yaml: model.hidden is missing; it must be given; odd.yaml: "
    )
