"""A PEFT adapter's own configuration decides what is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.compile.peft import LINEARS, PeftSpec
from sim.compile.peft_file import read_peft

LORA = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}


def written(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_what_peft_writes_is_read_or_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def saved(config: Any) -> Path:
        config.save_pretrained(tmp_path)
        return tmp_path

    config = peft.LoraConfig(r=8, lora_alpha=32, use_rslora=True, target_modules=["q_proj", "v_proj"])
    expected = PeftSpec(rank=8, alpha=32, rslora=True, targets=("q_proj", "v_proj"))
    assert read_peft(saved(config)) == expected
    assert read_peft(saved(config) / "adapter_config.json") == expected
    assert read_peft(saved(peft.LoraConfig(target_modules="all-linear"))).targets == LINEARS
    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert read_peft(saved(ia3)) == PeftSpec(method="ia3", targets=("k_proj", "down_proj"))
    for bad, option in (
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias"),
        (peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 4}), "rank_pattern"),
        (peft.LoraConfig(target_modules=["lm_head"]), "target_modules"),
        (peft.PromptTuningConfig(num_virtual_tokens=4), "peft_type"),
    ):
        with pytest.raises(ValueError, match=f"adapter_config.json: {option}"):
            read_peft(saved(bad))


def test_peft_leaves_out_what_it_defaults(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    default = peft.LoraConfig()
    spec = read_peft(written(tmp_path / "a", {"peft_type": "LORA", "target_modules": ["o_proj"]}))
    assert (spec.rank, spec.alpha, spec.dropout) == (default.r, default.lora_alpha, default.lora_dropout)
    assert spec.rslora == default.use_rslora


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**LORA, "r": "16"}, "r must be a number, got '16'"),
        ({**LORA, "r": 0}, "rank must be at least 1"),
        ({**LORA, "target_modules": []}, "target_modules must be a list of layers or all-linear, got \\[\\]"),
        ({**LORA, "target_modules": ["q_proj", 3]}, "target_modules must be among"),
        ({**LORA, "target_modules": [["q_proj"]]}, "target_modules must be among"),
        ({**LORA, "lora_alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({**LORA, "use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({**LORA, "layer_replication": [[0, 4]]}, "layer_replication must be None"),
        ({**LORA, "peft_type": ["LORA"]}, "peft_type must be one of LORA, IA3"),
        (
            {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": "down_proj"},
            "feedforward_modules must be \\['down_proj'\\] beside these targets, got 'down_proj'",
        ),
        ([], "must hold an object, got list"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, config: object, says: str) -> None:
    with pytest.raises(ValueError, match=f"adapter_config.json.*{says}"):
        read_peft(written(tmp_path / "a", config))


def test_the_command_compiles_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "adapter", LORA)
    assert main(["compile", f"adapter_config={folder}", "finetune.seq_len=512"]) == 0
    assert "lora on q_proj, v_proj" in capfd.readouterr().out
    assert main(["compile", "adapter_config=nowhere"]) == 2
    assert "nowhere is missing: not a PEFT adapter" in capfd.readouterr().err
