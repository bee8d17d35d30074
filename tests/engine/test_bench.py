"""`coserve bench` serves and finetunes for real and leaves a simulator's run folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.before
from engine import load, room
from engine.assemble import TrainingJob
from engine.bench import CONFIGS, _peak_notes, main
from engine.bench_jobs import jobs_of
from engine.bench_loaded import Loaded
from engine.config import read_config
from engine.lora import new_adapter, read_adapter
from engine.machine import random_config
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.parallel import ALONE
from engine.text import BUNDLED, byte_tokens, packed_samples, read_text
from sim.assemble import CONFIGS as SIMULATOR
from sim.checked import build
from sim.core.rows import ITERATION_COLUMNS, REQUEST_COLUMNS, STEP_COLUMNS
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.cost.memory import RUNTIME_BYTES, kv_room_tokens, weight_bytes
from sim.errors import OutOfReach
from sim.results import Run, read_run
from sim.settings import LimitSettings
from tests.engine.composed import bench_config
from tests.engine.saved import save_model
from tests.engine.virtual import bench_on_a_virtual_clock

SHORT = [
    "workload.duration_s=3",
    "run.drain_s=120",
    "measure_s=3",
    "peak_s=2",
    "job.sample_tokens=64",
]
UNBOUND = [*SHORT, "slo.classes.default.ttft_s=600", "slo.classes.default.tpot_s=60"]
"""Whatever the predictor that is measured here says."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    bench_on_a_virtual_clock(monkeypatch)
    return tmp_path / "out"


def test_a_bench_serves_every_request_and_trains_an_adapter_that_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*UNBOUND, f"hydra.run.dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "coserving" in out and "met %" in out
    assert out.rstrip().endswith("figure: out/compare.png") and (folder / "compare.png").is_file()
    run = read_run(folder)
    assert run.summary["source"] == "engine" and run.summary["device"] == "cpu"
    requests, iterations, steps = (run.table(name) for name in ("requests", "iterations", "steps"))
    assert list(requests.columns) == [*REQUEST_COLUMNS, "source"]
    assert list(iterations.columns) == [*ITERATION_COLUMNS, "source"]
    assert list(steps.columns) == [*STEP_COLUMNS, "source"]
    assert set(iterations["source"]) == {"engine"}
    assert run.summary["finished"] == run.summary["requests"] == len(requests) > 3
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert (iterations["end_s"] > iterations["start_s"]).all()
    assert np.isfinite(iterations["predicted_s"]).any()
    assert len(steps) > 0 and steps["tokens"].sum() > 0
    together = (iterations["forward_tokens"] > 0) & (iterations["decode_count"] > 0)
    assert together.any(), "windows and decodes shared iterations"
    shape = _model_shape()
    adapter = read_adapter(folder / "adapter", shape)
    assert any(bool(b.abs().max() > 0) for b in adapter.b.values()), "it was trained"
    losses = out.split("loss:")[1].split()
    assert float(losses[2]) < float(losses[0])


def _model_shape() -> ModelShape:
    return build(ModelShape, bench_config().model, "model")


def test_a_warm_up_is_in_no_number_and_the_job_goes_on_from_it(folder: Path) -> None:
    """Rows of the measured run begin at 0 with an empty pipeline; only optimizer steps go on counting."""
    assert main([*UNBOUND, f"hydra.run.dir={folder}/cold"]) == 0
    assert main([*UNBOUND, "run.warm_up_s=1.5", f"hydra.run.dir={folder}/warm"]) == 0
    cold, warm = (read_run(folder / name) for name in ("cold", "warm"))
    assert warm.summary["requests"] == cold.summary["requests"] == warm.summary["finished"]
    for run in (cold, warm):
        requests, iterations = run.table("requests"), run.table("iterations")
        assert requests["request"].is_unique and requests["arrival_s"].between(0, 3).all()
        assert iterations["iteration"].iloc[0] == cold.table("iterations")["iteration"].iloc[0]
        assert iterations["start_s"].iloc[0] < 0.2 and iterations["decode_count"].iloc[0] == 0
        assert run.summary["finetune_share_of_peak"] > 0
    assert cold.table("steps")["step"].iloc[0] == 1
    assert warm.table("steps")["step"].iloc[0] > 1
    first_s = warm.table("steps")["end_s"].iloc[0]
    assert 0 < first_s < 1


def test_a_sweep_that_goes_on_runs_only_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in another process, which has no predictor: it takes that of the runs before."""
    sweep = ["-m", "policy=inference_only,coserving", *SHORT, f"hydra.sweep.dir={folder}"]
    assert main(sweep) == 0
    assert "plan:   2 runs of 3 to 123 s after 5 s of measuring" in capsys.readouterr().err
    first, second = folder / "0" / "summary.json", folder / "1" / "summary.json"
    kept = first.stat().st_mtime_ns
    decided = [read_run(folder / name) for name in "01"]
    second.unlink()
    engine.before._LAST.forget()
    used = []
    with monkeypatch.context() as patch:
        patch.setattr(Loaded, "measured", lambda _: pytest.fail("measured again"))
        patch.setattr(Loaded, "first_uses", lambda loaded: used.append(loaded))
        assert main([*sweep, "run.resume=true"]) == 0
    assert len(used) == 1, "its kernels are compiled before the run, which measuring does otherwise"
    assert first.stat().st_mtime_ns == kept and second.exists()
    again = read_run(folder / "1")
    assert predictor_of(again) == predictor_of(decided[0]) == predictor_of(decided[1])
    assert again.summary["peak_finetune_tok_s"] == decided[0].summary["peak_finetune_tok_s"]
    out = capsys.readouterr().out
    assert "inference_only" in out and "coserving" in out
    engine.before._LAST.forget()
    second.unlink()
    (folder / engine.before.FILE).write_text("{}")
    assert main([*sweep, "run.resume=true"]) == 1
    assert "before.json is damaged" in capsys.readouterr().err
    assert main([*sweep, "run.resume=true", "seed=1"]) == 1
    assert "holds a run of other settings" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at real size")
def test_a_sweep_takes_the_devices_and_models_of_the_simulator(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its check of names sees the same folders as the composition of a run."""
    sweep = ["-m", "device=h100,h200", "model=llama_3_1_8b", f"hydra.sweep.dir={folder}"]
    assert main(sweep) == 1
    error = capsys.readouterr().err
    assert "device h100 needs a CUDA device" in error and "named" not in error
    assert main([*sweep, "device=h20"]) == 2
    assert "no device named 'h20'" in capsys.readouterr().err


def predictor_of(run: Run) -> object:
    return json.loads((run.folder / "rerun.json").read_text())["predictor"]


def test_a_run_without_an_optimizer_step_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["job.accumulation=5000", "peak_s=0", "workload.duration_s=1", "run.drain_s=1"]
    assert main([*SHORT, *own, f"hydra.run.dir={folder}"]) == 0
    out, err = capsys.readouterr()
    told = "note: no optimizer step ended within 1 s (a step is 5000 samples of 64 tokens)"
    assert told in err.splitlines() and "loss:" not in out
    assert err.count("note: SLO bounds are those of a GPU; on a CPU the share") == 1


def test_a_peak_below_what_a_run_did_is_told_to_be_one() -> None:
    """As on a machine that did other work while the peak was measured."""
    above = _peak_notes({"finetune_tok_s": 1360.0}, 1000.0, 2.0)
    assert len(above) == 1
    assert above[0].startswith(
        "finetuning alone was measured at 1,000 tok/s for 2 s before the run, which did 1,360"
    )
    assert _peak_notes({"finetune_tok_s": 999.0}, 1000.0, 2.0) == []
    assert _peak_notes({"finetune_tok_s": 999.0}, None, 0.0) == []


def test_a_static_split_leaves_one_run_of_two_pipelines(folder: Path) -> None:
    assert main([*UNBOUND, "policy=separate_50", f"hydra.run.dir={folder}"]) == 0
    run = read_run(folder)
    iterations, requests = run.table("iterations"), run.table("requests")
    assert run.summary["pipelines"] == 2 and run.summary["policy"] == "separate_50"
    assert run.summary["finished"] == run.summary["requests"] == len(requests) > 3
    assert set(requests["pipeline"]) == {0} and set(run.table("steps")["pipeline"]) == {1}
    training = iterations[iterations["pipeline"] == 1]
    assert (training["decode_count"] == 0).all() and (training["prefill_tokens"] == 0).all()
    used_s = (training["end_s"] - training["start_s"]).sum()
    assert used_s / 3 < 0.6, "half of the device, and the slice at the end"
    ordered = iterations.sort_values("start_s")
    assert (ordered["start_s"].to_numpy()[1:] >= ordered["end_s"].to_numpy()[:-1]).all()


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_begins_with_its_command_and_fits_its_time(path: Path) -> None:
    """Its sweep is made of what exists, runs without a GPU as well, and takes no longer than it says."""
    lines = path.read_text().splitlines()
    place = "" if path.stem == "cpu_paper" else " device=h200"
    assert lines[1] == f"# coserve bench experiment={path.stem}{place}"
    sweep = bench_config(f"experiment={path.stem}", with_hydra=True)
    params = {key: str(value).split(",") for key, value in sweep.hydra.sweeper.params.items()}
    for key, values in params.items():
        for value in values:
            tiny = bench_config(f"experiment={path.stem}", f"{key}={value}", "model=tiny", "device=cpu")
            assert tiny.limits.kv_tokens == 8192 and tiny.run.drain_s == sweep.run.drain_s
    runs = math.prod(map(len, params.values()))
    told = re.search(r"(\d+) runs in (\d+) minute", " ".join(line.lstrip("# ") for line in lines))
    assert told is not None and int(told[1]) == runs
    each_s = sweep.run.warm_up_s + sweep.workload.duration_s + 0.75 * sweep.run.drain_s
    assert runs * each_s + sweep.measure_s + sweep.peak_s <= 60 * int(told[2])


@pytest.mark.parametrize("path", sorted((SIMULATOR / "device").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_device_has_its_sizes_and_each_kind_of_lora(path: Path) -> None:
    """Given a device, limits and the job's sizes follow; a large model needs no other setting."""
    for lora, targets in (("all_linear", 7), ("down_proj", 1)):
        config = bench_config("model=qwen2_5_32b", f"device={path.stem}", f"job/lora={lora}")
        assert config.limits.kv_tokens is None and config.job.sample_tokens == 4096
        assert config.job.lora.rank == 16 and len(config.job.lora.targets) == targets


@pytest.mark.parametrize("memory", ["stash", "auto"])
def test_the_room_beside_the_weights_is_the_simulators(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device's memory free but for weights and runtime, bench and simulator size the cache alike."""
    config = bench_config("model=llama_3_1_8b", "device=h200")
    device, shape = build(DeviceSpec, config.device, "device"), build(ModelShape, config.model, "model")
    given = build(LimitSettings, config.limits, "limits")
    config_of = random_config(shape)
    model = Model(config_of, load._empty(shape, torch.bfloat16, torch.device("meta"), ALONE))
    adapter = new_adapter(LoraSpec(rank=16), shape, torch.float32, "meta", 0)
    job = TrainingJob(
        id="job", samples=(), max_sample_tokens=4096, adapter=adapter, optimizer=OptimizerSettings(schedule="constant"),
        memory=memory, order="layer_major",
    )  # fmt: skip
    free = int(device.memory_bytes - weight_bytes(shape, 1) - RUNTIME_BYTES)
    monkeypatch.setattr(room, "free_bytes", lambda _: free)
    limits, plans = room.limits_and_plans(model, device, given, [job], 0.9)
    plan = plans[job.id]
    expected = kv_room_tokens(
        device=device,
        model=shape,
        tp=1,
        batch_tokens=512 + 4096,
        finetune_bytes=plan.total_bytes() + plan.adapter_bytes,
    )
    assert 0 <= expected - limits.kv_tokens <= room.ROOM_STEP_TOKENS
    assert limits.kv_tokens % room.ROOM_STEP_TOKENS == 0
    monkeypatch.setattr(room, "free_bytes", lambda _: free - 2**33)
    less, _ = room.limits_and_plans(model, device, given, [job], 0.9)
    assert less.kv_tokens < limits.kv_tokens - 50_000
    if memory == "stash":
        monkeypatch.setattr(room, "free_bytes", lambda _: 2**28)
        for jobs, words in (([job], "shorter samples need less"), ([], "activations [^;]*$")):
            with pytest.raises(OutOfReach, match=f"leaves no room for a KV cache .*{words}"):
                room.limits_and_plans(model, device, given, jobs, 0.9)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("job.order=sideways", " job.order must be one of"),
        ("job.optimizer.kind=adam", " job.optimizer.kind must be one of adamw, sgd, got 'adam'"),
        (
            "job.optimizer.learning_rate=inf",
            " job.optimizer.learning_rate must be above 0 and at most 1e+37, got inf",
        ),
        ("+job.optimizer.eps=0", " job.optimizer.eps must be at least 1.2e-38 and at most 1e+37, got 0"),
        (
            "+job.optimizer.eps=1e-50",
            " job.optimizer.eps must be at least 1.2e-38 and at most 1e+37, got 1e-50",
        ),
        (
            "slo=flexllm +slo.tpot_s.tiny=0.1 +slo.tpot_s.tniy=0.1",
            " slo.tpot_s.tniy is read by no SLO class; their",
        ),
        ("+job.optimizer.weight_decay=inf", " job.optimizer.weight_decay must be at least 0 and at most"),
        ("+job.optimizer.betas=[2,3]", " job.optimizer.betas must be in [0, 1), got (2.0, 3.0)"),
        ("+job.optimizer.momentum=0.9", " job.optimizer.momentum changes nothing with kind=adamw"),
        (
            "job.optimizer.kind=sgd +job.optimizer.eps=1e-6",
            " job.optimizer.eps changes nothing with kind=sgd",
        ),
        (
            "+job.optimizer.total_steps=9",
            " job.optimizer.total_steps changes nothing with schedule=constant_with_warmup",
        ),
        (
            "job.optimizer.schedule=constant",
            " job.optimizer.warmup_steps changes nothing with the schedule constant, but",
        ),
        ("job.data=nowhere.txt", "nowhere.txt does not exist"),
        ("policy.inference_share=0.123 policy=separate", "must be a share of at most 100 equal parts"),
        ("device=h100", "needs a CUDA device"),
        ("launch.graphs=on", "launch.graphs=on: graphs need a CUDA device, the model is on cpu"),
        ("launch.streams=3", "launch.streams must be 1 or 2, got 3"),
        ("limits.kv_tokens=few", "limits.kv_tokens must be a whole number or null, got 'few'"),
        ("limits.lookahead=2", " limits.lookahead must be 0 or 1, got 2"),
        ("limits.kv_tokens=null memory_utilization=7", "memory_utilization must be in (0, 1], got 7"),
        ("memory_utilization=0.5", " memory_utilization changes nothing here: limits.kv_tokens is 8192, and"),
        (
            "workload.adapters.zipf=2",
            " workload.adapters.zipf changes nothing here: workload.adapters.count is 0",
        ),
        (
            "predictor=own.parquet",
            " measure_s changes nothing here: predictor is own.parquet, and only null asks",
        ),
        ("measure_s=-1", "measure_s must be at least 0 and at most 86,400 seconds, got -1"),
        ("peak_s=inf", "peak_s must be at least 0 and at most 86,400 seconds, got inf"),
        ("run.warm_up_s=inf", "run.warm_up_s must be at least 0 seconds and end, got inf"),
        ("job.accumulation=0", "job.accumulation must be at least 1, got 0"),
        ("job.memory=recompute", "job.memory=recompute needs job.order=window_major, got layer_major"),
        ("job.lora.rank=0", " job.lora.rank must be at least 1, got 0"),
        ("job.lora.targets=[]", "job.lora.targets must name at least one linear layer"),
        ("+slo.more=1", " slo has no key 'more'; known: name, classes, tpot_s"),
        ("+scale.more=1", "no key or group named 'scale.more'"),
        ("more_jobs=3", "more_jobs must be a group of names, each with keys of job, got 3"),
        ("+more_jobs.second.weight=0", "more_jobs.second.weight must be above 0 and finite, got 0"),
        ("+more_jobs.second.lora.targets=[down]", " more_jobs.second.lora.targets must be among"),
        ("+more_jobs.second.optimizer.kind=adam", " more_jobs.second.optimizer.kind must be one of"),
        ("+more_jobs.second.rank=4", "more_jobs.second has no key 'rank'"),
        ("+more_jobs.job.weight=2", "more_jobs.job: a name must not be job"),
        ("+more_jobs.second=3", "more_jobs.second must be a group of keys of job, got 3"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    folder: Path, argument: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *argument.split(), f"hydra.run.dir={folder}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not folder.exists()


def test_weights_alone_say_which_model_it_is(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model_folder.name
    own = [*SHORT, f"weights={model_folder}", "slo=flexllm", f"+slo.tpot_s.{name}=0.5"]
    assert main([*own, f"hydra.run.dir={folder}"]) == 0
    assert main([*own, f"hydra.run.dir={folder}", "run.resume=true"]) == 0, "it is the same run"
    run = read_run(folder)
    assert run.summary["model"] == name
    shape = replace(read_config(model_folder).shape, dtype_bytes=4)
    assert run.config["model"] == asdict(shape) and shape.hidden == 32
    assert main([*own, "model.layers=3", f"hydra.run.dir={folder}/x"]) == 2
    assert capsys.readouterr().err.endswith("holds a model of another shape: layers 2 (model.layers=3)\n")


def test_weights_of_another_shape_are_told_by_what_differs(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = replace(_model_shape(), layers=1, ffn=48)
    save_model(load.random_model(random_config(shape), torch.float32, "cpu"), tmp_path / "m")
    assert main([*SHORT, "model=tiny", f"weights={tmp_path}/m", f"hydra.run.dir={folder}"]) == 2
    error = capsys.readouterr().err
    own = _model_shape()
    differ = f"layers 1 (model.layers={own.layers}), ffn 48 (model.ffn={own.ffn})"
    assert error.endswith(f"holds a model of another shape: {differ}\n") and error.count("\n") == 1


def test_jobs_beside_the_first_differ_in_what_is_said_of_them() -> None:
    config = bench_config("+more_jobs.second.weight=3", "+more_jobs.second.lora.rank=4", "job.accumulation=1")
    first, second = jobs_of(config).values()
    assert (first.weight, first.lora.rank, first.accumulation) == (1.0, 16, 1)
    assert second == replace(first, weight=3.0, lora=replace(first.lora, rank=4))


def test_two_jobs_leave_an_adapter_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = ["+more_jobs.second.weight=3", "+more_jobs.second.lora.rank=4", "job.accumulation=1"]
    assert main([*SHORT, *second, "policy=temporal", "policy.interval=4", f"hydra.run.dir={folder}"]) == 0
    counts = read_run(folder).table("steps")["job"].value_counts()
    assert counts["job"] > 0 and counts["second"] > 0
    shape = _model_shape()
    ranks = {name: read_adapter(folder / name, shape).rank for name in ("adapter", "adapter_second")}
    assert ranks == {"adapter": 16, "adapter_second": 4}
    out = capsys.readouterr().out
    assert ", job)" in out and ", second)" in out


def test_the_bundled_text_becomes_samples_of_bytes(tmp_path: Path) -> None:
    tokens = byte_tokens(read_text(BUNDLED))
    samples = packed_samples(tokens, 256)
    assert len(samples) > 8 and all(len(s.tokens) == 256 for s in samples)
    assert np.array_equal(np.concatenate([s.tokens for s in samples]), tokens[: 256 * len(samples)])
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"text": "fine"}, {"words": "not"}]))
    with pytest.raises(ValueError, match="row 2 must be a record with a text"):
        read_text(path)
