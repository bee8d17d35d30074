"""What `coserve simulate` refuses: one line that says what was given and what is allowed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sim.cli import main
from sim.results import find_runs, read_run
from tests.programs.simulated import CONFIGS, LATE, SHORT

pytestmark = pytest.mark.usefixtures("inside")


@pytest.mark.parametrize("command", ["compare", "frontier"])
def test_all_policies_of_one_pipeline_run_and_those_asked_for_by_name_are_refused(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["workload=poisson", "workload.rate_rps=4", "workload.duration_s=2", "cluster=single"]
    own += [] if command == "compare" else ["cluster/router=least_tokens"]
    assert main([command, *own, "hydra.sweep.dir=all"]) == 0
    assert capfd.readouterr().err.count(" left out: ") == 1
    ran = {read_run(path).config["policy"]["name"] for path in find_runs(["all"])}
    assert {"coserving", "temporal_64"} < ran and "separate_50" not in ran
    assert main([command, *own, "policy=coserving,separate_50", "hydra.sweep.dir=named"]) == 1
    told = capfd.readouterr().err
    assert "a share of 0.5 of 1 pipeline cannot serve" in told
    assert " left out: " not in told


@pytest.mark.parametrize(
    ("swept", "without"),
    [
        (["workload.adapters.count=0,2", "workload.adapters.zipf=2"], "workload.adapters.count=0"),
        (["cluster.pipelines=1,2", "cluster.router.headroom=0.5"], "cluster.pipelines=1"),
    ],
)
def test_a_sweep_may_give_a_key_that_only_some_of_its_runs_read(
    swept: list[str], without: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["workload=constant", "workload.duration_s=2", "policy=inference_only", "finetune=none"]
    assert main(["simulate", "-m", *own, *swept, "hydra.sweep.dir=swept"]) == 0
    assert main(["simulate", *own, without, swept[1]]) == 2
    assert f"{swept[1].partition('=')[0]} changes nothing here: " in capfd.readouterr().err


@pytest.mark.parametrize("command", ["compare", "frontier"])
def test_a_sweep_over_no_value_is_one_clear_line(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, *SHORT, "seed=range(3,0)"]) == 2
    error = capfd.readouterr().err
    assert "error: 'seed=range(3,0)' gives no value" in error and error.count("\n") == 1


BAD = {
    "device=[a100_80gb,b200]": "device takes one choice, got [a100_80gb,b200]; -m and device=a100_80gb,b200 run each",
    "slo=llmstation model.name=mine model.kv_heads=3": "model.heads must be a multiple of model.kv_heads",
    "model.name=mine model.kv_heads=3": "model.heads must be a multiple of model.kv_heads, got 32 and 3",
    "polcy=coserving": "no key or group named 'polcy'; did you mean 'policy'?",
    "policy=temporl": "no policy named 'temporl'; did you mean 'temporal'?",
    "policy.margn=0.1": "'policy.margn'",
    "policy.margin=wide": "policy.margin must be a number, got 'wide'",
    "policy.margin=2": "policy.margin must be in [0, 1), got 2",
    "workload.rate_rps=fast": "workload.rate_rps must be a number, got 'fast'",
    "workload.rate_rps=-1": "workload.rate_rps must be a number above 0, got -1",
    "workload.duration_s=0": "workload.duration_s",
    "slo.classes.default.tpot_s=-1": "slo.classes.default.tpot_s must be above 0",
    "slo.classes.default.tpot_s=0.001": "slo.classes.default.tpot_s cannot be kept",
    "slo.classes.default.ttft_s=0.001": "slo.classes.default.ttft_s cannot be kept",
    "+slo.more=1": "slo has no key 'more'; known: name, classes, tpot_s",
    "+slo.tpot_s={typo:0.1}": "slo.tpot_s.typo is read by no SLO class",
    "+slo.tpot_s.mine=1": "slo.tpot_s.mine is read by no SLO class; their bounds are slo.tpot_s.llama_3_1_8b",
    "slo.tpot_s.qwen2_5_7b=1": "slo.tpot_s.qwen2_5_7b is read by no SLO class; their bounds are slo.tpot_s.llama",
    "slo=two_classes +slo.tpot_s.llama_3_1_8b=1": "their bounds are slo.classes.interactive.tpot_s, slo.classes.b",
    "slo.classes=null slo.tpot_s.llama_3_1_8b=1": "slo.classes must be a group of keys, got None",
    "+slo.classes.more=1": "slo.classes.more must be a group of keys, got 1",
    "+experiment.more=1": "no key or group named 'experiment.more'; did you mean 'experiment'?",
    "cluster.limits.kv_tokens=3": "cluster.limits.kv_tokens must hold a block of 16 tokens, got 3",
    "cluster.limits.admission=random": "cluster.limits.admission must be one of fcfs, deadline, shortest",
    "cluster.limits.lookahead=2": "cluster.limits.lookahead must be 0 or 1, got 2",
    "cluster.pipelines=0": "cluster.pipelines must be in 1..4096, got 0",
    "cluster.tp=3": "tp must divide heads 32",
    "cluster.groups=[{pipelines:1,device:h100}]": "cluster.pipelines (equal pipelines) or cluster.groups",
    "cluster.groups=3": "cluster.groups must be a list, each item a group of keys or null, got 3",
    "cluster.pipelines=null cluster.groups=[5]": "cluster.groups[0] must be a group of keys, got 5",
    "cluster.pipelines=null cluster.groups=[{pipelines:1,device:h10}]": "no device named 'h10'; did you mean 'h100'?",
    "model=llama_3_1_70b cluster.tp=1": "leaves no room for finetuning",
    "policy=separate cluster.pipelines=3": "policy=separate policy.inference_share=0.333333333333, 0.666666666667",
    "policy=separate_25 cluster.pipelines=2": "a share of 0.25 of 2 pipelines cannot serve: whole ones must, and at "
    "least one must finetune; possible with policy=separate policy.inference_share=0.5",
    "policy=separate_25 cluster.pipelines=1": "possible with cluster.pipelines=2 or more",
    "policy=separate_25 cluster.pipelines=9": "0.777777777778 and other multiples of 1/9",
    "workload.adapters.zipf=2": "workload.adapters.zipf changes nothing here: workload.adapters.count is 0",
    "workload.adapters={base_share:0.5}": "workload.adapters.base_share changes nothing here: workload.adapters.count",
    "cluster=single cluster.router.headroom=0.5": "headroom changes nothing here: the cluster has 1 pipeline",
    "policy=temporal_dynamic policy.window_s=0": "policy.window_s must be above 0, got 4.0, 2.0 and 0.0",
    "cluster.pipelines=null cluster.groups=[{pipelines:1},{pipelines:1,kv_tokens:8}]": (
        "cluster.groups[1].kv_tokens must hold a block of 16 tokens, got 8"
    ),
    "cluster.pipelines=null cluster.groups=[{pipelines:1}] cluster.router.headroom=0.5": "the cluster has 1 pipeline",
    "finetune.lora.targets=[down]": "finetune.lora.targets must be among",
    "finetune.jobs.sky_t1.weight=0": "error: finetune.jobs.sky_t1.weight must be a number above 0",
    "finetune.jobs.sky_t1.order=x": "error: finetune.jobs.sky_t1.order must be one of layer_major, window_major",
    "finetune.jobs.sky_t1.data.samples=0": "error: finetune.jobs.sky_t1.data.samples must be a whole number",
    "finetune=file": "error: finetune.jobs.file.data.file must be the path of a data set, got none",
    "workload/lengths=lognormal workload.lengths.prompt.quantiles.p50=0": "lengths.prompt.quantiles.p50 must",
    "hydra.run.dir=": "hydra.run.dir must be a folder, got nothing",
    "device.peak_flops=inf": "device.peak_flops must be from 1e+08 to 1e+20 FLOP/s, got inf",
    "device.link_bandwidth_bytes_s=inf": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got inf",
    "device.peak_flops=989": "got 989; 989 TFLOP/s are 989e12",
    "device.peak_flops=989000": "got 989000; 989000 GFLOP/s are 989000e9",
    "device.memory_bandwidth_bytes_s=3350": "from 1e+06 to 1e+19 B/s, got 3350; 3350 GB/s are 3350e9",
    "device.link_bandwidth_bytes_s=900": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got 900",
    "device.memory_bytes=80": "device.memory_bytes must be from 1e+06 to 1e+15 B, got 80; 80 GB are 80e9",
    "device.memory_bytes=81920": "got 81920; 81920 MB are 81920e6",
    "device.l2_bytes=40": "got 40; 40 MB are 40e6",
    "device.vector_flops=19.5": "got 19.5; 19.5 TFLOP/s are 19.5e12",
    "device.clock_hz=1.41": "got 1.41; 1.41 GHz are 1.41e9",
    "device.clock_hz=1410000": "device.clock_hz must be from 1e+07 to 1e+12 Hz, got 1410000; 1410000 kHz are 1410000e3",
    "device.link_bandwidth_bytes_s=-1": "device.link_bandwidth_bytes_s must be 0 or from 1e+06 to 1e+16 B/s, got -1",
    "model.hidden=7": "model.hidden must be a multiple of model.heads, got 7 and 32",
    "model.head_dim=7": "model.head_dim must be even, for rotary embeddings, got 7",
    "model.kv_heads=3": "model.heads must be a multiple of model.kv_heads, got 32 and 3",
    "model.layers=0": "model.layers must be at least 1 and at most 2147483647, got 0",
    "device.power_w=-5": "device.power_w must be at least 0 and finite, got -5.0",
    "+device.price_per_hour=-2": "device.price_per_hour must be at least 0 and finite, got -2.0",
    "+device.idle_power_w=500": "device.idle_power_w must be at most power_w 400, got 500",
    "policy.budget_s=fast": "policy.budget_s must be a number, got 'fast'",
    "policy.budget_s=0": "policy.budget_s must be above 0 seconds, got 0",
    "seed=x": "seed must be a whole number from 0, got 'x'",
    "run.drain_s=-1": "run.drain_s must be at least 0 seconds",
    "workload=csv": "workload.file must be the path of a trace",
    "workload=csv workload.file=none.csv": "no such file: none.csv",
    "workload=azure_conv": "coserve fetch azure_conv",
    "workload=csv workload.file=empty.csv": "empty.csv",
    "workload=csv workload.file=bad.csv": "bad.csv: row 3",
    "workload=csv workload.file=nan.csv": "nan.csv: row 2",
    "workload=csv workload.file=zero.csv": "zero.csv: row 2",
    "workload=csv workload.file=blank.csv": "no column 'arrival_s', got an empty file",
    "workload=csv workload.file=folder": "folder is a folder, and must be a file",
    "workload.rate_rps=1e9": "workload.rate_rps x workload.duration_s must be at most 10,000,000 requests",
    "workload.duration_s=1e9": "got 8 x 1e+09 = 8e+09",
    "workload.duration_s=1e9 workload.rate_rps=1e-4": "workload.duration_s must be at most 10,000,000 seconds",
    "workload=csv workload.file=late.csv workload.repeat=true workload.duration_s=1e8": "at most 10,000,000",
    "cost.predictor.factor=0": "error: cost.predictor.factor must be in [0.001, 1000], got 0",
    "cost.world.spread=2": "error: cost.world.spread must be in [0, 1), got 2",
    "+cost.world.of.host_s=inf": "cost.world.of.host_s must be at least 0 and finite, got inf",
    "+cost.path=mine.parquet": "error: cost has no key 'path'; known: world, predictor",
    "model.name=mine": "give it with +slo.tpot_s.mine=..., or slo.classes.default.tpot_s=... itself",
    "hydra.run.dir=file/below": "file",
    "run=5": "run must be a group of keys, got 5",
    "policy.name=[a]": "policy.name must be text that is not empty, got ['a']",
    "device.name=''": "device.name must be text that is not empty, got ''",
    "~seed": "seed is not there; the command needs it",
    "policy=5": "policy must be one of coserving, ",
    "policy=[]": "policy must be one of coserving, ",
    "cost={a:1}": "no key or group named 'cost.a'",
    "cost.world=[1]": "cost.world must be a group of keys, got [1]",
    "cost.predictor.of.rows=1000000000": "cost.predictor.of.rows must be at least 100 to fit all terms and at most",
    "cost.predictor.of.seed=-1": "cost.predictor.of.seed must be at least 0, got -1",
    "cluster/router=power_of_two cluster.router.seed=-1": "cluster.router.seed must be at least 0, got -1",
    "cluster/router=adapter_affinity cluster.router.max_imbalance=inf": "cluster.router.max_imbalance must be at",
    "cluster.limits.max_sequences=0": "cluster.limits.max_sequences must be at least 1, got 0",
    "cluster.limits.block_tokens=0": "cluster.limits.block_tokens must be at least 1, got 0",
    "cluster.pipelines=1000000000": "cluster.pipelines must be in 1..4096, got 1000000000",
    "cluster.pipelines=null cluster.groups=[{pipelines:4000},{pipelines:97}]": "at most 4096 pipelines together",
    "slo.tpot_s.llama_3_1_8b=-1": "slo.tpot_s.llama_3_1_8b must be above 0 seconds, got -1.0",
    "device.memory_bandwidth_bytes_s=1e-300": "device.memory_bandwidth_bytes_s must be from 1e+06 to 1e+19 B/s",
    "device.link_bandwidth_bytes_s=0.5": "B/s, got 0.5",
    "+device.extras.layer_fixed_s=inf": "device.extras.layer_fixed_s must be above 0 and finite, got inf",
    "finetune.lora.targets=[]": "finetune.lora.targets must name at least one linear layer, got none",
    "finetune.lora.targets=[q_proj,q_proj]": "finetune.lora.targets must name each layer once, got q_proj again",
    "finetune.jobs.sky_t1.data.samples=1000000000": "sky_t1.data.samples must be a whole number, at least 1 and",
    "finetune=file finetune.jobs.file.data.file=''": "finetune.jobs.file.data.file must be the path of a file, got ''",
    "finetune=file finetune.jobs.file.data.file=bad.csv finetune.jobs.file.data.column=''": "data.column must be null",
    "workload.adapters.count=1000000000": "workload.adapters.count must be a whole number, at least 0 and",
    "workload.arrivals.bin_s=1e-9": "workload.arrivals.bin_s must leave at most 10,000,000 bins",
    "workload=gamma workload.arrivals.cv=1e-200": "workload.arrivals.cv must be a number at least 0.001",
    "workload=csv workload.file=[]": "workload.file must be the path of a file, got []",
    "workload=csv workload.file=far.csv": "far: the trace lasts 2e+300 s, of which at most 10,000,000 can be run",
    "workload=csv workload.file=late.csv workload.rate_rps=1e-300": "the trace lasts 3e+300 s, of which at most",
    "workload=csv workload.file=named.csv": "named.csv: row 2, column slo: no SLO class 'chat'; the slo",
    "workload=closed_loop workload.clients=1000000000": "workload.clients must be a whole number, at least 1 and",
    "workload=closed_loop workload.duration_s=1e9": "workload.duration_s must be at most 10,000,000 seconds",
    "workload=closed_loop workload.retry_s=1e-9": "workload.retry_s must be a number at least 0.001, got 1e-09",
    "workload=burstgpt workload.reader.models=[]": "workload.reader.models must be null or a list of names, got []",
    "workload/lengths=from_trace workload.lengths.file=''": "workload.lengths.file must be the path of a file, got ''",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_clear_line(override: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty.csv").write_text("arrival_s,prompt_tokens,output_tokens\n")
    Path("bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,many,5\n")
    Path("nan.csv").write_text("arrival_s,prompt_tokens,output_tokens\nnan,10,5\n")
    Path("zero.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,0,5\n")
    Path("late.csv").write_text(LATE)
    Path("far.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1e300,10,5\n")
    Path("named.csv").write_text("arrival_s,prompt_tokens,output_tokens,slo\n0,10,5,chat\n")
    Path("blank.csv").write_text("")
    Path("folder").mkdir()
    Path("file").write_text("not a folder")
    assert main(["simulate", *override.split()]) == 2
    err = capfd.readouterr().err
    assert err.startswith("coserve simulate: error: ")
    assert BAD[override] in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


BROKEN = """
from sim.core.plan import Plan


class Broken:
    serves = True
    finetunes = False

    def plan(self, view):
        return Plan() if view.now_s == 0 else next(map(self.pick, [view]))

    def pick(self, view):
        raise ValueError("none of\\nthem") from KeyError(3)
"""


@pytest.mark.parametrize("workers", ["processes", "basic"])
def test_a_policy_that_raises_is_told_with_the_lines_of_its_own_file(
    workers: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = inside / f"policy_under_{workers}.py"
    file.write_text(BROKEN)
    monkeypatch.syspath_prepend(inside)
    monkeypatch.setenv("PYTHONPATH", f"{inside}{os.pathsep}{CONFIGS.parent}")
    own = ("policy=finetune_only", f"policy._target_={file.stem}.Broken")
    lines = [
        r"policy Broken at \d\.\d{6} s: ValueError: none of; them",
        rf"  {file}:10 in plan: return Plan\(\) if view\.now_s == 0 else next\(map\(self\.pick, \[view\]\)\)",
        rf'  {file}:13 in pick: raise ValueError\("none of\\nthem"\) from KeyError\(3\)',
    ]
    assert main(["simulate", *SHORT, *own]) == 2
    assert re.fullmatch("coserve simulate: error: " + "\n".join(lines) + "\n", capfd.readouterr().err)
    sweep = ["simulate", "-m", *SHORT, *own, "seed=0,1", f"hydra/launcher={workers}"]
    assert main(sweep) == 1
    failed = [rf"run .* seed={seed} failed: " + "\n".join(lines) + "\n" for seed in (0, 1)]
    said = capfd.readouterr().err
    assert all(re.search(text, said) for text in failed) and "Traceback" not in said and "simpy" not in said


OWN = """
from sim.core.plan import Plan


class Own:
    serves = finetunes = True

    def __init__(self, *, few: int) -> None:
        self.few = few

    def plan(self, view):
        return Plan()
"""


BAD_POLICIES = {
    "serves = finetunes = True": (
        "",
        "policy Own in {file} needs serves = True or False, finetunes = True or False",
    ),
    "serves = f": ("f", "policy Own in {file} needs serves = True or False"),
    "= finetunes = True": (
        "= True; finetunes = 'yes'",
        "policy Own in {file} needs finetunes = True or False",
    ),
    "plan(self, view)": ("plam(self, view)", "policy Own in {file} needs a method plan(view) -> Plan"),
    "class Own:": (
        "class Own",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 5: not Python: ",
    ),
    "import Plan": (
        "import Plam",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 2: ImportError: cannot import name 'Plam'",
    ),
    "from sim.core.plan": (
        "from nowhere.plan",
        "policy._target_ '{module}.Own' cannot be imported: {file}, line 2: ModuleNotFoundError: No module named",
    ),
    "Own:": ("Owl:", "policy._target_ names nothing that exists: '{module}.Own'; did you mean 'Owl'?"),
    "few: int": ("fw: int", "policy has no key 'few'; did you mean 'fw'?; known: fw"),
    "few: int)": ("few: 'Int')", "policy._target_: an annotation of Own names 'Int', which is not imported"),
    "self.few = few": (
        "self.few = fw",
        "policy Own: NameError: name 'fw' is not defined\n  {file}:9 in __init__: self.few = fw",
    ),
    "    def plan(self, view):\n        return Plan()": (
        "    def assign(self, pipelines):\n        return [self]",
        "policy Own in {file}: assign(4) must return as many policies, got 1",
    ),
}


@pytest.mark.parametrize("change", BAD_POLICIES)
def test_a_policy_that_is_none_is_told_by_its_file(
    change: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    instead, told = BAD_POLICIES[change]
    file = inside / f"own_{list(BAD_POLICIES).index(change)}.py"
    file.write_text(OWN.replace(change, instead))
    monkeypatch.syspath_prepend(inside)
    (inside / "policy").mkdir()
    (inside / "policy/own.yaml").write_text(f"name: own\n_target_: {file.stem}.Own\nfew: 3\n")
    assert main(["simulate", *SHORT, "--config-dir", ".", "policy=own"]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"coserve simulate: error: {told.format(file=file, module=file.stem)}")
    assert err.count("\n") == 1 + told.count("\n")


def test_keys_of_a_policy_in_a_folder_of_its_own_are_known(
    inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (inside / "policy").mkdir()
    (inside / "policy/own.yaml").write_text("name: own\n_target_: nowhere.Own\nfew: 3\n")
    for place in (["--config-dir", "."], [f"hydra.searchpath=[{inside}]"]):
        assert main(["simulate", *place, "policy=own", "policy.fw=4"]) == 2
        assert "no key or group named 'policy.fw'; did you mean 'policy.few'?" in capfd.readouterr().err
        assert main(["simulate", *place, "policy=own"]) == 2
        missing = (
            "policy._target_ names a module that does not exist: 'nowhere.Own'; is its folder on PYTHONPATH?"
        )
        assert missing in capfd.readouterr().err


@pytest.mark.parametrize(
    "given", [["--config-dir", "own.yaml"], ["--config-dir=own.yaml"], ["-cd", "own.yaml"]]
)
def test_a_config_dir_that_is_none_is_told(
    given: list[str], inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for there in ("nothing at", "the file"):
        assert main(["simulate", *given]) == 2
        told = f"--config-dir must be a folder, got {there} own.yaml"
        assert capfd.readouterr().err == f"coserve simulate: error: {told}\n"
        (inside / "own.yaml").touch()


@pytest.mark.parametrize(
    ("given", "missing", "ways"),
    [
        (
            "device=l4 model=llama_3_1_8b",
            "to take 0.06468 s on llama_3_1_8b, got 0.045",
            ["cluster.tp=2", "model=llama_3_2_3b", "slo.classes.default.tpot_s=0.065"],
        ),
        (
            "model=llama_3_1_70b cluster.tp=1",
            "need 60.4 GiB more per device",
            ["cluster.tp=4", "model=codellama_34b"],
        ),
        (
            "cluster.limits.kv_tokens=900000",
            "need 53.7 GiB more per device",
            ["cluster.tp=2", "cluster.limits.kv_tokens=null", "model=qwen2_5_7b"],
        ),
        (
            "device=l4 model=llama_3_1_70b",
            "need 11.9 GiB more per device",
            ["cluster.tp=8 finetune.jobs.sky_t1.order=window_major", "model=llama_3_2_3b"],
        ),
        (
            "device=rtx_4090 finetune.jobs.sky_t1.memory=stash",
            "17.5 more: runtime 0.5 GiB, weights 15.0 GiB",
            [
                "cluster.tp=4",
                "finetune.jobs.sky_t1.memory=auto",
                "finetune.jobs.sky_t1.cutoff_len=1024",
                "model=llama_3_2_3b",
            ],
        ),
        (
            # The degree stays when another model is chosen: Llama 3.2 3B, which fits on one device, has 24 heads.
            "device=l4 model=llama_3_1_70b model.tp=16 finetune.jobs.sky_t1.memory=stash",
            "finetuning 26.0 GiB",
            [
                "finetune.jobs.sky_t1.memory=auto finetune.jobs.sky_t1.order=window_major",
                "finetune.jobs.sky_t1.cutoff_len=2048",
                "model=codellama_34b",
            ],
        ),
        ("device.memory_bytes=3e8", "need 15.6 GiB more per device", []),
    ],
)
def test_what_devices_cannot_do_is_refused_with_all_that_would_help(
    given: str, missing: str, ways: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of them does."""
    argv = [*given.split(), "workload.duration_s=20", "run.bounds=false"]
    assert main(["simulate", *argv]) == 2
    error = capfd.readouterr().err
    assert missing in error and error.count("\n") == 1
    told = error.rstrip().partition("; possible with ")[2]
    assert told.split(" or ") == ways if ways else "no smaller model would do" in error
    for way in ways:
        assert main(["simulate", *argv, *way.split()]) == 0, way


def test_bounds_of_models_are_read_where_these_run(capfd: pytest.CaptureFixture[str]) -> None:
    """Those of a sweep over models may be given for all of them."""
    own = ["workload=poisson", "workload.duration_s=5", "run.bounds=false"]
    given = ["model.name=mine", "+slo.tpot_s.mine=0.06"]
    assert main(["simulate", *own, *given, "hydra.run.dir=one"]) == 0
    assert read_run("one").summary["classes"][0]["tpot_bound_s"] == 0.06
    sweep = ["simulate", "-m", *own, "model=llama_3_2_1b,llama_3_2_3b", "hydra.sweep.dir=two"]
    assert main([*sweep, "slo.tpot_s.llama_3_2_1b=0.06"]) == 0
    bounds = [read_run(f"two/{n}").summary["classes"][0]["tpot_bound_s"] for n in (0, 1)]
    assert bounds == [0.06, 0.045]
    assert main([*sweep, "+slo.tpot_s.llama_3_2_1=0.06"]) == 1
    assert "slo.tpot_s.llama_3_2_1 is read by no SLO class" in capfd.readouterr().err
