"""Runs and profiles as other versions of the recorder, the profiler and the engine leave them."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from profiles.validate import cost_of, main
from sim.core.work import Chunk, Work
from sim.vllm.profile import read_profile
from sim.vllm.replay import replay
from sim.vllm.run import read_run

_spec = importlib.util.spec_from_file_location("vllm_folders", Path(__file__).with_name("vllm_folders.py"))
assert _spec is not None and _spec.loader is not None
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)

REQUEST = ([0.0], [0.0], [1.0], [2.0], [300], [10])


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    folder: Path = folders.write_profile(tmp_path / "profile")
    return folder


def last_token_s(run_folder: Path, profile_folder: Path) -> float:
    run = read_run(run_folder)
    played = replay(run.engine, run.requests, cost_of(run, read_profile(profile_folder, run.engine.tp)))
    return float(played.last_token_s[-1])


def printed(capsys: pytest.CaptureFixture[str], run: Path, profile: Path) -> str:
    assert main([str(run), str(profile), "--figure", str(run / "v.png")]) == 0
    return capsys.readouterr().out


def test_an_alpha_table_that_is_not_there_or_has_other_axes_is_said(
    tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folders.write_run(tmp_path / "run", folders.meta(), *REQUEST)
    without = last_token_s(run, profile)
    meta = profile / "meta.yaml"
    meta.write_text(meta.read_text().replace("enabled: false", "enabled: true"))
    assert "skew_fit.csv is not there: unequal decodes" in printed(capsys, run, profile)
    columns = ("layer", "n_label", "pc_label", "lev_label", "alpha", "n_samples")
    folders.write_csv(profile / "skew_fit.csv", columns, [("attention", "n=2", "pc0", "lev0", 0.1, 20)])
    assert "skew_fit.csv has no column pc: unequal decodes" in printed(capsys, run, profile)
    assert last_token_s(run, profile) == without


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("meta.yaml", b"model: \xff\n", "meta.yaml is not UTF-8 text: byte 7 is 0xff"),
        ("dense.csv", b"layer,tokens,time_us\nx,\xff,2\n", "dense.csv is not UTF-8 text: byte 23 is 0xff"),
        (
            "dense.csv",
            b'layer,tokens,time_us\nx,1,"' + b"2" * 131_073,
            "dense.csv line 2: not CSV: field larger than field limit",
        ),
        (
            "dense.csv",
            b'layer,tokens,time_us\nx,1,"2\nx,2,3\nx,4,5\n',
            "dense.csv line 4: not CSV: unexpected end of data",
        ),
        (
            "meta.yaml",
            b"model: a\nskew_fit: true\n",
            "meta.yaml: skew_fit must hold keys and values, got True",
        ),
    ],
)
def test_a_damaged_profile_is_named(profile: Path, name: str, content: bytes, says: str) -> None:
    (profile / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_profile(profile)


def test_a_log_that_is_no_csv_is_named_with_its_line(tmp_path: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.meta(), *REQUEST)
    path = run / "timeseries.csv"
    path.write_text(path.read_text() + '"' + "2" * 131_073)
    with pytest.raises(ValueError, match=r"timeseries.csv line 3: not CSV: field larger than field limit"):
        read_run(run)


def test_a_folder_of_one_degree_is_its_profiles(tmp_path: Path) -> None:
    profile = folders.write_profile(tmp_path / "profile", degrees=(1, 2))
    assert read_profile(profile / "tp2", 2).tp == 2
    meta = profile / "meta.yaml"
    lines = [
        line for line in meta.read_text().splitlines() if not line.startswith(("tp_degrees", "hardware"))
    ]
    meta.write_text("\n".join(lines))
    assert read_profile(profile, 2).card == "a card without a name"
    with pytest.raises(ValueError, match="no times for tensor parallel degree 4; it has 1, 2"):
        read_profile(profile, 4)
    with pytest.raises(ValueError, match=rf"there is no file .*; there is {meta}"):
        read_profile(tmp_path)


def test_models_before_llama_3_miss_their_rotary_embedding_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile", model="meta-llama/Llama-2-7b-hf")
    settings = folders.meta() | {"model": "meta-llama/Llama-2-7b-chat-hf"}
    run = folders.write_run(tmp_path / "run", settings, *REQUEST)
    dense = profile / "dense.csv"
    dense.write_text("\n".join(row for row in dense.read_text().splitlines() if "rotary" not in row))
    assert "dense.csv has no rotary_emb, which takes no time then" in printed(capsys, run, profile)


@pytest.mark.parametrize(
    "model", ["meta-llama/Llama-2-70b-hf", "codellama/CodeLlama-34b-Instruct-hf", "Qwen/Qwen3-32B"]
)
def test_models_are_known_by_their_own_names(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = folders.write_profile(tmp_path / "profile", model=model)
    run = folders.write_run(tmp_path / "run", folders.meta() | {"model": model}, *REQUEST)
    assert f"{model} on made-up" in printed(capsys, run, profile)


def keyed(path: Path) -> None:
    """Attention by the keys that a query sees: a chunk of one prompt, and one of two prompts of half of it."""
    old = list(csv.DictReader(path.read_text().splitlines()))
    rows: list[tuple[Any, ...]] = []
    for row in old:
        chunk, before = int(row["prefill_chunk"]), int(row["kv_prefill"])
        key = before + chunk / 2 if chunk else 0.0
        rows.append(("attention", chunk, key, row["n_decode"], row["kv_decode"], 1, row["time_us"]))
        if chunk and not before:
            # As many tokens with half of the pairs take less.
            rows.append(("attention", chunk, chunk / 4, row["n_decode"], row["kv_decode"], 1, 7.0))
    rows.append(("attention", 0, 0.0, 64, 2048, 4, 9e9))
    rows.append(("indexer", 0, 0.0, 64, 2048, 1, 9e9))
    columns = ("layer", "prefill_chunk", "prefill_key", "n_decode", "kv_decode", "decode_q_len", "time_us")
    folders.write_csv(path, columns, rows)


def test_attention_by_keys_is_the_same_for_one_prompt_and_measured_for_several(
    tmp_path: Path, profile: Path
) -> None:
    settings = folders.meta()
    settings["resolved_config"]["scheduler_config"]["max_num_batched_tokens"] = 512
    run = read_run(folders.write_run(tmp_path / "run", settings, *REQUEST))
    by_context = cost_of(run, read_profile(profile))
    keyed(profile / "attention.csv")
    by_key = cost_of(run, read_profile(profile))
    works = (
        Work(prefill=(Chunk(16, 0),)),
        Work(prefill=(Chunk(16, 2048),)),
        Work(decode_count=64, decode_context_tokens=64 * 2048),
        Work(prefill=(Chunk(16, 16),), decode_count=1, decode_context_tokens=16),
    )
    for work in works:
        parts = by_context.parts(work), by_key.parts(work)
        assert parts[1]["attention"] == pytest.approx(parts[0]["attention"])
    two = Work(prefill=(Chunk(256, 0), Chunk(256, 0)))
    assert by_key.parts(two)["attention"] == pytest.approx(32 * 7e-6)


def test_iterations_beyond_the_profile_are_said(
    tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = folders.meta()
    settings["resolved_config"]["scheduler_config"]["max_num_batched_tokens"] = 8192
    run = folders.write_run(tmp_path / "run", settings, *REQUEST)
    assert "iterations of up to 8,192 tokens: the profile ends at 512" in printed(capsys, run, profile)


def test_a_request_without_stamps_is_named(tmp_path: Path, profile: Path) -> None:
    run = folders.write_run(tmp_path / "run", folders.meta(), *REQUEST)
    file = run / "requests.jsonl"
    row = json.loads(file.read_text())
    nothing = dict.fromkeys(("arrival_time", "queued_ts", "first_token_ts", "last_token_ts"))
    file.write_text(f"{json.dumps(row)}\n{json.dumps(row | nothing)}\n")
    with pytest.raises(ValueError, match="line 2 has no stamps, so it was never answered; take it out"):
        read_run(run)


def test_a_run_without_ticks_has_no_timeline(
    tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folders.write_run(tmp_path / "run", folders.meta(), *REQUEST)
    folders.write_csv(run / "timeseries.csv", folders.TICKS, [])
    assert "no ticks in timeseries.csv" in printed(capsys, run, profile)


@pytest.mark.parametrize(
    ("version", "length", "largest", "last"),
    [
        ("0.9.2", 67, "max_capture_size", (496, 504, 512)),
        ("0.13.0", 51, "max_cudagraph_capture_size", (480, 496, 512)),
        ("0.9.2", None, "max_capture_size", (496, 504, 512)),
        ("0.13.0", None, "max_cudagraph_capture_size", (480, 496, 512)),
    ],
)
def test_sizes_of_graphs_are_the_versions_own(
    tmp_path: Path, version: str, length: int | None, largest: str, last: tuple[int, ...]
) -> None:
    settings = folders.meta() | {"vllm_version": version}
    settings["resolved_config"]["scheduler_config"]["max_num_batched_tokens"] = 2048
    recorded = {"cudagraph_capture_sizes": None if length is None else f"<list len={length}>", largest: 512}
    settings["resolved_config"]["compilation_config"] = recorded
    sizes = read_run(folders.write_run(tmp_path / "run", settings, *REQUEST)).engine.graph_sizes
    assert sizes[-3:] == last and sizes[:4] == (1, 2, 4, 8)
    assert length is None or len(sizes) == length
