"""What the projects that publish measurements write: every column, name and form of theirs that changes a figure."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from profiles.check import check_file
from profiles.measured import read_measured, whole_layer
from profiles.named import device_named, known_name, model_named
from profiles.predict import predicted_s
from profiles.program import main
from profiles.rows import Measured
from sim.core.specs import DeviceSpec
from sim.cost.attention import cache_write_s
from sim.cost.efficiency import Efficiency

GEMM = {"m": [1, 64, 2048], "n": [4096] * 3, "k": [4096] * 3, "latency": [0.03, 0.04, 0.4]}
SHAPE = {"n_head": 64, "n_kv_head": 8, "n_embd": 8192, "n_expanded_embd": 28672, "vocab_size": 32768}


def write(path: Path, columns: dict[str, object], **settings: object) -> Path:
    pd.DataFrame(columns).to_csv(path, index=False, **settings)  # type: ignore[call-overload]
    return path


def notes(capsys: pytest.CaptureFixture[str], path: Path, *settings: str) -> str:
    assert main(["check", str(path), *settings]) == 0
    return capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], path: Path, *settings: str) -> str:
    assert main(["check", str(path), *settings]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("meta-llama/Llama-2-70b-hf", "llama_2_70b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama_2_7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama_3_8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama_3_1_8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama_3_1_70b"),
        ("codellama/CodeLlama-34b-Instruct-hf", "codellama_34b"),
        ("Qwen/Qwen2.5-32B-Instruct", "qwen2_5_32b"),
        ("Qwen/Qwen2-72B", "qwen2_5_72b"),
        ("Qwen/Qwen-72B", "qwen_72b"),
        ("Qwen/Qwen3-32B", "qwen3_32b"),
        ("internlm/internlm-20b", "internlm_20b"),
        ("internlm/internlm2-20b", "internlm2_20b"),
        ("/models/Qwen2.5-7B/", "qwen2_5_7b"),
    ],
)
def test_models_are_known_by_the_names_of_their_owners(name: str, config: str) -> None:
    assert model_named(name).name == config


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("a100_sxm", "a100_80gb"),
        ("a100", "a100_80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100_dgx", "h100"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("h200_sxm", "h200"),
        ("b200_sxm", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("RTX3090", "rtx_3090"),
        ("NVIDIA RTX A6000", "rtx_a6000"),
        ("A6000", "rtx_a6000"),
        ("RTXPRO6000", "rtx_pro_6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
    ],
)
def test_cards_are_known_by_the_names_of_their_driver(name: str, config: str) -> None:
    assert device_named(name).name == config


def test_another_card_or_model_is_not_mistaken_for_a_known_one() -> None:
    for name in ("NVIDIA A100-PCIE-80GB", "NVIDIA H200 NVL", "NVIDIA L40", "GB200", "RTX 6000 Ada", "A10G"):
        with pytest.raises(ValueError, match=r"no device named .*; or the path of a YAML file"):
            device_named(name)
    for name in ("Qwen/Qwen2.5-32B-Instruct-AWQ", "meta-llama/Llama-3.1-405B", "microsoft/phi-2"):
        with pytest.raises(ValueError, match=r"no model named .*; or the path of a YAML file"):
            model_named(name)
    assert known_name("model", "Llama-3.1-8B", ["llama_3_8b"]) is None


def test_rows_of_another_card_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "gemm.csv", GEMM | {"device": "NVIDIA H200"})
    assert "rows of NVIDIA H200 are judged as a100_80gb" in notes(capsys, path, "device=a100")
    assert "judged" not in notes(capsys, path, "device=H200")


@pytest.mark.parametrize(
    "form", ["semicolons", "tabs", "quotes", "mark", "compressed", "parquet", "txt", "index"]
)
def test_the_same_rows_in_another_form_are_the_same(form: str, tmp_path: Path) -> None:
    plain = read_measured(write(tmp_path / "plain.csv", GEMM))[0]
    frame, path = pd.DataFrame(GEMM), tmp_path / "gemm.csv"
    if form == "parquet":
        path = tmp_path / "gemm.parquet"
        frame.to_parquet(path)
    elif form == "compressed":
        path = tmp_path / "gemm.csv.gz"
        frame.to_csv(path, index=False)
    elif form == "txt":
        path = write(tmp_path / "gemm_perf.txt", GEMM | {"framework": "VLLM", "op_name": "gemm", "power": ""})
    elif form == "index":
        frame.to_csv(path)
    else:
        settings = {
            "semicolons": {"sep": ";", "decimal": ","},
            "tabs": {"sep": "\t"},
            "quotes": {"quoting": 1},
            "mark": {"encoding": "utf-8-sig"},
        }[form]
        write(path, GEMM, **settings)
    other = read_measured(path)[0]
    assert np.array_equal(plain.seconds, other.seconds)
    assert all(np.array_equal(plain.columns[name], other.columns[name]) for name in plain.columns)


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_damaged_compressed_file_is_named(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress(b"m,n,k,latency\n" + b"".join(b"%d,2,3,4\n" % m for m in range(1, 999)))
    path = tmp_path / "gemm.csv.gz"
    path.write_bytes(whole[:200] if damage == "cut short" else whole[:20] + bytes(40) + whole[60:])
    assert "gemm.csv.gz: not a readable CSV or Parquet file" in refusal(capsys, path, "device=l40s")


def test_times_in_another_unit_are_said_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = device_named("a100_80gb")
    truth = predicted_s(read_measured(write(tmp_path / "ms.csv", GEMM))[0], spec, gemm="table")
    for unit, factor in (("us", 1e6), ("s", 1.0)):
        path = write(tmp_path / f"{unit}.csv", GEMM | {"latency": factor * truth})
        assert f"of the predicted ones; unit={unit} takes them" in notes(capsys, path, "device=a100")
        assert "of the predicted ones" not in notes(capsys, path, "device=a100", f"unit={unit}")
        lines = check_file(path, spec, None, 1, unit=unit)
        assert lines[0].worst < 1e-9
    assert "unit must be one of ms, us, s, got 'ns'" in refusal(capsys, path, "device=a100", "unit=ns")


def test_a_file_of_another_kind_names_the_kinds_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"num_tokens": [1], "topk": [2], "num_experts": [8], "latency": [0.1]}
    line = refusal(capsys, write(tmp_path / "moe.csv", experts), "device=h100")
    assert line.endswith(
        "moe.csv: row 0 (header): no kind that is known has the columns num_tokens, topk, num_experts, latency; "
        "profiles/README.md has the kinds"
    )
    products = write(tmp_path / "wide.csv", {"m": [1], **{f"column_{n}": [n] for n in range(100)}})
    line = refusal(capsys, products, "device=h100")
    assert "column_0, " in line and "column_99" not in line
    assert line.endswith("; the nearest, gemm, has m, n, k, latency; profiles/README.md has the kinds")
    pointer = tmp_path / "gemm.csv"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "a pointer of Git LFS in place of the data" in refusal(capsys, pointer, "device=h100")
    assert "is a folder; give a file: there are gemm.csv, moe.csv" in refusal(capsys, tmp_path, "device=h100")


def test_all_reduces_of_other_engines_have_other_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"num_gpus": [2, 8], "message_size": [4096, 65536], "latency": [0.01, 0.02]}
    for more, name in (
        ({"allreduce_dtype": "bfloat16", "implementation": "trtllm"}, "all-reduce trtllm"),
        ({"allreduce_dtype": "half", "framework": "TRTLLM"}, "all-reduce TRTLLM"),
        ({"allreduce_dtype": "half"}, "all-reduce unnamed"),
        ({"backend": "sglang_eager", "op_name": "all_reduce"}, "all-reduce sglang_eager"),
    ):
        found = read_measured(write(tmp_path / "reduce.csv", rows | more))
        assert [m.operator for m in found] == [name]
        assert found[0].columns["bytes"].tolist() == [8192.0, 131072.0]
    fused = write(tmp_path / "fused.csv", rows | {"backend": "vllm_graph", "op_name": "allreduce_rms"})
    assert "op_name is allreduce_rms; allowed: some of all_reduce" in refusal(capsys, fused, "device=h200")


def test_collectives_of_other_types_have_their_own_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"op_name": "all_reduce", "nccl_dtype": ["bfloat16", "float32", "fp8", "fp4"], "num_gpus": 2}
    path = write(tmp_path / "nccl.csv", rows | {"message_size": 1024, "latency": [0.01, 0.02, 0.03, 0.04]})
    with pytest.warns(UserWarning, match="1 row of nccl_dtype fp4 left out"):
        found = read_measured(path)
    assert found[0].columns["bytes"].tolist() == [2048.0, 4096.0, 1024.0]
    assert "1 row of nccl_dtype fp4 left out" in notes(capsys, path, "device=h200")


def attention(path: Path, *, saved: bool = True, together: bool = False) -> Path:
    """Vidur's: a chunk, a chunk after a context, and decodes, of a 70B model on one of two devices."""
    rows = pd.DataFrame(
        {
            "prefill_chunk_size": [512, 256, 0, 0],
            "kv_cache_size": [0, 1024, 2048, 128],
            "batch_size": [1, 1, 16, 64],
        }
    )
    us = np.array([200.0, 150.0, 90.0, 40.0])
    prefill = rows["prefill_chunk_size"] > 0
    for name, keep in (("attn_prefill", prefill), ("attn_decode", ~prefill)):
        rows[f"time_stats.{name}.median"] = np.where(keep, us / 1e3, np.nan)
    if together:
        rows = rows.drop(columns=[name for name in rows if "attn_" in name])
        rows["time_stats.attn.median"] = us / 1e3
    if saved:
        rows["time_stats.attn_kv_cache_save.median"] = 0.005
    shape = {
        "n_embd": 8192,
        "n_q_head": 64,
        "n_kv_head": 8,
        "num_tensor_parallel_workers": 2,
        "block_size": 16,
    }
    rows.assign(**shape, attention_backend="AttentionBackend.FLASHINFER").to_csv(path, index=False)
    return path


@pytest.mark.parametrize("together", [False, True])
def test_vidurs_attention_is_chunks_and_decodes_with_their_writes(tmp_path: Path, together: bool) -> None:
    found = {m.operator: m for m in read_measured(attention(tmp_path / "attention.csv", together=together))}
    names = ("context attention", "context attention after a context", "generation attention")
    assert tuple(found) == names
    first, after, decodes = (found[name] for name in names)
    assert first.seconds == pytest.approx([205e-6]) and after.seconds == pytest.approx([155e-6])
    assert decodes.seconds == pytest.approx([95e-6, 45e-6])
    for measured in found.values():
        c = measured.columns
        assert set(c["heads"]) == {32.0} and set(c["kv_heads"]) == {4.0} and set(c["head_dim"]) == {128.0}
    assert after.columns["tokens"] == [256] and after.columns["context"] == [1024]
    assert decodes.columns["batch"].tolist() == [16, 64] and decodes.columns["context"].tolist() == [
        2048,
        128,
    ]
    assert decodes.columns["tokens"].tolist() == [1, 1] and decodes.rows.tolist() == [3, 4]


def test_attention_that_was_timed_without_its_write_is_predicted_without_it(tmp_path: Path) -> None:
    spec = device_named("a100_80gb")
    with_write = read_measured(attention(tmp_path / "with.csv"))
    without = read_measured(attention(tmp_path / "without.csv", saved=False))
    for a, b in zip(with_write, without, strict=True):
        c = a.columns
        write_s = cache_write_s(
            c["batch"] * c["tokens"], c["kv_heads"], c["head_dim"], spec, Efficiency.of(spec)
        )
        assert (write_s > 0).all()
        assert predicted_s(a, spec) - predicted_s(b, spec) == pytest.approx(write_s)


def test_vidurs_rows_without_a_time_and_copies_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = attention(tmp_path / "attention.csv")
    frame = pd.read_csv(path)
    frame.loc[2, "time_stats.attn_decode.median"] = np.nan
    pd.concat([frame, frame.iloc[:1]]).to_csv(path, index=False)
    said = notes(capsys, path, "device=a100")
    assert "1 row there twice left out" in said and "1 row without a time left out" in said
    frame.drop(columns=[name for name in frame if "time_stats" in name]).to_csv(path, index=False)
    assert "no row has a time; needed: time_stats.attn_prefill.median" in refusal(capsys, path, "device=a100")
    frame.assign(num_tensor_parallel_workers=3).to_csv(path, index=False)
    assert "row 1: num_tensor_parallel_workers is 3; allowed: a divisor of n_q_head 64" in refusal(
        capsys, path, "device=a100"
    )


def test_sends_are_half_of_an_all_to_all_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"rank": 0, "num_workers": [2, 2, 2], "size": [2048, 2**20, 2**24], "collective": "send_recv"}
    rows |= {"devices_per_node": [2, 2, 1], "max_devices_per_node": 8}
    path = write(tmp_path / "send_recv.csv", rows | {"time_stats.send_recv.median": [0.02, 0.03, 0.2]})
    assert "1 row across nodes left out" in notes(capsys, path, "device=a100")
    with pytest.warns(UserWarning, match="across nodes"):
        found = read_measured(path)
    assert found[0].columns["bytes"].tolist() == [4096.0, 2.0**21]
    seconds = predicted_s(found[0], device_named("a100_80gb"))
    link = device_named("a100_80gb").link_bandwidth_bytes_s
    assert (seconds > np.array([2048, 2**20]) / link).all() and seconds[0] < seconds[1]


def layer(path: Path, second_norm: bool) -> list[Measured]:
    names = [
        "attn_pre_proj",
        "attn_post_proj",
        "mlp_up_proj",
        "mlp_down_proj",
        "input_layernorm",
        "add",
        "mlp_act",
    ]
    names += ["post_attention_layernorm"] * second_norm
    times = {f"time_stats.{name}.median": 0.01 for name in names}
    tokens = {"num_tokens": [64, 1024], "num_tensor_parallel_workers": 2}
    return read_measured(write(path, SHAPE | tokens | times | {"use_gated_mlp": False}))


def test_attention_and_mlp_side_by_side_are_added_once_by_two_kernels(tmp_path: Path) -> None:
    spec: DeviceSpec = device_named("a100_80gb")
    for second_norm, operators, values in ((True, 9, 3), (False, 7, 6)):
        found = layer(tmp_path / "mlp.csv", second_norm)
        add = next(m for m in found if m.operator == "add")
        assert add.columns["values"].tolist() == [values * 8192.0] * 2
        whole = whole_layer(found, [predicted_s(m, spec) for m in found])
        assert whole is not None and whole[0].seconds == pytest.approx([operators * 1e-5] * 2)


def card(folder: Path, name: str, columns: dict[str, object]) -> Path:
    degree = folder / "tp2"
    degree.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").write_text("model: Qwen/Qwen2.5-14B\ntp_degrees: [1, 2]\n")
    return write(degree / name, columns)


def test_a_cards_folder_says_its_model_and_degree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = card(tmp_path, "dense.csv", {"layer": "qkv_proj", "tokens": [1, 64], "time_us": [50.0, 60.0]})
    assert main(["check", str(dense), "device=l40s"]) == 0
    assert "n 3584, k 5120" in capsys.readouterr().out, "(40 + 2 x 8) / 2 heads of 128"
    assert main(["show", str(dense)]) == 0
    said = notes(capsys, dense, "device=l40s", "model=llama_3_1_8b")
    assert "measured for Qwen/Qwen2.5-14B, judged by the shapes of llama_3_1_8b" in said
    assert "measured for" not in notes(capsys, dense, "device=l40s", "model=Qwen/Qwen2.5-14B-Instruct")
    assert "measured on one of 2 devices; leave out tp=4" in refusal(capsys, dense, "device=l40s", "tp=4")


def test_a_cards_folder_that_says_no_degree_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = card(tmp_path, "dense.csv", {"layer": "qkv_proj", "tokens": [1, 64], "time_us": [50.0, 60.0]})
    own = dense.rename(dense.parents[1] / dense.name)
    (own.parent / "meta.yaml").write_text("model: Qwen/Qwen2.5-14B\ntp_degrees: [two]\n")
    assert "meta.yaml: tp_degrees must be a list of whole numbers from 1" in refusal(
        capsys, own, "device=l40s"
    )


def test_later_attention_of_a_card_is_read_by_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "layer": ["attention"] * 5 + ["indexer"],
        "prefill_chunk": [512, 512, 0, 512, 0, 0],
        "prefill_key": [256.0, 1280.0, 0.0, 128.0, 0.0, 0.0],
        "n_decode": [0, 0, 8, 0, 8, 8],
        "kv_decode": [0, 0, 64, 0, 64, 64],
        "decode_q_len": [1, 1, 1, 1, 4, 1],
        "time_us": [20.0, 40.0, 10.0, 15.0, 11.0, 12.0],
    }
    path = card(tmp_path, "attention.csv", rows)
    said = notes(capsys, path, "device=l40s")
    for what in ("another layer", "another decode_q_len", "several prompts in one kernel"):
        assert f"1 row of {what} left out" in said
    with pytest.warns(UserWarning, match="left out"):
        found = {m.operator: m for m in read_measured(path, model_named("qwen2_5_14b"), 2)}
    assert found["context attention"].seconds == pytest.approx([20e-6])
    assert found["context attention after a context"].columns["context"] == [1024]
    assert found["generation attention"].columns["context"] == [64]
    assert found["generation attention"].columns["heads"] == [20]
