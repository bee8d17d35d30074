"""Files and devices that nobody has seen: other models, cards, kernels and precisions. Never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.check import check_file
from profiles.named import NEEDED, device_described, device_named, model_named
from profiles.program import main

IGNORED = ("an extrapolation", "in sample", "qk_norm left out", "unit=us")
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{text}") for text in IGNORED]
L40S = ("device.peak_flops=362e12", "device.memory_bandwidth_bytes_s=864e9", "device.sms=142")
DEVICES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "device").glob("*.yaml"))


def gemm(rng: np.random.Generator) -> pd.DataFrame:
    m, n, k = (2 ** rng.integers(0, 13, 40) for _ in range(3))
    return pd.DataFrame({"m": m, "n": n, "k": k}).drop_duplicates()


def context(rng: np.random.Generator) -> pd.DataFrame:
    rows = {"batch_size": rng.integers(1, 64, 40), "isl": rng.integers(1, 9000, 40)}
    group = 2 ** rng.integers(0, 4, 40)
    rows |= {
        "num_heads": group * 8,
        "num_key_value_heads": 8,
        "head_dim": rng.choice([64, 80, 96, 128, 256], 40),
    }
    return pd.DataFrame(rows | {"window_size": rng.choice([0, 128, 4096], 40)})


def generation(rng: np.random.Generator) -> pd.DataFrame:
    return context(rng).rename(columns={"isl": "step"}).drop(columns="window_size")


def nccl(rng: np.random.Generator) -> pd.DataFrame:
    rows = {"op_name": rng.choice(["all_reduce", "all_gather", "alltoall", "reduce_scatter"], 40)}
    rows |= {"nccl_dtype": "half", "num_gpus": rng.choice([2, 4, 8, 16], 40)}
    return pd.DataFrame(rows | {"message_size": 2 ** rng.integers(5, 28, 40)}).drop_duplicates()


def custom(rng: np.random.Generator) -> pd.DataFrame:
    rows = {"num_gpus": rng.choice([2, 4, 6, 8], 40), "message_size": 2 ** rng.integers(5, 26, 40)}
    return pd.DataFrame(rows | {"backend": "somebody_graph"}).drop_duplicates()


def operators(rng: np.random.Generator) -> pd.DataFrame:
    """A model without a gate and without rotary embeddings, whose column for them is there and empty."""
    tokens = np.arange(1, 41) ** 2
    rows = {"n_head": 48, "n_kv_head": 4, "n_embd": 6144, "n_expanded_embd": 24576, "vocab_size": 49152}
    rows |= {"num_tokens": tokens, "num_tensor_parallel_workers": rng.choice([1, 2, 4], 40)}
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "mlp_act", "add")
    rows |= {f"time_stats.{name}.median": 0.01 + 1e-4 * tokens for name in names}
    return pd.DataFrame(rows | {"use_gated_mlp": False, "time_stats.attn_rope.median": np.nan})


def dense(rng: np.random.Generator) -> pd.DataFrame:
    layers = (
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "layernorm",
        "rotary_emb",
        "act_fn",
        "qk_norm",
    )
    return pd.DataFrame([{"layer": name, "tokens": n} for name in layers for n in (1, 16, 700)])


def attention(rng: np.random.Generator) -> pd.DataFrame:
    points = [(c, b, n, k) for c in (0, 64) for b in (0, 512) for n in (0, 8) for k in (0, 256)]
    points = [p for p in points if (p[0] or p[2]) and bool(p[2]) == bool(p[3]) and (p[0] or not p[1])]
    return pd.DataFrame(points, columns=["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"])


FILES = (gemm, context, generation, nccl, custom, operators, dense, attention)
Make = Callable[[np.random.Generator], pd.DataFrame]


def write(path: Path, frame: pd.DataFrame, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    time = "time_us" if {"layer", "prefill_chunk"} & set(frame) else "latency"
    if not any(str(name).startswith("time_stats") for name in frame):
        frame = frame.assign(**{time: rng.uniform(0.01, 5.0, len(frame))})
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("make", FILES)
@pytest.mark.parametrize("seed", range(3))
def test_every_layout_is_judged_on_every_device(make: Make, seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "unseen.csv", make(np.random.default_rng(seed)), seed)
    for name in DEVICES:
        for line in check_file(path, device_named(name), model_named("qwen2_5_14b"), 2):
            assert line.rows > 0 and 0 <= line.median <= line.p90 <= line.worst < np.inf, line


@pytest.mark.parametrize("make", FILES)
def test_a_card_known_by_its_datasheet_alone_is_enough(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "unseen.csv", make(np.random.default_rng(0)))
    links = ["device.link_bandwidth_bytes_s=32e9"] if make in (nccl, custom) else []
    assert main(["check", str(path), *L40S, *links, "model=llama_3_1_8b"]) == 0
    assert "described, roofline" in capsys.readouterr().out
    if links:
        assert main(["check", str(path), *L40S]) == 2
        assert "link_bandwidth_bytes_s of described must be above 0" in capsys.readouterr().err


def test_numbers_replace_those_of_a_named_device_and_keep_its_efficiencies() -> None:
    half = device_described("h200", {"memory_bandwidth_bytes_s": "2.4e12", "gemm_flops": "0.7"})
    own = device_named("h200")
    assert half.memory_bandwidth_bytes_s == own.memory_bandwidth_bytes_s / 2
    assert half.extras == {**own.extras, "gemm_flops": 0.7}


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({}, f"needs device.{NEEDED[0]}"),
        ({"peak_flop": "1e12"}, "device.peak_flop is not known; did you mean 'peak_flops'"),
        ({"peak_flops": "fast"}, "device.peak_flops must be a number, got 'fast'"),
        (
            {"peak_flops": "-1", "memory_bandwidth_bytes_s": "1", "sms": "1"},
            "peak_flops must be from 1e.08 to",
        ),
        ({"sms": "inf"}, "device.sms must be a whole number, got 'inf'"),
        ({"sms": "107.6"}, "device.sms must be a whole number, got '107.6'"),
    ],
)
def test_a_description_that_is_short_or_wrong_is_refused(numbers: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        device_described(None, numbers)


def test_a_device_file_from_elsewhere_is_taken(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "configs" / "device" / "l40s.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("l40s", "mine"))
    path = write(tmp_path / "unseen.csv", gemm(np.random.default_rng(0)))
    assert main(["check", str(path), f"device={tmp_path / 'mine.yaml'}"]) == 0


def test_products_that_the_corrections_were_fitted_at_are_said_to_be_in_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "m": [8, 8, 64, 3000, 8],
        "n": [4096, 4096, 1024, 4096, 4097],
        "k": [4096, 1024, 4096, 4096, 4096],
    }
    frame = pd.DataFrame(rows)

    def note(frame: pd.DataFrame, *settings_: str) -> str:
        assert main(["check", str(write(tmp_path / "rows.csv", frame)), *settings_]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "in sample: " in line]
        assert len(said) <= 1
        return said[0] if said else ""

    told = note(frame, "device=a100_80gb")
    assert "in sample: 3 of 5 products" in told and "profiles/tables/a100_80gb-gemm.json" in told
    assert "n or k held out 3.7 % median, 13.0 % p90" in told
    assert "profiles/tables/h200-gemm.json" in note(frame, "device=h100", "gemm=table")
    assert note(frame[3:], "device=a100_80gb") == "", "off the grid"
    assert note(frame, "device=a100_80gb", "gemm=curve") == "", "not corrected"
    assert note(frame, "device=l40s") == "", "has no corrections"


def test_constants_of_another_card_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "unseen.csv", gemm(np.random.default_rng(0))))
    for settings_, says in (
        (["device=l40s"], "l40s, an extrapolation: constants measured on a100_80gb and h200 (gemm)"),
        (["device=h100"], "h100, an extrapolation: constants measured on h200 (gemm)"),
        (["device=h200", "device.sms=100"], "h200 with other numbers, an extrapolation"),
        ([*L40S, "device.architecture=hopper"], "described, an extrapolation: constants measured on h200"),
    ):
        assert main(["check", path, *settings_]) == 0
        assert says in capsys.readouterr().err
    collectives = str(write(tmp_path / "collectives.csv", nccl(np.random.default_rng(0))))
    assert main(["check", collectives, "device=l40s"]) == 0
    assert "a100_80gb and h200, latencies from NCCL's own tuning table (nccl)" in capsys.readouterr().err
    prompts = str(write(tmp_path / "prompts.csv", context(np.random.default_rng(0))))
    assert main(["check", prompts, "device=l40s"]) == 0
    cards = "constants measured on rtx_4090 and a100_80gb (attention, decode)"
    assert f"not fitted to measurements of l40s, an extrapolation: {cards}" in capsys.readouterr().err
    assert main(["check", prompts, "device=rtx_4090"]) == 0
    told = f"only in part fitted to measurements of rtx_4090, the rest an extrapolation: {cards}"
    assert told in capsys.readouterr().err
    assert main(["check", prompts, "device=rtx_4090", "device.sms=100"]) == 0
    assert "not fitted to measurements of rtx_4090 with other numbers, an ext" in capsys.readouterr().err
    assert main(["check", path, "device=h200"]) == 0
    assert "an extrapolation" not in capsys.readouterr().err


def test_what_a_file_says_besides_changes_nothing(tmp_path: Path) -> None:
    """Columns in another order, others beside them, decodes that say their one token."""
    for make in (gemm, context, generation):
        frame = make(np.random.default_rng(0)).drop_duplicates()
        more = frame[list(frame.columns)[::-1]].assign(framework="any", power=1.0)
        if make is generation:
            more = more.assign(isl=1)
        spec = device_named("h200")
        plain = check_file(write(tmp_path / "plain.csv", frame), spec, None, 1)
        other = check_file(write(tmp_path / "more.csv", more), spec, None, 1)
        assert [(line.name, line.rows, line.median) for line in plain] == [
            (line.name, line.rows, line.median) for line in other
        ]


def test_an_operator_profile_may_have_a_single_operator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = operators(np.random.default_rng(0))
    keep = [name for name in frame if not str(name).startswith("time_stats") or "mlp_up_proj" in name]
    lines = check_file(write(tmp_path / "one.csv", frame[keep]), device_named("h100"), None, 1)
    assert [line.name for line in lines] == ["mlp_up_proj"], "and no layer without the other products"
    none = write(tmp_path / "none.csv", frame[[name for name in keep if "mlp_up_proj" not in name]])
    assert main(["check", str(none), "device=h100"]) == 2
    assert "row 0 (header): no column with times; allowed: some of time_stats.attn_pre_proj" in (
        capsys.readouterr().err
    )


def test_rows_of_other_precisions_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = gemm(np.random.default_rng(0)).assign(gemm_dtype="bfloat16")
    both = pd.concat([half, half.assign(gemm_dtype="fp8")])
    assert main(["check", str(write(tmp_path / "both.csv", both)), "device=l40s"]) == 0
    assert (
        f"note: {tmp_path}/both.csv: {len(half)} rows of another gemm_dtype left out"
        in capsys.readouterr().err
    )
    assert (
        main(["check", str(write(tmp_path / "fp8.csv", half.assign(gemm_dtype="fp8"))), "device=l40s"]) == 2
    )
    assert "gemm_dtype is fp8 in every row" in capsys.readouterr().err


def test_kernels_that_were_compared_are_rows_of_their_own(tmp_path: Path) -> None:
    one = gemm(np.random.default_rng(0))
    both = pd.concat([one.assign(kernel_source=name) for name in ("library", "compiled")])
    lines = check_file(write(tmp_path / "both.csv", both), device_named("l40s"), None, 1)
    assert lines[0].rows == 2 * len(one)


def test_a_cards_profile_needs_its_model_and_layers_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "dense.csv", dense(np.random.default_rng(0)))
    assert main(["check", str(path), "device=rtx_4090"]) == 2
    assert "it needs model=NAME" in capsys.readouterr().err
    strange = write(tmp_path / "moe.csv", pd.DataFrame({"layer": ["moe"], "tokens": [1]}))
    assert main(["check", str(strange), "device=rtx_4090", "model=llama_3_1_8b"]) == 2
    assert "no layer in it is known; known: act_fn" in capsys.readouterr().err


@given(
    make=st.sampled_from(FILES),
    column=st.integers(0, 9),
    value=st.sampled_from(["", "x", "-3", "nan", "inf", "0"]),
)
@pytest.mark.filterwarnings("ignore:.*left out")
@settings(max_examples=60)
def test_a_broken_cell_is_one_line_or_harmless(
    make: Make, column: int, value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = make(np.random.default_rng(1)).astype(object)
    name = frame.columns[column % len(frame.columns)]
    frame.loc[frame.index[1], name] = value
    path = write(tmp_path_factory.mktemp("broken") / "broken.csv", frame)
    said = ""
    try:
        check_file(path, device_named("l40s"), model_named("llama_3_1_8b"), 1)
    except ValueError as error:
        said = str(error)
    assert not said or ("broken.csv" in said and "\n" not in said)


def test_the_cards_own_constants_meet_its_profile(data: Path) -> None:
    """In sample for the 4090; an A100's constants alone find its chunks after a context, which nothing fits."""
    folder = data / "vllm-runs" / "kernel-profile-RTX4090"
    spec, shape = device_named("rtx_4090"), model_named("llama_3_1_8b")
    own = {
        line.name: line
        for file in ("dense", "attention")
        for line in check_file(folder / f"{file}.csv", spec, shape, 1)
    }
    assert own["whole layer"].median < 0.05
    after = "context attention after a context"
    assert own[after].median < 0.05 and own[after].p90 < 0.20
    both = own["both in one kernel"]
    assert both.median < 0.08 and both.p90 < 0.20 and abs(both.bias) < 0.05
    names = ("peak_flops", "memory_bandwidth_bytes_s", "sms", "vector_flops", "clock_hz")
    plain = device_described(None, {name: str(getattr(spec, name)) for name in names})
    borrowed = {line.name: line for line in check_file(folder / "attention.csv", plain, shape, 1)}
    assert borrowed[after].median < 0.10 and abs(borrowed[after].bias) < 0.05
