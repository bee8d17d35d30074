"""Every config under configs/workload, slo and finetune composes, builds, and does what its keys say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from sim.checked import build as construct
from sim.core.finetune import Job
from sim.core.request import Slo
from sim.core.specs import ModelShape
from sim.workload.finetune import Finetune
from sim.workload.workload import Workload

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = Path(os.environ.get("COSERVE_DATA", Path(__file__).parents[3] / "shared" / "data"))
MODEL = ModelShape(name="tiny", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=1000)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COSERVE_DATA", str(DATA))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def node(*overrides: str) -> Any:
    group = overrides[0].split("=")[0]
    return compose(overrides=[f"+{overrides[0]}", *overrides[1:]])[group]


def build(*overrides: str, seed: int = 0, slo_names: tuple[str, ...] = ("default",)) -> Workload:
    return construct(None, node(*overrides), "workload").build(seed, slo_names)


NEEDS = {
    "azure_conv": "azure/AzureLLMInferenceTrace_conv.csv",
    "azure_code": "azure/AzureLLMInferenceTrace_code.csv",
    "mooncake": "mooncake/conversation_trace_head.jsonl",
    "burstgpt": "burstgpt/BurstGPT_1.csv",
}


@pytest.mark.parametrize("name", [n for n in names("workload") if n != "csv"])
def test_every_workload_builds_and_repeats(name: str) -> None:
    if name in NEEDS and not (DATA / NEEDS[name]).is_file():
        pytest.skip(f"{NEEDS[name]} is not here")
    first, second = build(f"workload={name}"), build(f"workload={name}")
    assert first.name == name
    assert first.duration_s > 0
    now_s = first.duration_s / 20
    assert list(first.arrivals().due(now_s)) == list(second.arrivals().due(now_s)) != []
    assert list(first.arrivals().due(now_s)) == list(first.arrivals().due(now_s))
    if first.table is not None:
        assert len(first.arrivals().due(first.duration_s)) == len(first.table)


@pytest.mark.parametrize("name", names("workload/lengths"))
def test_every_choice_of_lengths_builds(name: str) -> None:
    if name == "from_trace" and not (DATA / NEEDS["azure_conv"]).is_file():
        pytest.skip("the trace is not here")
    table = build("workload=poisson", f"workload/lengths={name}").table
    assert table is not None
    assert table.prompt_tokens.min() >= 1


def test_builtin_is_the_ten_minutes_of_the_figure_with_its_mean_lengths() -> None:
    config = node("workload=builtin")
    assert len(config.arrivals.rates) == 120
    assert np.mean(config.arrivals.rates) == pytest.approx(2.0, abs=0.02)
    table = build("workload=builtin").table
    assert table is not None
    assert (len(table), table.duration_s, table.rate_rps) == (4800, 600.0, 8.0)
    quarter = np.histogram(table.arrival_s, 4, (0, 600))[0]
    assert quarter[0] < 0.9 * quarter[1:].mean()
    builder = construct(None, config, "workload")
    tables = [builder.build(seed, ["default"]).table for seed in range(9)]
    prompt = np.concatenate([table.prompt_tokens for table in tables])
    output = np.concatenate([table.output_tokens for table in tables])
    assert abs(prompt.mean() - 240) < 4 * prompt.std() / np.sqrt(len(prompt))
    assert abs(output.mean() - 260) < 4 * output.std() / np.sqrt(len(output))


@pytest.mark.parametrize("name", ["builtin", "poisson", "gamma", "constant"])
def test_rate_is_one_key(name: str) -> None:
    table = build(f"workload={name}", "workload.rate_rps=3", "workload.duration_s=4000").table
    assert table is not None
    assert table.rate_rps == pytest.approx(3, rel=0.08)


def test_rate_and_duration_of_a_trace_are_exact() -> None:
    if not (DATA / NEEDS["azure_conv"]).is_file():
        pytest.skip("the trace is not here")
    whole = build("workload=azure_conv").table
    assert whole is not None
    stretched = build("workload=azure_conv", "workload.rate_rps=5")
    assert len(stretched.table) == len(whole) == 19_366
    assert stretched.table.rate_rps == pytest.approx(5, rel=1e-12)
    both = build(
        "workload=azure_conv", "workload.rate_rps=20", "workload.duration_s=600", "workload.start_s=100"
    )
    assert len(both.table) == 12_000
    assert both.duration_s == pytest.approx(600)
    first = int((whole.arrival_s < 100).sum())
    assert np.array_equal(both.table.prompt_tokens, whole.prompt_tokens[first : first + 12_000])
    cut = build("workload=azure_conv", "workload.duration_s=600", "workload.start_s=100").table
    inside = (whole.arrival_s >= 100) & (whole.arrival_s < 700)
    assert np.array_equal(cut.prompt_tokens, whole.prompt_tokens[inside])
    np.testing.assert_allclose(cut.arrival_s, whole.arrival_s[inside] - 100)
    with pytest.raises(ValueError, match=r"3.72 times too few .*workload.repeat=true"):
        build("workload=azure_conv", "workload.rate_rps=20", "workload.duration_s=3600")
    again = build(
        "workload=azure_conv", "workload.rate_rps=20", "workload.duration_s=3600", "workload.repeat=true"
    )
    assert len(again.table) == 72_000
    assert again.table.rate_rps == pytest.approx(20)
    short = build("workload=azure_conv", "workload.max_total_tokens=1000", "workload.max_requests=50").table
    assert (short.prompt_tokens + short.output_tokens).max() <= 1000
    assert len(short) == 50
    assert len(short.notes) == 1


def test_own_trace_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "my.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens,slo,adapter\n0,5,6,chat,\n1,7,8,batch,fr\n")
    workload = build("workload=csv", f"workload.file={file}", slo_names=("batch", "chat", "other"))
    requests = workload.arrivals().due(9.0)
    assert [(r.slo, r.adapter) for r in requests] == [("chat", None), ("batch", "fr")]
    assert workload.name == "my"
    told = r"my\.csv: row 2, column slo: no SLO class 'chat'; the slo config has batch, chatty; did you mean 'chatty'"
    with pytest.raises(ValueError, match=told):
        build("workload=csv", f"workload.file={file}", slo_names=("batch", "chatty"))
    empty = tmp_path / "empty.csv"
    empty.write_text("arrival_s,prompt_tokens,output_tokens,slo\n0,5,6,chat\n1,7,8,\n")
    requests_of = build("workload=csv", f"workload.file={empty}", slo_names=("default", "chat"))
    assert [r.slo for r in requests_of.arrivals().due(9.0)] == ["chat", "default"]
    with pytest.raises(
        ValueError, match=r"row 3, column slo: no SLO class 'default' \(as an empty cell is read\); the slo "
    ):
        build("workload=csv", f"workload.file={empty}", slo_names=("batch", "chat"))
    with pytest.raises(ValueError, match="states a class for each request"):
        build(
            "workload=csv", f"workload.file={file}", "workload.slo_mix={chat:1}", slo_names=("chat", "batch")
        )
    with pytest.raises(ValueError, match="states its adapters"):
        build(
            "workload=csv", f"workload.file={file}", "workload.adapters.count=2", slo_names=("chat", "batch")
        )
    with pytest.raises(ValueError, match=r"workload.file must be the path"):
        build("workload=csv")


def test_shares_of_classes_and_adapters_are_keys() -> None:
    workload = build(
        "workload=poisson",
        "workload.slo_mix={interactive:0.8,batch:0.2}",
        "workload.adapters.count=2",
        "workload.adapters.base_share=0.5",
        slo_names=("interactive", "batch"),
    )
    requests = workload.arrivals().due(600.0)
    n = len(requests)
    assert abs(sum(r.slo == "batch" for r in requests) - 0.2 * n) < 4 * np.sqrt(0.16 * n)
    assert abs(sum(r.adapter is None for r in requests) - 0.5 * n) < 4 * np.sqrt(0.25 * n)


def test_other_classes_move_neither_arrivals_nor_lengths_nor_adapters() -> None:
    def requests(*overrides: str, slo_names: tuple[str, ...]) -> list[tuple[object, ...]]:
        workload = build("workload=poisson", "workload.adapters.count=3", *overrides, slo_names=slo_names)
        due = workload.arrivals().due(600.0)
        return [(r.id, r.arrival_s, r.prompt_tokens, r.output_tokens, r.adapter) for r in due]

    one = requests(slo_names=("default",))
    assert one == requests("workload.slo_mix={chat:0.9,batch:0.1}", slo_names=("chat", "batch"))


@pytest.mark.parametrize("name", names("workload"))
def test_unknown_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigCompositionException):
        node(f"workload={name}", "workload.rate_rsp=5")


@pytest.mark.parametrize(
    "override",
    [
        "rate_rps=fast", "rate_rps=-1", "rate_rps=.nan", "start_s=-1", "duration_s=0", "repeat=maybe",
        "max_requests=1.5", "max_prompt_tokens=0", "adapters.count=-1", "adapters.base_share=2",
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_key(override: str) -> None:
    config = node("workload=azure_conv", f"workload.{override}")
    with pytest.raises(ValueError, match=rf"workload\.{override.split('=')[0]} must be"):
        construct(None, config, "workload")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("workload.start_s=60", "workload.start_s must be below .*, the end of a, got 60"),
        (
            "workload.max_prompt_tokens=10",
            "no requests as short as asked for; the shortest prompt has 20 tokens",
        ),
        ("workload.max_total_tokens=25", "no requests as short as asked for; .* the shortest request 27"),
    ],
)
def test_a_trace_of_which_nothing_is_left_says_what_there_is(
    tmp_path: Path, override: str, says: str
) -> None:
    (tmp_path / "a.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,20,7\n30,40,8\n")
    with pytest.raises(ValueError, match=says):
        build("workload=csv", f"workload.file={tmp_path / 'a.csv'}", override)


@pytest.mark.parametrize("name", names("slo"))
def test_every_slo_config_holds_classes_with_every_bound(name: str) -> None:
    config = compose(overrides=[f"+slo={name}", "+model.name=qwen2_5_14b"])
    assert config.slo.name == name
    classes = OmegaConf.to_container(config, resolve=True)["slo"]["classes"]
    assert classes
    for key, bounds in classes.items():
        assert set(bounds) == {"ttft_s", "tpot_s", "e2e_s"}
        slo = Slo(name=key, **bounds)
        assert min(slo.ttft_s, slo.tpot_s, slo.e2e_s) < float("inf")


@pytest.mark.parametrize(
    ("model", "tpot_s"), [("llama_3_1_8b", 0.045), ("qwen2_5_14b", 0.075), ("qwen2_5_32b", 0.075)]
)
def test_flexllm_bounds_follow_the_model_and_can_be_overridden(model: str, tpot_s: float) -> None:
    base = ["+slo=flexllm", f"+model.name={model}"]
    assert compose(overrides=base).slo.classes.default.tpot_s == tpot_s
    assert compose(overrides=[*base, "slo.classes.default.tpot_s=0.05"]).slo.classes.default.tpot_s == 0.05


def test_two_classes_are_shared_out_equally_unless_said() -> None:
    slo_names = tuple(compose(overrides=["+slo=two_classes"]).slo.classes)
    workload = build("workload=builtin", slo_names=slo_names)
    assert {r.slo for r in workload.arrivals().due(600.0)} == {"interactive", "batch"}


def finetune_of(*overrides: str) -> Finetune:
    """The node with `memory: auto` settled, as a plan would."""
    finetune: Finetune = construct(None, node(*overrides), "finetune")
    return replace(finetune, jobs={n: replace(j, memory="stash") for n, j in finetune.jobs.items()})


@pytest.mark.parametrize("name", names("finetune"))
def test_every_finetune_config_gives_jobs_that_the_core_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "lengths.json").write_text("[100, 9000, 300]")
    more = [f"finetune.jobs.file.data.file={tmp_path}/lengths.json"] if name == "file" else []
    finetune = finetune_of(f"finetune={name}", *more)
    specs, samples = finetune.specs(MODEL), finetune.samples(0)
    assert len(specs) == len(samples) == len(finetune.jobs) == {"none": 0, "two_jobs": 2}.get(name, 1)
    for spec in specs:
        lengths = samples[spec.id]
        assert spec.optimizer_params == finetune.lora.params(MODEL) == 4 * 16 * (64 + 128)
        assert all(1 <= tokens <= 8192 for tokens in islice(lengths, 100))
        assert Job(spec, lengths).sample_tokens > 0


def test_sky_t1_has_its_mean_length() -> None:
    [lengths] = finetune_of("finetune=sky_t1").samples(0).values()
    tokens = np.array(list(islice(lengths, 17_000)))
    assert abs(tokens.mean() - 3650) < 4 * tokens.std() / np.sqrt(len(tokens))
    assert tokens.max() <= 8192
