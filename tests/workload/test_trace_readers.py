"""Readers agree with the known facts of public traces, and name the file, row, column and value of what
is wrong."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.workload.files import data_dir, find_file
from sim.workload.readers.azure import AzureReader
from sim.workload.readers.burstgpt import BurstGptReader
from sim.workload.readers.lengths import FORMATS, read_lengths
from sim.workload.readers.mooncake import MooncakeReader
from sim.workload.readers.plain import CsvReader
from sim.workload.readers.sharegpt import read_sharegpt

DATA = Path(os.environ.get("COSERVE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def no_unasked_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_file(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write_file


def real(path: str) -> str:
    if not (DATA / path).is_file():
        pytest.skip(f"{path} is not here")
    return str(DATA / path)


@pytest.mark.parametrize(
    ("path", "rows", "rate_rps", "cv", "prompt", "output"),
    [
        ("azure/AzureLLMInferenceTrace_conv.csv", 19_366, 5.53, 1.09, 1155, 211),
        ("azure/AzureLLMInferenceTrace_code.csv", 8_819, 2.57, 13, 2048, 28),
    ],
)
def test_azure_traces_have_their_known_facts(
    path: str, rows: int, rate_rps: float, cv: float, prompt: int, output: int
) -> None:
    table = AzureReader().read(real(path))
    assert len(table) == rows
    assert round(table.rate_rps, 2) == rate_rps
    gaps = np.diff(table.arrival_s)
    assert round(gaps.std() / gaps.mean(), 2 if cv < 10 else 0) == cv
    assert round(table.prompt_tokens.mean()) == prompt
    assert round(table.output_tokens.mean()) == output
    assert table.arrival_s[0] == 0
    faster = table.at_rate(20.0)
    assert faster.rate_rps == pytest.approx(20, rel=1e-12)
    assert np.diff(faster.arrival_s).std() * 20 == pytest.approx(gaps.std() * table.rate_rps, rel=1e-9)


def test_azure_rows_agree_with_a_slow_reading() -> None:
    from datetime import datetime

    file = real("azure/AzureLLMInferenceTrace_conv.csv")
    table = AzureReader().read(file)
    rows = [line.split(",") for line in Path(file).read_text().split()[1:]]
    # "2023-11-16 18:15:46.6805900,374,44" splits at the blank.
    times, first = [], None
    for clock, prompt, output in (row for row in rows if len(row) == 3):
        stamp = datetime.strptime(clock[:-1], "%H:%M:%S.%f")
        first = first or stamp
        times.append(((stamp - first).total_seconds(), int(prompt), int(output)))
    arrival_s, prompt_tokens, output_tokens = np.array(times).T
    np.testing.assert_allclose(table.arrival_s, arrival_s, atol=2e-6)
    assert np.array_equal(table.prompt_tokens, prompt_tokens)
    assert np.array_equal(table.output_tokens, output_tokens)


def test_mooncake_trace_has_its_known_facts() -> None:
    table = MooncakeReader().read(real("mooncake/conversation_trace_head.jsonl"))
    assert len(table) == 2000
    assert table.prompt_tokens[0] == 6758
    assert table.arrival_s[-1] == 669.0


def test_sharegpt_lengths_have_their_known_facts() -> None:
    pairs = read_sharegpt(real("sharegpt/sharegpt_val_10k_llama2.csv"))
    assert pairs.shape == (10_000, 2)
    assert pairs.mean(axis=0).round().tolist() == [246, 326]
    assert np.median(pairs[:, 0]) == 35
    assert np.quantile(pairs[:, 1], 0.9) == pytest.approx(681, abs=0.5)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
PLAIN = "arrival_s,prompt_tokens,output_tokens"


def test_azure_stamps_of_2024_with_offset_and_without_fraction(write: Callable[..., str]) -> None:
    file = write(
        "t.csv",
        AZURE,
        "2024-05-10 00:00:00.009930+00:00,2162,5",
        "2024-05-10 00:00:01+00:00,2399,6",
        "2024-05-10 02:00:01.5+02:00,76,15",
    )
    table = AzureReader().read(file)
    np.testing.assert_allclose(table.arrival_s, [0, 0.99007, 1.49007], atol=1e-9)
    assert table.prompt_tokens.tolist() == [2162, 2399, 76]


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{PLAIN}\r\n0,5,6\r\n1.5,7,8\r\n\r\n".encode())
    table = CsvReader().read(str(path))
    assert table.arrival_s.tolist() == [0, 1.5]
    assert table.output_tokens.tolist() == [6, 8]


def test_burstgpt_failures_are_dropped_and_counted_or_kept(write: Callable[..., str]) -> None:
    file = write(
        "b.csv",
        BURST,
        "5,ChatGPT,472,18,490,Conversation log",
        "45,GPT-4,1087,0,1087,API log",
        "118,ChatGPT,417,276,693,API log",
    )
    table = BurstGptReader().read(file)
    assert table.arrival_s.tolist() == [0, 113]
    assert table.notes == ("1 of 3 rows are failed calls and left out",)
    kept = BurstGptReader(failures="keep").read(file)
    assert kept.output_tokens.tolist() == [18, 1, 276]
    assert BurstGptReader(models=["ChatGPT"], log_types=["API log"]).read(file).prompt_tokens.tolist() == [
        417
    ]
    with pytest.raises(ValueError, match=r"no row has Model 'ChatGTP'.*did you mean 'ChatGPT'"):
        BurstGptReader(models=["ChatGTP"]).read(file)
    with pytest.raises(ValueError, match=r"reader.models must be null or a list of names, got 'GPT-4'"):
        BurstGptReader(models="GPT-4").read(file)
    with pytest.raises(ValueError, match="all 1 rows are failed"):
        BurstGptReader(models=["GPT-4"]).read(file)
    with pytest.raises(ValueError, match="no row has Log Type 'Conversation log'; there are API log"):
        BurstGptReader(models=["GPT-4"], log_types=["Conversation log"]).read(file)


def test_a_bad_row_is_named_by_its_line_even_behind_a_filter(write: Callable[..., str]) -> None:
    rows = ["1,A,1,1,2,L", "2,B,1,1,2,L", "3,A,1,1,2,L", "x,A,1,1,2,L"]
    with pytest.raises(ValueError, match=r"row 5, column Timestamp.*got 'x'"):
        BurstGptReader(models=["A"]).read(write("b.csv", BURST, *rows))


def test_own_traces_may_state_classes_and_adapters_and_a_late_start(write: Callable[..., str]) -> None:
    file = write("t.csv", PLAIN + ",slo,adapter", "2,5,6,chat,", "3,5,6,batch,fr", "3,5,6,chat,de")
    table = CsvReader().read(file)
    assert table.arrival_s.tolist() == [2, 3, 3]
    assert [table.slo_names[c] for c in table.slo] == ["chat", "batch", "chat"]
    assert [table.adapter_names[c] for c in table.adapter] == ["", "fr", "de"]


def test_seconds_since_1970_are_no_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "dates.csv"
    path.write_text(f"{PLAIN}\n1763769600.5,10,5\n1763769600,11,6\n")
    with pytest.raises(ValueError, match=r"dates.csv: column arrival_s must count .* at 1763769600 s$"):
        CsvReader().read(str(path))


def test_unsorted_stamps_are_sorted_with_one_warning_that_counts_them(write: Callable[..., str]) -> None:
    file = write("t.csv", PLAIN + ",adapter", "5,1,1,a", "3,2,2,b", "4,3,3,", "9,4,4,d")
    with pytest.warns(UserWarning, match=r"t\.csv: 2 of 4 rows .*sorted by time") as caught:
        table = CsvReader().read(file)
    assert len(caught) == 1
    assert table.prompt_tokens.tolist() == [2, 3, 1, 4]
    assert [table.adapter_names[c] for c in table.adapter] == ["b", "", "a", "d"]
    jsonl = write(
        "m.jsonl", *[json.dumps({"timestamp": t, "input_length": 1, "output_length": t}) for t in (9, 3)]
    )
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert MooncakeReader().read(jsonl).arrival_s.tolist() == pytest.approx([0, 0.006])


GOOD = {
    "azure": (
        AzureReader(),
        (AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"),
    ),
    "burst": (BurstGptReader(), (BURST, "5,ChatGPT,472,18,490,API log", "6,ChatGPT,4,1,5,API log")),
    "plain": (CsvReader(), (PLAIN, "0,5,6", "1,7,8")),
}
NEEDED = r"needed is a CSV with a header of arrival_s \(seconds\), prompt_tokens, output_tokens$"


@pytest.mark.parametrize(
    ("kind", "row", "line", "says"),
    [
        (
            "azure",
            3,
            "2023-11-16 18:15:50.9951690,0,109",
            "row 3, column ContextTokens: .*from 1 to .*, got 0",
        ),
        ("azure", 3, "2023-11-16 18:15:50.9951690,5,-1", "row 3, column GeneratedTokens: .*got -1"),
        ("azure", 2, "2023-11-16 18:15:50.9951690,12x,109", "row 2, column ContextTokens: .*got '12x'"),
        ("azure", 3, "2023-11-16 18:15:50.9951690,1.5,109", "row 3, column ContextTokens: .*got 1.5"),
        ("azure", 3, "2023-11-16 18:15:50.9951690,,109", "row 3, column ContextTokens: .*got nothing"),
        ("azure", 3, "2023-11-16 18:15:50.9951690,7", "row 3, column GeneratedTokens: .*got nothing"),
        ("azure", 3, "yesterday,7,8", "row 3, column TIMESTAMP: must be a stamp.*got 'yesterday'"),
        ("azure", 3, ",7,8", "row 3, column TIMESTAMP: .*got nothing"),
        ("azure", 2, "", "row 2, column TIMESTAMP: .*got nothing"),
        (
            "azure",
            1,
            "TIMESTAMP,ContextToken,GeneratedTokens",
            "row 1: no column 'ContextTokens'.*; should 'ContextToken' be 'ContextTokens'",
        ),
        (
            "plain",
            1,
            "arrival_s,prompt,output_tokens",
            "no column 'prompt_tokens'.*'prompt' be 'prompt_tokens'",
        ),
        (
            "plain",
            1,
            "arrival_s,prompt_tokens,made",
            "no column 'output_tokens', got arrival_s, prompt_tokens, made; needed are arrival_s .seconds., prompt",
        ),
        ("burst", 3, "-6,ChatGPT,4,1,5,API log", "row 3, column Timestamp: .*at least 0, got -6"),
        ("burst", 3, "nan,ChatGPT,4,1,5,API log", "row 3, column Timestamp: .*at least 0, got"),
        ("burst", 3, "6,ChatGPT,0,1,5,API log", "row 3, column Request tokens: .*got 0"),
        ("plain", 3, "inf,1,1", "row 3, column arrival_s: .*got inf"),
        ("plain", 3, "1,1e12,1", "row 3, column prompt_tokens: .*got 1"),
        ("plain", 3, f"1,{'9' * 400},1", "row 3, column prompt_tokens: .*got 999"),
        ("plain", 1, "x" * 10_000, r"row 1: no column 'arrival_s', got x{200}\.\.\.; needed are arrival_s"),
        ("plain", 3, "1,2,3,4", "row 3: must have 3 fields, got 4"),
        ("plain", 3, "1,2,\0", "row 3: holds a byte of 0"),
        ("plain", 1, PLAIN + ",adaptor", "unknown column 'adaptor'.*did you mean 'adapter'"),
        ("plain", 1, PLAIN + ",SLO", "unknown column 'SLO'.*did you mean 'slo'"),
        ("plain", 1, PLAIN + ",adapter_id", "unknown column 'adapter_id'.*did you mean 'adapter'"),
        ("plain", 1, '{"arrival_s": 0, "prompt_tokens": 5}', f"row 1: found JSON; {NEEDED}"),
        ("plain", 1, '[{"arrival_s": 0},', f"row 1: found JSON; {NEEDED}"),
        ("plain", 1, "PAR1\0", f"row 1: found Parquet; {NEEDED}"),
        ("plain", 1, PLAIN.replace(",", ";"), f"row 1: found columns separated by ';'; {NEEDED}"),
        ("plain", 1, PLAIN.replace(",", "\t"), rf"row 1: found columns separated by '\\t'; {NEEDED}"),
        ("plain", 1, "0,5,6", f"row 1: found numbers, 0,5,6; {NEEDED}"),
        (
            "azure",
            1,
            '{"TIMESTAMP": 0}',
            "needed is a CSV with a header of TIMESTAMP, ContextTokens, GeneratedTokens$",
        ),
        (
            "plain",
            3,
            "2023-11-16T18:15:46,5,6",
            "arrival_s: must be a number of seconds from the start, no date",
        ),
    ],
)
def test_a_malformed_row_is_named(
    write: Callable[..., str], kind: str, row: int, line: str, says: str
) -> None:
    reader, good = GOOD[kind]
    assert len(reader.read(write("good.csv", *good))) == 2
    lines = list(good)
    lines[row - 1] = line
    with pytest.raises(ValueError, match=says) as error:
        reader.read(write("bad.csv", *lines))
    assert "bad.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_that_are_not_read_are_told(write: Callable[..., str]) -> None:
    file = write("t.csv", f"id,{PLAIN},user,slo", "a,0,5,6,x,chat", "b,1,7,8,y,batch")
    with pytest.warns(UserWarning, match=r"t\.csv: not read: id, user \(known are also slo, adapter\)$"):
        table = CsvReader().read(file)
    assert table.prompt_tokens.tolist() == [5, 7] and table.slo_names == ("batch", "chat")


def test_a_quoted_header_is_read_and_a_column_given_twice_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('"arrival_s","prompt_tokens","output_tokens"\n0,10,5\n1,11,6\n')
    assert CsvReader().read(str(path)).prompt_tokens.tolist() == [10, 11]
    path.write_text("arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,10,5,7\n")
    with pytest.raises(ValueError, match=r"t\.csv: row 1: column 'prompt_tokens' must be there once, got 2"):
        CsvReader().read(str(path))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "row 2, column input_length: .*got 0"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 0.5}',
            "row 2, column output_length: .*got 0.5",
        ),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "row 2, column timestamp: .*got -1"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "row 2, column timestamp: .*got nan"),
        (
            '{"timestamp": Infinity, "input_length": 1, "output_length": 1}',
            "row 2, column timestamp: .*got inf",
        ),
        ('{"timestamp": "1", "input_length": 1, "output_length": 1}', "row 2, column timestamp: .*got '1'"),
        (
            '{"timestamp": 1, "input_length": true, "output_length": 1}',
            "row 2, column input_length: .*got True",
        ),
        ('{"timestamp": 1, "output_length": 1}', "row 2, column input_length: .*got nothing"),
        ("[1, 2]", "row 2: must be a JSON object"),
        ("{", "row 2: must be JSON"),
        ("[" * 10_000, "row 2: must be JSON"),
        ('{"timestamp": ' + "9" * 5000 + "}", "row 2: must be JSON"),
    ],
)
def test_a_malformed_mooncake_row_is_named(write: Callable[..., str], line: str, says: str) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}'
    with pytest.raises(ValueError, match=says):
        MooncakeReader().read(write("m.jsonl", good, line, good))


@pytest.mark.parametrize("kind", GOOD)
def test_an_empty_trace_is_refused(write: Callable[..., str], kind: str) -> None:
    reader, good = GOOD[kind]
    with pytest.raises(ValueError, match="is empty"):
        reader.read(write("e.csv", good[0]))
    with pytest.raises(ValueError, match="no column"):
        reader.read(write("e.csv", ""))


def test_an_empty_mooncake_trace_is_refused(write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        MooncakeReader().read(write("e.jsonl", ""))


def test_an_empty_slo_is_the_default_class(write: Callable[..., str]) -> None:
    file = write("t.csv", PLAIN + ",slo", "9,5,6,chat", "2,5,6,", "3,5,6,chat")
    with pytest.warns(UserWarning, match="sorted by time"):
        table = CsvReader().read(file)
    assert [table.slo_names[c] for c in table.slo] == ["default", "chat", "chat"]
    rows = dict(zip(table.slo_names, table.slo_places, strict=True))
    assert rows == {"chat": f"{file}: row 2", "default": f"{file}: row 3"}


def test_lengths_come_from_csv_json_and_json_lines(write: Callable[..., str]) -> None:
    expected = [[3, 4], [5, 6]]
    assert (
        read_sharegpt(write("a.csv", "num_prefill_tokens,num_decode_tokens,x", "3,4,0", "5,6,0")).tolist()
        == expected
    )
    records = [{"prompt_tokens": p, "output_tokens": o} for p, o in expected]
    assert read_sharegpt(write("a.json", json.dumps(records))).tolist() == expected
    assert read_sharegpt(write("b.json", json.dumps(expected))).tolist() == expected
    assert read_sharegpt(write("a.jsonl", *map(json.dumps, records))).tolist() == expected
    assert read_lengths(write("c.csv", PLAIN, "0,3,4", "1,5,6"), "csv").tolist() == expected
    assert set(FORMATS) == {"sharegpt", "azure", "burstgpt", "mooncake", "csv"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"id": "x", "conversations": []}]', "holds text"),
        ('[{"id": "x"}]', "no columns with lengths"),
        ('[{"prompt_len": 1, "output_len": 0}]', "row 1, column output_len"),
        ("[]", "not empty"),
        ("{}", "not empty"),
        ("[[1, 2], 'x']", "row 1: not JSON"),
        ("1\n2\n", "row 2: not JSON: .*; JSON lines must be in a file named .jsonl"),
        ('[[1, 2], "x"]', "row 2: must be a record"),
    ],
)
def test_malformed_lengths_are_named(write: Callable[..., str], text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_sharegpt(write("l.json", text))


def test_files_are_found_as_given_and_below_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, here = tmp_path / "data", tmp_path / "here"
    (data / "azure").mkdir(parents=True)
    here.mkdir()
    (data / "azure" / "a.csv").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COSERVE_DATA", str(data))
    assert find_file("azure/a.csv") == data / "azure" / "a.csv"
    assert find_file(["b.csv", "azure/a.csv"]) == data / "azure" / "a.csv"
    (here / "b.csv").touch()
    assert find_file(["b.csv", "azure/a.csv"]) == Path("b.csv")
    monkeypatch.delenv("COSERVE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_dir() == tmp_path / "cache" / "coserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dir() == tmp_path / ".cache" / "coserve"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["arrival_s,prompt_tokens,output_tokens", "0,10,5", '1,"' + "x" * 131_073],
            "row 3: not CSV: field",
        ),
        (['"arrival_s,' + "x" * 131_073, "0,10,5"], "row 1: not CSV: field larger than field limit"),
        (
            ["arrival_s,prompt_tokens,output_tokens", f"0,{'x' * 131_073},5"],
            "row 2, column prompt_tokens: must be a whole number from 1 to 2147483647, got 'xxx",
        ),
    ],
)
def test_a_field_of_a_hundred_thousand_letters_is_told_by_file_and_row(
    tmp_path: Path, lines: list[str], told: str
) -> None:
    path = tmp_path / "long.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {told}")) as error:
        CsvReader().read(str(path))
    assert len(str(error.value)) < len(str(path)) + 200


def test_a_missing_public_trace_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSERVE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="coserve fetch azure_conv") as error:
        find_file("azure/AzureLLMInferenceTrace_conv.csv")
    assert str(tmp_path / "azure") in str(error.value)
    assert str(error.value).endswith(", or COSERVE_DATA names the folder that has it")
    with pytest.raises(
        ValueError, match=r"coserve fetch --url https://\S+ mooncake/conversation_trace.jsonl"
    ):
        find_file(["mooncake/conversation_trace.jsonl", "mooncake/conversation_trace_head.jsonl"])
    with pytest.raises(ValueError, match=r"no such file: mine.csv or \S+mine.csv$"):
        find_file("mine.csv")
    with pytest.raises(ValueError, match=r"file must be the path of a file, got \[3\]"):
        find_file([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"no such file: ~nobody-here/mine\.csv"):
        find_file("~nobody-here/mine.csv")
