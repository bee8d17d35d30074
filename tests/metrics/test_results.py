"""Run folders: what is written is read, the same rows are the same bytes, broken folders are named."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sim.core.request import Slo
from sim.core.rows import ITERATION_COLUMNS, Outcome, Recorder
from sim.metrics import summarize
from sim.results import TABLES, find_runs, make_manifest, read_run, write_run

CONFIG = {"policy": {"_target_": "coserving", "budget_s": 0.05}, "seed": 0, "rates": [1, 2]}


def recorder(iterations: int = 3) -> Recorder:
    rows = Recorder()
    for name in ("batch", "chat"):
        rows.slos.code(name)
    rows.adapters.code("lora-a")
    rows.jobs.code("job")
    nan = math.nan
    rows.requests.append((7, 0, 1, 1, Outcome.FINISHED, 0.0, 0.5, 1.0, 2.0, 5, 2, 2, 0))
    rows.requests.append((8, nan, 0, 0, Outcome.REJECTED, 0.5, nan, nan, nan, 5, 2, 0, 0))
    rows.segments.append((7, 0, 1, 1.0, 0, 1))
    rows.ticks.append((0, 2.0))
    for i in range(iterations):
        values = {**dict.fromkeys(ITERATION_COLUMNS, i), "pipeline": 0, "predicted_s": nan, "overlap": i % 2}
        rows.iterations.append([values[c] for c in ITERATION_COLUMNS])
    rows.steps.append((0, 0, 1, 8, 4000, 2.5, 0))
    return rows


def write(folder: Path, source: str = "sim", rows: Recorder | None = None) -> Path:
    rows = recorder() if rows is None else rows
    slos = {"chat": Slo(ttft_s=2.0), "batch": Slo()}
    summary = summarize(rows, slos=slos, duration_s=3.0, labels={"policy": "coserving", "rate_rps": None})
    manifest = make_manifest(seed=0, device="a100_80gb", wall_s=0.25, command=["coserve", "simulate"])
    return write_run(folder, rows, summary, config=CONFIG, manifest=manifest, source=source)


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "a" / "run"))
    assert run.config == CONFIG
    assert run.manifest["seed"] == 0
    assert run.manifest["command"] == ["coserve", "simulate"]
    assert run.manifest["wall_s"] == 0.25
    assert run.summary["source"] == "sim"
    assert run.summary["attainment"] == 0.5
    assert run.summary["rate_rps"] is None
    chat, batch = run.summary["classes"]
    assert (chat["attainment"], batch["attainment"]) == (1.0, 0.0)
    assert math.isnan(batch["ttft_p99_s"])
    requests = run.table("requests")
    assert requests["slo"].tolist() == ["chat", "batch"]
    assert requests["adapter"].tolist() == ["lora-a", ""]
    assert requests["outcome"].tolist() == ["finished", "rejected"]
    assert requests["pipeline"].isna().tolist() == [False, True]
    assert requests["first_token_s"].isna().tolist() == [False, True]
    assert run.table("steps").iloc[0].to_dict() == {
        "pipeline": 0, "job": "job", "step": 1, "samples": 8, "tokens": 4000, "end_s": 2.5,
        "failed": False, "source": "sim",
    }  # fmt: skip
    iterations = run.table("iterations")
    assert iterations["overlap"].tolist() == [False, True, False]
    assert iterations["kv_blocks_used"].dtype == "int64"
    assert iterations["decode_count"].tolist() == [0, 1, 2]
    assert iterations["predicted_s"].isna().all()


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_columns_and_the_source_even_without_rows(tmp_path: Path, name: str) -> None:
    summary = summarize(Recorder(), slos={}, duration_s=1.0)
    for source in ("sim", "engine"):
        folder = write_run(tmp_path / source, Recorder(), summary, config={}, manifest={}, source=source)
        table = read_run(folder).table(name)
        assert list(table) == [*getattr(Recorder(), name).columns, "source"]
        assert len(table) == 0
    full = read_run(write(tmp_path / "full")).table(name)
    assert set(full["source"]) == {"sim"}
    assert (full.dtypes.astype(str) == table.dtypes.astype(str)).drop("pipeline").all()


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for name in TABLES:
        assert (one / f"{name}.parquet").read_bytes() == (two / f"{name}.parquet").read_bytes()
    assert (one / "summary.json").read_bytes() == (two / "summary.json").read_bytes()
    other = write(tmp_path / "other", rows=recorder(iterations=4))
    assert (one / "iterations.parquet").read_bytes() != (other / "iterations.parquet").read_bytes()


def test_rows_beyond_one_group_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.results._ROWS_PER_GROUP", 7)
    table = read_run(write(tmp_path, rows=recorder(iterations=30))).table("iterations")
    assert table["iteration"].tolist() == list(range(30))


def test_missing_numbers_are_null_in_the_file(tmp_path: Path) -> None:
    stored = json.loads((write(tmp_path) / "summary.json").read_text())
    assert stored["energy_j"] is None
    assert stored["classes"][1]["ttft_p50_s"] is None
    assert stored["finetune_tok_s"] == pytest.approx(4000 / 3)


def test_writing_a_run_imports_neither_pandas_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from sim.core.rows import Recorder; from sim.metrics import summarize\n"
        "from sim.results import write_run; rows = Recorder()\n"
        f"write_run({str(tmp_path / 'r')!r}, rows, summarize(rows, slos={{}}, duration_s=1.0),"
        " config={}, manifest={}, source='sim')\n"
        "assert not {'pandas', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": _root()})


def test_a_run_without_summary_is_incomplete_and_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"has no summary\.json"):
        read_run(folder)
    with pytest.raises(ValueError, match=r"no summary\.json in or below"):
        find_runs([tmp_path])


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "config.yaml"])
@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = write(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_or_damaged_table_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "run")
    file = folder / f"{name}.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name}\.parquet is not readable"):
        read_run(folder).table(name)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name}\.parquet is missing"):
        read_run(folder).table(name)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("attainment", "all", "attainment must be a number or null, got 'all'"),
        ("requests", True, "requests must be a number or null, got True"),
        ("attainment", 10**400, "attainment must be a number or null, got 1000"),
        ("rate_rps", [8], "rate_rps must be a number, got [8]"),
        ("rate_rps", 0, "rate_rps must be a finite number above 0, got 0"),
        ("goodput_rps", math.inf, "goodput_rps must be a finite number, got inf"),
        ("admission", 10**400, "admission must be at most 1.8e+308, got more"),
        ("classes", {}, "classes must be a list, got {}"),
        ("classes", [1], "each of classes must be an object, got 1"),
    ],
)
def test_a_summary_of_other_kinds_is_named(tmp_path: Path, key: str, value: object, told: str) -> None:
    path = write(tmp_path / "run") / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {told}")):
        read_run(path.parent)


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "config.yaml"])
def test_a_file_that_is_nested_too_deep_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "run")
    (folder / name).write_text("[" * 10_000 + "]" * 10_000)
    with pytest.raises(ValueError, match=rf"{name} is not"):
        read_run(folder)


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("waiting", None, "has no column waiting"),
        ("running", "many", "column running must hold numbers"),
        ("end_s", math.inf, "column end_s must hold finite times"),
        ("start_s", math.nan, "column start_s must hold a number from 0"),
        ("prefill_tokens", 1e300, "column prefill_tokens must hold a number from 0"),
        ("decode_count", -1, "column decode_count must hold a number from 0"),
    ],
)
def test_a_table_of_other_columns_is_named(tmp_path: Path, column: str, values: object, told: str) -> None:
    run = read_run(write(tmp_path / "run"))
    frame = run.table("iterations")
    changed = frame.drop(columns=column) if values is None else frame.assign(**{column: values})
    changed.to_parquet(run.folder / "iterations.parquet")
    with pytest.raises(ValueError, match=told):
        run.table("iterations")


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write run folder .*file") as caught:
        write(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)
    blocked = tmp_path / "run"
    (blocked / "ticks.parquet").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot write run folder"):
        write(blocked)
    assert not (blocked / "summary.json").exists()


def test_a_run_is_never_replaced(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        write(tmp_path, source="engine", rows=recorder(9))
    assert len(read_run(tmp_path).table("iterations")) == 3


def test_runs_are_found_once_and_sorted(tmp_path: Path) -> None:
    folders = [write(tmp_path / "sweep" / name) for name in ("b", "a")]
    assert find_runs([tmp_path, folders[0]]) == [tmp_path / "sweep" / "a", tmp_path / "sweep" / "b"]
    with pytest.raises(ValueError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    rows = Recorder()
    with pytest.raises(ValueError, match="source must be one of sim, engine"):
        write_run(tmp_path, rows, {}, config={}, manifest={}, source="guess")
    with pytest.raises(ValueError, match="summary says source 'engine'"):
        write_run(tmp_path, rows, {"source": "engine"}, config={}, manifest={}, source="sim")
    with pytest.raises(ValueError, match="not plain data"):
        write_run(tmp_path, rows, {}, config={"x": object()}, manifest={}, source="sim")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_names_commit_and_versions() -> None:
    manifest = make_manifest(seed=None, device=None, wall_s=1.0)
    assert manifest["command"] == sys.argv
    assert manifest["seed"] is None
    versions = manifest["versions"]
    assert isinstance(versions, dict)
    assert versions["python"].split(".")[0] == "3"
    if (Path(_root()) / ".git").exists():
        assert len(str(manifest["commit"])) == 40
        assert isinstance(manifest["dirty"], bool)


def _root() -> str:
    import sim.results

    return str(Path(sim.results.__file__).resolve().parents[1])
