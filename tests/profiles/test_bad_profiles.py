"""Broken files: one line that names the file, the row and what is allowed, and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from profiles.program import main
from profiles.schema import COLUMNS, Provenance, write_profile

KERNELS = {
    "gemm": {"m": [1, 2, 4], "n": [512] * 3, "k": [512] * 3, "latency": [0.1, 0.2, 0.3]},
    "context": {
        "batch_size": [1, 2, 4], "isl": [64] * 3, "num_heads": [32] * 3, "num_key_value_heads": [8] * 3,
        "latency": [0.1, 0.2, 0.3],
    },
    "generation": {
        "batch_size": [1, 2, 4], "step": [63] * 3, "num_heads": [32] * 3, "num_key_value_heads": [8] * 3,
        "latency": [0.1, 0.2, 0.3],
    },
    "nccl": {
        "op_name": ["all_reduce"] * 3, "nccl_dtype": ["half"] * 3, "num_gpus": [2, 4, 8],
        "message_size": [256] * 3, "latency": [0.1, 0.2, 0.3],
    },
    "custom": {
        "num_gpus": [2, 4, 8], "message_size": [256] * 3, "backend": ["vllm_graph"] * 3,
        "latency": [0.1, 0.2, 0.3],
    },
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], path: Path, *settings: str) -> str:
    """The one line that `check` prints on its way out."""
    given = {s.partition("=")[0] for s in settings}
    more = [s for s in ("device=a100_80gb", "model=llama_3_1_8b") if s.partition("=")[0] not in given]
    assert main(["check", str(path), *more, *settings]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def write(path: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> pd.DataFrame:
    return pd.DataFrame(KERNELS[request.param])


def test_curves_take_the_data_folder_or_the_kernels_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (".", "kernels", "kernels/", str(tmp_path / "kernels")):
        assert main(["curves", folder]) == 2
        error = capsys.readouterr().err
        assert "kernels/a100_sxm*.csv: no such files" in error and "kernels/kernels" not in error
    monkeypatch.chdir("kernels")
    assert main(["curves", "."]) == 2
    assert f"{tmp_path}/kernels/a100_sxm*.csv: no such files" in capsys.readouterr().err


def test_a_good_kernel_file_is_taken(kernel: pd.DataFrame, tmp_path: Path) -> None:
    assert main(["check", str(write(tmp_path / "good.csv", kernel)), "device=a100_80gb"]) == 0


def test_every_missing_column_is_named(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for column in kernel:
        line = refused(capsys, write(tmp_path / "short.csv", kernel.drop(columns=column)))
        absent = line.partition("column ")[2].partition(" is missing")[0]
        assert column in absent.split(" or ") and "short.csv: row 0" in line and "needed" in line


@pytest.mark.parametrize("value", ["0", "-0.5", "nan", "fast"])
def test_times_that_are_not_positive_are_refused(
    kernel: pd.DataFrame, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel["latency"] = kernel["latency"].astype(object)
    kernel.loc[1, "latency"] = value
    line = refused(capsys, write(tmp_path / "late.csv", kernel))
    assert "late.csv: row 2: latency" in line and "above 0" in line


def test_sizes_below_one_are_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = next(name for name in kernel if name in ("m", "batch_size", "num_gpus"))
    kernel.loc[2, size] = 0
    line = refused(capsys, write(tmp_path / "none.csv", kernel))
    assert f"none.csv: row 3: {size} is 0; allowed: a number at least 1" in line


def test_sizes_beyond_all_meaning_are_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = next(name for name in kernel if name in ("m", "batch_size", "num_gpus"))
    for value in ("1e300", "9" * 400):
        kernel[size] = kernel[size].astype(object)
        kernel.loc[2, size] = value
        line = refused(capsys, write(tmp_path / "vast.csv", kernel))
        assert f"vast.csv: row 3: {size} is " in line and "at most 1,000,000,000,000,000" in line


def test_a_row_of_more_fields_than_the_header_is_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "wide.csv", kernel)
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, f"{first},1", *rest]))
    assert "wide.csv: not a readable CSV or Parquet file: row 1 has more fields" in refused(capsys, path)


def test_rows_count_from_1_whatever_a_parquet_file_calls_them(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel["latency"] = kernel["latency"].astype(float)
    kernel.loc[2, "latency"] = -1.0
    path = tmp_path / "named.parquet"
    kernel.set_index(pd.Index(["a", "b", "c"])).to_parquet(path)
    assert "named.parquet: row 3: latency is -1.0" in refused(capsys, path)


def test_a_row_without_a_device_or_a_precision_is_a_row(kernel: pd.DataFrame, tmp_path: Path) -> None:
    told = kernel.assign(device=["NVIDIA A100-SXM4-80GB", None, None])
    assert main(["check", str(write(tmp_path / "untold.csv", told)), "device=a100_80gb"]) == 0


def test_a_precision_that_no_row_tells_is_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "eight.csv", kernel.assign(dtype=["fp8", None, "int8"]))
    assert "dtype is fp8, int8, nothing in every row" in refused(capsys, path)


def test_a_row_given_twice_is_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, write(tmp_path / "twice.csv", pd.concat([kernel, kernel.iloc[:1]])))
    assert "twice.csv: row 4: the same as row 1" in line and "one row per shape and time" in line


def test_a_shape_measured_again_counts_again_and_is_said(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = write(tmp_path / "again.csv", pd.concat([kernel, kernel.iloc[:1].assign(latency=0.11)]))
    assert main(["check", str(again), "device=a100_80gb"]) == 0
    printed = capsys.readouterr()
    assert "note: " in printed.err and "again.csv: 1 rows measure a shape again; all count" in printed.err
    rows = sum(int(line.split("%")[0].split()[-2]) for line in printed.out.splitlines()[2:])
    assert rows == 4


def test_more_key_value_heads_than_heads_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.DataFrame(KERNELS["context"]).assign(num_key_value_heads=64)
    assert "row 1: num_key_value_heads is 64; allowed: at most" in refused(
        capsys, write(tmp_path / "heads.csv", frame)
    )


def test_sizes_that_are_no_whole_numbers_are_refused(
    kernel: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = next(name for name in kernel if name in ("m", "batch_size", "num_gpus"))
    kernel[size] = kernel[size].astype(float)
    kernel.loc[2, size] = 3.5
    assert f"row 3: {size} is 3.5; allowed: a whole number" in refused(
        capsys, write(tmp_path / "half.csv", kernel)
    )


def test_fit_of_operators_and_collectives_across_nodes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "gemm.csv", pd.DataFrame(KERNELS["gemm"]))
    assert main(["fit", str(path)]) == 2
    assert "gemm.csv: has operators; allowed: rows of whole iterations" in capsys.readouterr().err
    across = {"num_workers": [16], "devices_per_node": [8], "size": [64], "collective": ["all_reduce"]}
    frame = pd.DataFrame(across | {"time_stats.all_reduce.median": [0.1]})
    assert "row 1: collective is all_reduce, num_workers 16 and devices_per_node 8" in refused(
        capsys, write(tmp_path / "far.csv", frame)
    )


def test_unknown_devices_models_and_settings_name_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "good.csv", pd.DataFrame(KERNELS["gemm"]))
    assert "did you mean 'a100_80gb'?; known: " in refused(capsys, path, "device=a100_80g")
    assert "no model named 'llama'" in refused(capsys, path, "model=llama")
    assert "known: device, model" in refused(capsys, path, "devise=a100_80gb")
    assert "bound_p90 must be a number" in refused(capsys, path, "bound_p90=much")
    assert "gemm must be one of layer, table, curve" in refused(capsys, path, "gemm=measured")
    assert "no such file" in refused(capsys, tmp_path / "absent.csv")
    assert main(["check", str(path)]) == 2
    assert "needs device=NAME" in capsys.readouterr().err


@pytest.mark.parametrize("tp", ["3", "5", "0", "two"])
def test_a_tp_that_does_not_divide_the_heads_is_refused(
    tp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "good.csv", pd.DataFrame(KERNELS["gemm"]))
    assert "tp must" in refused(capsys, path, f"tp={tp}")


def test_an_operator_profile_with_such_a_tp_names_the_row(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(data / "kernel-profiles" / "h100-Llama-2-7b-hf-mlp.csv", nrows=5)
    frame.loc[3, "num_tensor_parallel_workers"] = 3
    line = refused(capsys, write(tmp_path / "tp.csv", frame))
    assert "tp.csv: row 4: num_tensor_parallel_workers is 3; allowed: a divisor of n_head 32" in line


Change = Callable[[dict[str, np.ndarray]], None]


def set_to(name: str, row: int, value: float) -> Change:
    def change(columns: dict[str, np.ndarray]) -> None:
        columns[name][row] = value

    return change


def same_work(columns: dict[str, np.ndarray]) -> None:
    for name in COLUMNS:
        columns[name][7] = columns[name][3]


def less_takes_longer(columns: dict[str, np.ndarray]) -> None:
    """A row of the least work that takes longest."""
    for name in COLUMNS:
        columns[name][5] = 20.0 if name.startswith("seconds") else columns[name].min()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_to("seconds_p50", 4, 0.0), "row 5: seconds_p50 is 0.0; allowed: a number above 0"),
        (set_to("seconds_p20", 4, np.nan), "row 5: seconds_p20 is nan; allowed: a number above 0"),
        (set_to("decode_count", 2, -1.0), "row 3: decode_count is -1.0; allowed: a number at least 0"),
        (set_to("seconds_p80", 6, 1e-6), "row 7: seconds_p20, p50, p80 are"),
        (same_work, "row 8: the same work as row 4; allowed: one row per work"),
        (less_takes_longer, "not monotone"),
    ],
)
def test_broken_rows_of_a_profile_are_named(
    change: Change,
    words: str,
    columns: dict[str, np.ndarray],
    provenance: Provenance,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = {name: values.copy() for name, values in columns.items()}
    change(broken)
    path = tmp_path / "broken.parquet"
    write_profile(path, broken, provenance)
    line = refused(capsys, path)
    assert "broken.parquet: row " in line and words in line
    assert main(["fit", str(path)]) == 2


@pytest.mark.parametrize("key", ["device", "model", "tp"])
@pytest.mark.parametrize("value", [None, 0.5, ["a"]])
def test_provenance_of_another_kind_is_refused(
    key: str, value: object, columns: dict[str, np.ndarray], provenance: Provenance, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(tmp_path / "odd.csv", pd.DataFrame(columns))
    for text in (json.dumps({**asdict(provenance), key: value}), "[" * 10_000, "[]"):
        path.with_suffix(".json").write_text(text)
        assert "odd.csv: provenance" in refused(capsys, path)


def test_a_collected_profile_has_all_of_its_columns(
    columns: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "half.csv", pd.DataFrame(columns).assign(host_s=0.001))
    assert (
        "of point, repeats, host_s, ahead_s, which a collected profile has, there are only host_s"
        in refused(capsys, path)
    )


@pytest.mark.parametrize("column", ["prefill_pairs", "seconds_p50"])
def test_a_profile_without_a_column_is_refused(
    column: str, columns: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "short.csv", pd.DataFrame(columns).drop(columns=column))
    assert f"short.csv: row 0 (header): column {column} is missing" in refused(capsys, path)


def test_a_profile_is_not_used_for_another_device_or_model(
    profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "measured for llama_3_1_8b on 1 x a100_80gb" in refused(capsys, profile_file, "device=h100")
    assert "measured for" in refused(capsys, profile_file, "model=qwen2_5_14b")


def test_provenance_of_an_unknown_device_or_impossible_tp_is_refused(provenance: Provenance) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="no device named"):
        replace(provenance, device="tpu")
    with pytest.raises(ValueError, match="tp must divide"):
        replace(provenance, tp=3)
    with pytest.raises(ValueError, match="licence must not be empty"):
        replace(provenance, licence="")
