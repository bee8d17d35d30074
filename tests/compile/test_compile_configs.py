"""Every PEFT configuration that is shipped builds and compiles."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from sim import compile_program
from sim.cli import main
from sim.compile.compiler import Analysis
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
    plan = Analysis(SMALL, PeftSpec(**values), seq_tokens=64, device=DEVICE, tp=tp).plan()
    assert plan.targets == tuple(values["targets"])
    assert plan.kept_bytes_per_token > 0


def test_a_sample_beyond_the_context_of_the_model_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "note: finetune.seq_len 131073 is longer than the context of llama_3_1_8b, 131072 tokens\n"
    for seq_len, told in ((131072, ""), (131073, note)):
        own = ["device=h200", "finetune.mode=recompute", f"finetune.seq_len={seq_len}"]
        assert main(["compile", *own, "hydra.run.dir=out"]) == 0
        assert capfd.readouterr().err == told


def test_the_title_of_a_plan_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "model=qwen2_5_14b", "peft=lora_all", "tp=2", "finetune.seq_len=1024"]) == 0
    assert capfd.readouterr().out.splitlines()[0] == (
        "qwen2_5_14b, lora on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: "
        "KiB per token and layer, per device of 2"
    )


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
        ("show=placements finetune.seq_len=0", "finetune.seq_len must be at least 1, got 0"),
        ("show=placements finetune.window_tokens=-1", "finetune.window_tokens must be at least 1, got -1"),
        ("adapter_config=5", "adapter_config must be text or null, got 5"),
        ("peft.targets=[]", "peft.targets must name at least one layer, got none"),
        ("peft.targets=[q]", "peft.targets must be one of q_proj, "),
        ("finetune=5", "finetune must be a group of keys, got 5"),
        ("finetune=none", "nothing is chosen for 'finetune' in this command; its keys are set one by one"),
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
    assert main(["compile", *argument.split()]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"coserve compile: error: {told}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--all", "finetune.mode=foo", "model=qwen_72b"], "--all does not depend on finetune.mode, model; "),
        (["--all", "tp=3", "finetune.seq_len=512"], "--all does not depend on tp; "),
        (["--all", "peft.rank=3"], "--all does not depend on peft.rank; "),
        (["--all", "finetune.accumulation=2"], "--all does not depend on finetune.accumulation; "),
        (["--placements", "tp=4"], "--placements does not depend on tp; "),
        (["--placements", "model.tp=4"], "--placements does not depend on model.tp; "),
        (["--placements", "memory_utilization=0.5"], "--placements does not depend on memory_utilization; "),
        (["show=published", "device=h100"], "--published does not depend on device; it takes no key"),
        (["--all", "--placements"], "one of --all, --placements, --published can be shown, got several"),
    ],
)
def test_settings_that_change_nothing_of_a_table_are_refused(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", *arguments]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"coserve compile: error: {told}")
    if "does not depend" in told and "show" not in arguments[0]:
        assert all(key in said.err for key in compile_program.TAKEN[arguments[0].removeprefix("--")])


@pytest.mark.parametrize(
    ("shown", "argument"),
    [
        ("all", "device=h200"),
        ("all", "finetune.seq_len=512"),
        ("all", "finetune.flops_budget=0.1"),
        ("all", "finetune.window_tokens=256"),
        ("all", "memory_utilization=0.5"),
        ("placements", "model=llama_3_2_1b"),
        ("placements", "device=h200"),
        ("placements", "finetune.seq_len=512"),
        ("placements", "finetune.window_tokens=256"),
        ("placements", "finetune.accumulation=1"),
    ],
)
def test_settings_that_a_table_takes_change_it(
    shown: str,
    argument: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert argument.partition("=")[0] in compile_program.TAKEN[shown]
    tables = []
    for arguments in ([], [argument]):
        assert main(["compile", f"--{shown}", *arguments]) == 0
        tables.append(capfd.readouterr().out)
    assert tables[0] != tables[1]


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def compiled(*arguments: str) -> str:
        code = main(["compile", "model=llama_3_1_70b", "hydra.run.dir=out", *arguments])
        said = capfd.readouterr()
        told = next(line for line in said.out.splitlines() if line.startswith("KV room left"))
        assert (code, said.err.count("\n")) == ((2, 1) if "does not fit" in told else (0, 0))
        short = re.search(r"need (.*) GiB more per device", told)
        if short is not None:
            error = f"the plan does not fit: it needs {short[1]} GiB more per device"
            assert said.err == f"coserve compile: error: {error}\n"
        assert Path("out/plan.json").is_file()
        return told

    told = compiled("tp=1")
    found = re.search(
        r"none, it does not fit: .* need ([\d.]+) GiB more per device .*; possible with (.*)", told
    )
    assert found is not None and float(found[1]) == pytest.approx(176.1, abs=0.1)
    ways = found[2].split(" or ")
    assert len(ways) > 1 and "tp=8" in ways
    for way in ways:
        assert compiled("tp=1", *way.split()).endswith(" tokens"), way
    less = compiled("finetune.seq_len=131072").partition("; possible with ")[2]
    assert less == "finetune.mode=recompute or finetune.seq_len=4096", (
        "and not a smaller model with it as well"
    )
    assert compiled("tp=4").startswith("KV room left: none, it does not fit: ")
    assert compiled("tp=1", "memory_utilization=0.01").endswith(
        "; no tp up to 16 and no smaller model would do"
    )


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_the_column_of_the_plan_is_starred(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", f"finetune.mode={mode}", "hydra.run.dir=out"]) == 0
    lines = capfd.readouterr().out.splitlines()
    heads = next(line for line in lines if "unpruned" in line).split("┃")
    [place] = [i for i, head in enumerate(heads) if "*" in head]
    assert heads[place].strip() == ("+remat *" if mode == "stash" else "+token-level *")
    live = next(line for line in lines if line.startswith(f"* {mode}: ")).partition("(")[2].partition(")")[0]
    parts = dict(part.rsplit(" ", 1) for part in live.split(", ") if part[-1].isdigit())
    held = ["K V", "kept"] if mode == "stash" else ["K V", "kept", "dK dV", "hidden gradient"]
    total = float(next(line for line in lines if "layers x" in line).split("│")[place])
    assert total == pytest.approx(sum(float(parts[name]) for name in held), abs=0.02)


def test_samples_that_do_not_fit_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    legend = "* does not fit into a device beside its weights and adapter"

    def marked(*arguments: str) -> tuple[int, bool]:
        assert main(["compile", "--all", *arguments]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        return sum(line.count("*") for line in lines[:-1]), lines[-1] == legend

    some, more = marked(), marked("memory_utilization=0.1")
    assert 0 < some[0] < more[0] and some[1] and more[1]
    assert marked("finetune.seq_len=16", "device=h200") == (0, False)


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
        "coserve compile: error: half.yaml: model.hidden, model.heads, model.kv_heads, model.head_dim, "
        "model.ffn and model.vocab are missing; they must be given; odd.yaml: "
    )
