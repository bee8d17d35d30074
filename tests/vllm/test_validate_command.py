"""`coserve validate`: exact on a run that the simulator recorded, close on a real one, clear on bad ones."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiles.compare import figures, timeline
from profiles.validate import cost_of, main, recorded
from sim.cli import main as coserve
from sim.vllm.profile import read_profile
from sim.vllm.replay import replay
from sim.vllm.run import read_run

_spec = importlib.util.spec_from_file_location("vllm_folders", Path(__file__).with_name("vllm_folders.py"))
assert _spec is not None and _spec.loader is not None
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("COSERVE_DATA", ROOT.parent / "shared" / "data")) / "vllm-runs"
REAL_RUNS = sorted(path.parent for path in DATA.glob("*/*/meta.json"))

ALL_PERCENT, TPOT_MEAN_PERCENT = 3.0, 0.5
"""Bounds on a real run: on every figure, and on mean TPOT."""


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize(("blocks", "caching"), [(2000, True), (60, True), (60, False)])
def test_a_run_of_our_own_is_predicted_exactly(
    tmp_path: Path, blocks: int, caching: bool, async_scheduling: bool
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    settings = folders.meta(blocks=blocks, async_scheduling=async_scheduling, caching=caching)
    recorded = folders.record(tmp_path / "run", profile, settings)
    assert (recorded.preemptions > 0) == (blocks == 60)
    run = read_run(tmp_path / "run")
    played = replay(run.engine, run.requests, cost_of(run, read_profile(profile, run.engine.tp)))
    assert max(abs(figure.error) for figure in figures(run.requests, played)) < 1e-6
    line = timeline(run, played)
    for name, values in line.measured.items():
        np.testing.assert_allclose(line.predicted[name], values, atol=1e-6)


@pytest.mark.parametrize("replicas", [2, 3])
def test_engines_side_by_side_are_predicted_exactly_and_serve_faster(tmp_path: Path, replicas: int) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    alone = folders.record(tmp_path / "alone", profile, folders.meta())
    settings = folders.meta()
    settings["resolved_config"]["parallel_config"]["data_parallel_size"] = replicas
    settings["kv_cache"]["num_gpu_blocks"] *= replicas  # as the front end adds them up
    folders.record(tmp_path / "run", profile, settings)
    run = read_run(tmp_path / "run")
    assert run.engine.kv_blocks == folders.meta()["kv_cache"]["num_gpu_blocks"]
    played = replay(run.engine, run.requests, cost_of(run, read_profile(profile)))
    assert max(abs(figure.error) for figure in figures(run.requests, played)) < 1e-6
    line = timeline(run, played)
    for name, values in line.measured.items():
        np.testing.assert_allclose(line.predicted[name], values, atol=1e-6)
    assert played.preemptions < alone.preemptions
    assert (played.last_token_s - played.queued_s).mean() < (alone.last_token_s - alone.queued_s).mean()
    served = played.iterations["prefill_tokens"].sum()
    assert served >= run.requests.prompt_tokens.sum()


def test_devices_that_share_layers_pay_for_their_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The times are a degree's own; a slower link is a slower run; a run that does not say has one line."""
    profile = folders.write_profile(tmp_path / "profile", degrees=(1, 2))
    settings = folders.meta()
    settings["resolved_config"]["parallel_config"]["tensor_parallel_size"] = 2
    folder = folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    assert "needs the links: link_bw (GB/s)" in _error_line(capsys, folder, profile)
    ends = []
    for gbytes_s in (600, 300, 1):
        (folder / "config.json").write_text(json.dumps({"link_bw": gbytes_s, "link_latency": 1000}))
        run = read_run(folder)
        played = replay(run.engine, run.requests, cost_of(run, read_profile(profile, 2)))
        ends.append(played.last_token_s[0])
    assert ends[0] < ends[1] < ends[2]
    # 2 all-reduces in each of 32 layers, of 8 kB a token; half of it twice over the link; 309 tokens in all.
    tokens = 300 + sum(folders.padded(1) for _ in range(9))
    assert ends[1] - ends[0] == pytest.approx(tokens * 64 * 8192 * (1 / 300e9 - 1 / 600e9), rel=1e-3)


def test_one_prompt_takes_no_more_of_an_iteration_than_the_threshold(tmp_path: Path) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    settings = folders.meta()
    settings["resolved_config"]["scheduler_config"]["long_prefill_token_threshold"] = 50
    played = folders.record(tmp_path / "run", profile, settings)
    chunks, tokens = (played.iterations[f"prefill_{name}"] for name in ("chunks", "tokens"))
    assert (tokens <= 50 * chunks).all() and tokens.max() > 50


def test_what_an_older_engine_did_not_record_is_what_it_did(tmp_path: Path) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    settings = folders.meta(async_scheduling=False) | {"vllm_version": "0.13.0"}
    resolved = settings["resolved_config"]
    resolved["scheduler_config"]["scheduler_reserve_full_isl"] = False
    folders.write_run(tmp_path / "now", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    del resolved["scheduler_config"]["scheduler_reserve_full_isl"]
    for group, key in (
        ("scheduler_config", "async_scheduling"),
        ("scheduler_config", "long_prefill_token_threshold"),
        ("scheduler_config", "policy"),
        ("parallel_config", "data_parallel_size"),
        ("parallel_config", "pipeline_parallel_size"),
        ("model_config", "enforce_eager"),
    ):
        del resolved[group][key]
    for key in ("speculative_config", "lora_config"):
        del resolved[key]
    settings["engine_kwargs"] = {"max_num_seqs": resolved["scheduler_config"].pop("max_num_seqs")}
    resolved["compilation_config"]["cudagraph_mode"] = "CUDAGraphMode.FULL_AND_PIECEWISE"
    del settings["tick_seconds"]
    folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    engine = read_run(tmp_path / "run").engine
    assert engine == read_run(tmp_path / "now").engine
    (tmp_path / "run" / "timeseries.csv").unlink()
    assert main([str(tmp_path / "run"), str(profile), "--figure", str(tmp_path / "v.png")]) == 0
    assert not (tmp_path / "v.png").exists()


def test_a_run_of_which_only_the_arguments_are_known_is_what_its_version_does(tmp_path: Path) -> None:
    settings = folders.meta() | {"resolved_config": {}, "engine_kwargs": {"max_num_seqs": 8}}
    settings["engine_kwargs"]["max_num_batched_tokens"] = 300
    for version, ahead, reserve in (
        ("0.13.1", False, False),
        ("0.14.0", True, False),
        ("0.19.0", True, True),
    ):
        folder = folders.write_run(
            tmp_path / version, settings | {"vllm_version": version}, [0.0], [0.0], [1.0], [2.0], [300], [10]
        )
        engine = read_run(folder).engine
        assert (engine.async_scheduling, engine.reserve_full_prompt) == (ahead, reserve)
        assert engine.graphs_for_decodes and engine.graphs_for_mixed
        assert engine.graph_sizes == (1, 2, 4, 8, 16)
        assert engine.max_sequence_tokens == 120 * 16
    settings["engine_kwargs"]["enforce_eager"] = True
    folder = folders.write_run(tmp_path / "eager", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    assert not read_run(folder).engine.graphs_for_decodes


def test_a_list_of_graphs_too_long_to_be_recorded_is_the_one_that_vllm_makes(tmp_path: Path) -> None:
    settings = folders.meta()
    settings["resolved_config"]["scheduler_config"]["max_num_batched_tokens"] = 2048
    compilation = settings["resolved_config"]["compilation_config"]
    compilation |= {"cudagraph_capture_sizes": "<list len=83>", "max_cudagraph_capture_size": 1024}
    folder = folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    sizes = read_run(folder).engine.graph_sizes
    assert len(sizes) == 83
    assert sizes[:5] == (1, 2, 4, 8, 16) and sizes[33:37] == (248, 256, 272, 288) and sizes[-1] == 1024


def test_files_may_be_in_a_folder_beside_the_links(tmp_path: Path) -> None:
    folders.write_run(tmp_path / "vllm", folders.meta(), [0.0], [0.0], [1.0], [2.0], [300], [10])
    (tmp_path / "config.json").write_text(json.dumps({"link_bw": 16, "link_latency": 1000}))
    run = read_run(tmp_path)
    assert run.link is not None and run.link.bandwidth_bytes_s == 16e9
    assert len(run.requests.arrival_s) == 1


def workload(path: Path, prompts: list[list[int]]) -> str:
    """Write a workload in which one row is a session; its hash."""
    rows = [{"input_tok_ids": prompt, "output_toks": 1} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:1], {"sub_requests": []}, *rows[1:]]))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prompts_that_begin_alike_are_computed_once_and_recorded_counts_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    prompts = [[7] * 300, [9] * 40, [7] * 200 + [8] * 100]
    file = tmp_path / "prompts.jsonl"
    settings = folders.meta() | {"dataset_hash": workload(file, prompts)}
    settings["dataset_path"] = "elsewhere/prompts.jsonl"
    zero, one, lengths = [0.0] * 3, [1.0] * 3, [len(prompt) for prompt in prompts]
    folder = folders.write_run(tmp_path / "run", settings, zero, zero, one, [2.0] * 3, lengths, [10] * 3)
    ticks = (*folders.TICKS, "prompt_cached_throughput", "preempted")
    folders.write_csv(folder / "timeseries.csv", ticks, [(1.0, 1.0, 1.0, 1, 0, 192.0, 2)])
    arguments = [str(folder), str(profile), "--figure", str(tmp_path / "v.png")]

    assert main(arguments) == 0
    alone = capsys.readouterr().out
    assert "the prompts are not known (--prompts)" in alone
    assert "prompt tokens found in blocks: 192 measured, 0 predicted" in alone
    assert main([*arguments, "--prompts", str(file)]) == 0
    shared = capsys.readouterr().out
    assert "not known" not in shared
    assert "prompt tokens found in blocks: 192 measured, 192 predicted" in shared
    assert "preemptions: 2 measured, 0 predicted" in shared
    (folder / "prompts.jsonl").write_bytes(file.read_bytes())
    assert main(arguments) == 0
    assert capsys.readouterr().out == shared


@pytest.mark.parametrize(
    ("prompts", "hashed", "says"),
    [
        ([[1] * 300], False, "is not the workload of this run: its SHA-256 is"),
        ([[1] * 299], True, "request 1: input_toks is 300, its prompt in the workload has 299"),
        ([], True, "has 1 requests, their workload only 0"),
        ([["a"]], True, "line 1: input_tok_ids must be a list of whole numbers"),
    ],
)
def test_a_workload_of_another_run_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: list[list[int]], hashed: bool, says: str
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    own = workload(tmp_path / "prompts.jsonl", prompts)
    settings = folders.meta() | {"dataset_hash": own if hashed else "0" * 64}
    folder = folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    assert says in _error_line(capsys, folder, profile, "--prompts", str(tmp_path / "prompts.jsonl"))


def test_a_slower_card_is_noticed_and_the_bound_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    folders.record(tmp_path / "run", profile, folders.meta())
    dense = profile / "dense.csv"
    dense.write_text(dense.read_text().replace("gate_up_proj,8,24.0", "gate_up_proj,8,40.0"))
    figure = tmp_path / "out" / "validation.png"
    arguments = [str(tmp_path / "run"), str(profile), "--figure", str(figure)]
    assert main(arguments) == 0
    assert figure.stat().st_size > 10_000
    assert main([*arguments, "--max-error", "50"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--max-tpot-error", "0.01"]) == 1
    assert "above the bound: TPOT mean" in capsys.readouterr().out


def test_without_a_name_the_figure_gets_a_folder_of_its_own_below_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    folders.record(tmp_path / "run", profile, folders.meta())
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for _ in range(2):
        assert main([str(tmp_path / "run"), str(profile)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(r"figure: runs/[\d-]{10}/[\d-]{15}_validate/validation\.png", last)
        assert (work / last.removeprefix("figure: ")).is_file()
    assert [path.name for path in work.iterdir()] == ["runs"]
    assert len(list(work.rglob("*.png"))) == 2


def test_blocks_found_again_save_time(tmp_path: Path) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    kept = folders.record(tmp_path / "kept", profile, folders.meta(blocks=60))
    lost = folders.record(tmp_path / "lost", profile, folders.meta(blocks=60, caching=False))
    assert kept.preemptions > 0
    assert kept.iterations["prefill_tokens"].sum() < lost.iterations["prefill_tokens"].sum()
    assert kept.last_token_s.max() < lost.last_token_s.max()


def test_planning_ahead_hides_host_time(tmp_path: Path) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    hidden, paid = (
        folders.record(tmp_path / name, profile, folders.meta(blocks=2000, async_scheduling=ahead))
        for name, ahead in (("hidden", True), ("paid", False))
    )
    assert hidden.last_token_s.mean() < paid.last_token_s.mean()


@pytest.mark.skipif(not REAL_RUNS, reason="no recorded runs in the data folder")
@pytest.mark.parametrize("folder", REAL_RUNS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_real_run_is_predicted_within_the_bounds(folder: Path) -> None:
    run, _ = recorded(folder)
    profile = read_profile(DATA / f"kernel-profile-{folder.parent.name}")
    played = replay(run.engine, run.requests, cost_of(run, profile))
    errors = {figure.name: 100 * figure.error for figure in figures(run.requests, played)}
    assert abs(errors["TPOT mean"]) <= TPOT_MEAN_PERCENT
    assert max(abs(error) for error in errors.values()) <= ALL_PERCENT, errors


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(settings: dict[str, Any]) -> None:
        *path, last = key.split(".")
        node = settings
        for part in path:
            node = node[part]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


SCHEDULER, PARALLEL = "resolved_config.scheduler_config.", "resolved_config.parallel_config."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("kv_cache.num_gpu_blocks", None), "meta.json has no key 'kv_cache.num_gpu_blocks'"),
        (
            _set("kv_cache.block_size", 0),
            "kv_cache.block_size must be a whole number from 1 to 100000000, got 0",
        ),
        (_set(SCHEDULER + "policy", "priority"), "policy must be 'fcfs' to be simulated, got 'priority'"),
        (_set(SCHEDULER + "async_scheduling", "yes"), "async_scheduling must be true or false, got 'yes'"),
        (_set("resolved_config.speculative_config", {"k": 2}), "speculative_config must be None"),
        (_set(PARALLEL + "tensor_parallel_size", 2), "no times for tensor parallel degree 2; it has 1"),
        (
            _set(PARALLEL + "data_parallel_size", 0),
            "data_parallel_size must be a whole number from 1 to",
        ),
        (_set(PARALLEL + "pipeline_parallel_size", 2), "pipeline_parallel_size must be 1 to be simulated"),
        (_set("resolved_config.lora_config", {"max_loras": 2}), "lora_config must be None to be simulated"),
        (
            _set(SCHEDULER + "max_num_batched_tokens", 10**29),
            "max_num_batched_tokens must be a whole number from 1",
        ),
        (
            _set(SCHEDULER + "max_num_batched_tokens", 1),
            "the run's engine: max_tokens must be at least max_sequences",
        ),
        (_set(SCHEDULER + "max_num_seqs", None), "no key 'resolved_config.scheduler_config.max_num_seqs'"),
        (_set("resolved_config.compilation_config.cudagraph_mode", 7), "must be 0, 1 or 2, or a pair"),
        (_set("model", "meta-llama/Llama-3.1-70B"), "the profile is of meta-llama/Llama-3.1-8B"),
        (_set("kv_cache.num_gpu_blocks", 10), "request 0 cannot be served by this engine"),
    ],
)
def test_settings_that_cannot_be_simulated_get_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    says: str,
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    settings = folders.meta()
    change(settings)
    folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    assert says in _error_line(capsys, tmp_path / "run", profile)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("run/requests.jsonl", '"input_toks": 300', '"input_toks": -3', "line 1: input_toks must be a whole"),
        ("run/requests.jsonl", '"queued_ts"', '"queue"', "line 1 has no key 'queued_ts'"),
        ("run/requests.jsonl", "4097.0", "1.0", "must not decrease"),
        ("run/requests.jsonl", "{", "[", "line 1 is not JSON"),
        ("run/meta.json", "{", "", "meta.json is not JSON"),
        ("run/timeseries.csv", "waiting", "queued", "timeseries.csv has no column 'waiting'"),
        ("profile/dense.csv", "o_proj,8,24.0", "o_proj,8,-1", "time_us must be above 0, got '-1'"),
        ("profile/dense.csv", "o_proj,8,", "o_proj,1,", "o_proj at tokens 1 is there twice"),
        ("profile/dense.csv", "o_proj", "moe", "dense operator 'moe' is unknown"),
        ("profile/per_sequence.csv", "sampler", "softmax", "the profile has no operator 'sampler'"),
        ("profile/attention.csv", "n_decode", "decodes", "attention.csv has no column 'n_decode'"),
        ("profile/meta.yaml", "model:", "modell:", "meta.yaml has no key 'model'"),
    ],
)
def test_a_malformed_file_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, says: str
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    folders.write_run(tmp_path / "run", folders.meta(), [0.0], [0.0], [1.0], [2.0], [300], [10])
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert says in _error_line(capsys, tmp_path / "run", profile)


@pytest.mark.parametrize(
    "file",
    ["run/meta.json", "run/requests.jsonl", "profile/meta.yaml", "profile/dense.csv"],
)
def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    folders.write_run(tmp_path / "run", folders.meta(), [0.0], [0.0], [1.0], [2.0], [300], [10])
    (tmp_path / file).unlink()
    assert f"there is no file {tmp_path / file}" in _error_line(capsys, tmp_path / "run", profile)


def test_a_folder_of_run_folders_says_which_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile")
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/meta.json").write_text("{}")
    line = _error_line(capsys, tmp_path / "runs", profile)
    assert f"there is no file {tmp_path}/runs/meta.json; there is {tmp_path}/runs/one/meta.json" in line


def test_a_model_without_a_description_needs_its_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile", model="someone/Tiny-1B")
    settings = folders.meta() | {"model": "someone/Tiny-1B"}
    folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    assert "give them with --layers" in _error_line(capsys, tmp_path / "run", profile)
    figure = str(tmp_path / "v.png")
    assert main([str(tmp_path / "run"), str(profile), "--layers", "16", "--figure", figure]) == 0


def test_other_loops_settings_are_read_as_vllm_writes_them(tmp_path: Path) -> None:
    settings = json.loads(json.dumps(folders.meta()))
    settings["resolved_config"]["model_config"]["enforce_eager"] = True
    folders.write_run(tmp_path / "run", settings, [0.0], [0.0], [1.0], [2.0], [300], [10])
    engine = read_run(tmp_path / "run").engine
    assert not engine.graphs_for_decodes and not engine.graphs_for_mixed
    assert engine.max_tokens == 256 and engine.async_scheduling


def _error_line(capsys: pytest.CaptureFixture[str], run: Path, profile: Path, *more: str) -> str:
    assert coserve(["validate", str(run), str(profile), *more]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    return printed
