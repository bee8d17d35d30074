"""The page of measured numbers says nothing that no file says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.results_page import BENCH, FIDELITY, NOT_MEASURED, REFERENCE, SESSION, main, page
from analysis.targets import DEVICE, ERRORS, MODEL, TARGETS, Evidence, reference_target

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "profiles" / "results"
SESSION_OF = {
    "date": "2026-01-02",
    "device": "h200",
    "model": "llama_3_1_8b",
    "gpu": "NVIDIA H200",
    "commit": "abc",
    "versions": {"python": "3.12"},
    "steps": [{"name": "reference", "command": "coserve reference", "status": "done", "seconds": 12.0}],
}
EMPTY = {
    "sequences": None,
    "context_tokens": None,
    "tokens": None,
    "p20_s": None,
    "p50_s": None,
    "p80_s": None,
    "tok_s": None,
    "rate": None,
    "peak_bytes": None,
    "ratio": None,
    "against": "",
    "note": "",
}


def row(what: str, variant: str, **known: Any) -> dict[str, Any]:
    return {"what": what, "variant": variant, **EMPTY, **known}


def decode(sequences: int, ratio: float) -> dict[str, Any]:
    known = {"sequences": sequences, "context_tokens": 1024, "p50_s": 0.004, "p20_s": 0.004, "p80_s": 0.005}
    return row("decode", f"{sequences} x 1024", ratio=ratio, **known)


def run(policy: str, rate: float, seed: int, attainment: float, tok_s: float, **known: Any) -> dict[str, Any]:
    return {
        "workload": "builtin",
        "model": "llama_3_1_8b",
        "device": "h200",
        "policy": policy,
        "rate_rps": rate,
        "seed": seed,
        "attainment": attainment,
        "finetune_tok_s": tok_s,
        "finetune_share_of_peak": tok_s / 10_000,
        "ttft_p99_s": 0.5,
        "tpot_p99_s": 0.04,
        **known,
    }


def predicted(metric: str, measured: float | None, said: float) -> dict[str, Any]:
    return {"run": "one", "metric": metric, "measured": measured, "predicted": said}


def measured(evidence: Evidence) -> dict[str, tuple[str, bool | None]]:
    found = {target.what: target.measured(evidence) for target in TARGETS}
    return {what: tuple(value) for what, value in found.items() if value is not None}


def test_the_page_that_is_checked_in_is_the_one_that_its_files_give() -> None:
    assert (ROOT / "profiles" / "RESULTS.md").read_text() == page(RESULTS if RESULTS.exists() else None)


def test_without_a_file_no_target_has_a_figure() -> None:
    """Whatever stands in the column of measured values comes from a file."""
    text = page(None)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(lines) == len(TARGETS)
    for line in lines:
        _, _, value, reached, _ = (cell.strip() for cell in line.removeprefix("|").split("|"))
        assert (value, reached) == (NOT_MEASURED, "")
    outside = text.replace("\n".join(lines), "")
    assert not re.findall(r"\d", outside.replace("H200, Llama-3.1-8B in bfloat16", ""))


@pytest.mark.parametrize("name", [REFERENCE, BENCH, FIDELITY])
def test_a_figure_goes_with_its_file(tmp_path: Path, name: str) -> None:
    (tmp_path / SESSION).write_text(json.dumps(SESSION_OF))
    pq.write_table(pa.Table.from_pylist([decode(32, 1.234)]), tmp_path / REFERENCE)
    (tmp_path / BENCH).write_text(json.dumps({"rows": [run("coserving", 5.0, 0, 0.987, 8765.0)]}))
    compared = [predicted("tpot_p50_s", 1000.0, 978.3), predicted("ttft_p50_s", None, 1.0)]
    pq.write_table(pa.Table.from_pylist(compared), tmp_path / FIDELITY)
    figures = {REFERENCE: "1.23x", BENCH: "98.7 %", FIDELITY: "2.2 %"}
    whole = page(tmp_path)
    assert all(figure in whole for figure in figures.values())
    (tmp_path / name).unlink()
    rest = page(tmp_path)
    assert figures[name] not in rest
    assert all(figure in rest for other, figure in figures.items() if other != name)


def test_another_device_fills_no_target(tmp_path: Path) -> None:
    (tmp_path / SESSION).write_text(json.dumps({**SESSION_OF, "device": "cpu", "gpu": None}))
    pq.write_table(pa.Table.from_pylist([decode(32, 1.234)]), tmp_path / REFERENCE)
    other = run("coserving", 5.0, 0, 0.987, 8765.0, device="cpu")
    (tmp_path / BENCH).write_text(json.dumps({"rows": [other]}))
    text = page(tmp_path)
    targets = text.split("## Targets")[1].split("\n## ")[0]
    assert targets.count(NOT_MEASURED) == len(TARGETS)
    assert "1.234" in text and "98.7" in text, "but it is shown"
    assert "llama_3_1_8b on cpu, which is below, fills no target." in targets
    assert "fills no target" not in page(None)


def test_a_target_is_reached_at_its_bound_and_not_beyond() -> None:
    at = measured(Evidence(reference=[decode(32, 1.3), decode(128, 1.301)]))
    assert at["decode iteration, 32 sequences at 1k context"][1] is True
    assert at["decode iteration, 128 sequences at 1k context"][1] is False
    for beside, reached in ((-1e-9, True), (1e-6, False)):
        rows = [
            predicted(
                m, 0.9, (0.9 if m == "attainment" else 0.9 * (1 - e)) - (m == "attainment") * e - beside
            )
            for m, e in ERRORS.items()
        ]
        errors = measured(Evidence(fidelity=rows))
        assert len(errors) == len(ERRORS) and all(found is reached for _, found in errors.values())


def test_finetuning_is_held_against_the_best_peft_that_fits() -> None:
    what = "finetuning alone, 4k samples, down_proj, stash"
    rows = [
        row("finetune", "down_proj: engine + stash", tok_s=140.0),
        row("finetune", "down_proj: peft + checkpointing", tok_s=100.0),
        row("finetune", "down_proj: peft", note="out of memory"),
    ]
    assert measured(Evidence(reference=rows))[what][1] is True
    rows.append(row("finetune", "down_proj: peft + liger + half adapters", tok_s=150.0))
    text, reached = measured(Evidence(reference=rows))[what]
    assert "0.93x the best" in text and reached is False
    assert what not in measured(Evidence(reference=rows[:1]))


def test_a_default_that_does_not_fit_leaves_words_and_no_verdict() -> None:
    what = "memory of an 8k sample in flight, all-linear, stash"
    rows = [
        row("memory", "all-linear: engine + stash", peak_bytes=2**34),
        row("memory", "all-linear: peft", note="out of memory"),
    ]
    text, reached = measured(Evidence(reference=rows))[what]
    assert text == "16.0 GiB; PEFT's default: out of memory" and reached is None
    rows[1]["peak_bytes"] = 2**37
    assert measured(Evidence(reference=rows))[what] == ("16.0 GiB of 128.0 GiB: 88 % below", True)


def test_being_ahead_means_keeping_the_slo_at_every_rate() -> None:
    what = "co-serving against the best static split that keeps the SLO, same engine"
    rows = [
        run("coserving", 5.0, 0, 0.99, 9000.0),
        run("coserving", 5.0, 1, 0.99, 8000.0),
        run("separate_50", 5.0, 0, 0.99, 5000.0),
        run("separate_25", 5.0, 0, 0.50, 9900.0),
        run("coserving", 20.0, 0, 0.97, 7300.0),
        run("separate_50", 20.0, 0, 0.30, 5000.0),
    ]
    found = measured(Evidence(bench=rows))
    assert found[what] == ("5 req/s: 1.70x; 20 req/s: none of them keeps the SLO", True)
    assert found["co-serving at 20 req/s on this one GPU"][1] is True
    assert found["co-serving, paper's workload at 5 req/s, TPOT SLO 50 ms"][1] is True
    rows[4]["attainment"] = 0.9
    found = measured(Evidence(bench=rows))
    assert found[what][1] is False and found["co-serving at 20 req/s on this one GPU"][1] is False


def test_every_ratio_of_the_reference_knows_its_target() -> None:
    def target(row: dict[str, Any], device: str = DEVICE, model: str = MODEL) -> str | None:
        return reference_target(row, device, model)

    assert target(decode(32, 1.0)) == "at most 1.3"
    assert target(decode(8, 1.0)) is None
    assert target(row("prefill", "512", tokens=512, ratio=0.5)) is None
    assert target(row("prefill", "2048", tokens=2048, ratio=0.5)) == "at least 0.55"
    assert target(row("memory", "x", ratio=None)) is None
    assert target(decode(32, 1.0), device="cpu") is None and target(decode(32, 1.0), model="tiny") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (SESSION, json.dumps({**SESSION_OF, "steps": [1]})),
        (BENCH, "{}"),
        (BENCH, json.dumps({"rows": [{}]})),
        (BENCH, "[" * 10_000),
    ],
)
def test_files_that_no_session_writes_are_told_in_one_line(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SESSION).write_text(json.dumps(SESSION_OF))
    (tmp_path / name).write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1


def test_a_folder_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    error = capsys.readouterr().err
    assert "folder nowhere does not exist" in error and error.count("\n") == 1
