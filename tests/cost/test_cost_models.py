"""Noise, scale, fitted tables and the config group that joins them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.core.finetune import JobView
from sim.core.rows import WORK_COLUMNS, work_row
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.work import Chunk, LayerChunk, Work
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost
from sim.cost.iteration import IterationCost
from sim.cost.nnls import nnls
from sim.cost.noisy import BLOCK, Noisy
from sim.cost.roofline import Roofline
from sim.cost.sampled import Sampled, designed_works
from sim.cost.scaled import Scaled
from sim.cost.table import Table

CONFIGS = Path(__file__).parents[2] / "configs"
COSTS = sorted(path.stem for path in (CONFIGS / "cost").glob("*.yaml"))
DEVICES = sorted(path.stem for path in (CONFIGS / "device").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
SIZES = ("llama_3_1_8b", "qwen2_5_14b", "qwen2_5_32b", "llama_3_1_70b")
PAIRS = [(device, model) for device in DEVICES for model in MODELS if model in SIZES or device == "a100_80gb"]
"""Four sizes on every device, and every model on one."""
DECODE = Work(decode_count=32, decode_context_tokens=32_000, sampled_tokens=32)


def load(device: str, model: str, seed: int = 0, lookahead: int = 0) -> CostContext:
    spec = DeviceSpec(**OmegaConf.to_container(OmegaConf.load(CONFIGS / "device" / f"{device}.yaml")))
    shape = ModelShape(**OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{model}.yaml")))
    return CostContext(device=spec, model=shape, tp=shape.tp, lora=LoraSpec(), seed=seed, lookahead=lookahead)


HERE = load(DEVICES[0], MODELS[0])


def profile(folder: Path, context: CostContext) -> Path:
    """A measured profile, as the roofline would have measured it."""
    works = designed_works(context.model, context.lora.params(context.model), 400, 3)
    model = Roofline().build(context)
    columns = {name: values.tolist() for name, values in flat(works).items()}
    seconds = [model.iteration_s(work) for work in works]
    rows = pd.DataFrame({**columns, **dict.fromkeys(("seconds_p20", "seconds_p50", "seconds_p80"), seconds)})
    path = folder / "profile.csv"
    rows.drop_duplicates(WORK_COLUMNS).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_every_cost_config_builds_a_world_and_a_predictor(
    cost: str, device: str, model: str, tmp_path: Path
) -> None:
    config = OmegaConf.load(CONFIGS / "cost" / f"{cost}.yaml")
    assert set(config) == {"world", "predictor"}
    if cost == "table":
        config.world.of.path = config.predictor.of.path = str(profile(tmp_path, load(device, model)))
    world, predictor = (instantiate(config[slot]).build(load(device, model)) for slot in config)
    assert world is not predictor
    mean_s = np.mean([world.iteration_s(DECODE) for _ in range(200)])
    assert predictor.iteration_s(DECODE) == pytest.approx(mean_s, rel=0.15)


def test_the_default_predictor_can_be_made_twice_too_optimistic() -> None:
    config = OmegaConf.load(CONFIGS / "cost" / "roofline.yaml")
    right = instantiate(config.predictor).build(HERE)
    config.predictor.factor = 0.5
    wrong = instantiate(config.predictor).build(HERE)
    assert wrong.iteration_s(DECODE) == right.iteration_s(DECODE) / 2
    budget_s = 3 * right.iteration_s(DECODE)
    tokens, seconds = right.largest_forward(DECODE, 0, 8000, 2 * budget_s)
    assert wrong.largest_forward(DECODE, 0, 8000, budget_s) == (tokens, seconds / 2)


def test_noise_has_mean_one_and_the_stated_spread() -> None:
    spread, count = 0.2, 3 * BLOCK
    exact_s = Roofline().build(HERE).iteration_s(DECODE)
    noisy = Noisy(of=Roofline(), spread=spread).build(HERE)
    factors = np.array([noisy.iteration_s(DECODE) for _ in range(count)]) / exact_s
    assert factors.mean() == pytest.approx(1, abs=4 * spread / count**0.5)
    assert factors.std() == pytest.approx(spread, rel=0.05)
    assert abs(np.corrcoef(factors[1:], factors[:-1])[0, 1]) < 4 / count**0.5


def test_noise_follows_its_seeds_and_zero_is_a_seed() -> None:
    def sequence(context_seed: int, seed: int) -> list[float]:
        model = Noisy(of=Roofline(), spread=0.1, seed=seed).build(load(DEVICES[0], MODELS[0], context_seed))
        return [model.iteration_s(DECODE) for _ in range(5)]

    assert sequence(0, 0) == sequence(0, 0)
    streams = [sequence(0, 0), sequence(0, 1), sequence(1, 0), sequence(1, 1)]
    assert len({stream[0] for stream in streams}) == 4


def test_noisy_inverses_are_the_inner_models_and_parts_follow_the_last_draw() -> None:
    inner, noisy = Roofline().build(HERE), Noisy(of=Roofline(), spread=0.3).build(HERE)
    assert noisy.largest_forward(DECODE, 0, 4000, 0.05) == inner.largest_forward(DECODE, 0, 4000, 0.05)
    for _ in range(3):
        assert noisy.iteration_s(DECODE) == pytest.approx(sum(noisy.parts(DECODE).values()), rel=1e-12)
    silent = Noisy(of=Roofline(), spread=0.0).build(HERE)
    assert silent.iteration_s(DECODE) == inner.iteration_s(DECODE)


@given(factor=st.floats(0.01, 50), tokens=st.integers(1, 4000), layers=st.integers(1, 32))
@settings(max_examples=60)
def test_scaled_inverses_accept_exactly_their_own_time(factor: float, tokens: int, layers: int) -> None:
    scaled = Scaled(of=Roofline(max_tokens=4096), factor=factor).build(HERE)
    exact_s = scaled.iteration_s(DECODE._replace(forward=(Chunk(tokens, 100),)))
    n, seconds = scaled.largest_forward(DECODE, 100, 4096, exact_s)
    assert n >= tokens
    assert scaled.iteration_s(DECODE._replace(forward=(Chunk(n, 100),))) == seconds <= exact_s
    job = JobView("job", 32, "layer_major", "stash", 1, 900, 900, 0, False)
    exact_s = scaled.iteration_s(DECODE._replace(backward=(LayerChunk(layers, 900, 0),)))
    assert scaled.largest_backward(DECODE, job, exact_s) == (layers * 900, exact_s)


def test_nnls_finds_the_constrained_minimum() -> None:
    """Karush-Kuhn-Tucker: x >= 0, gradient >= 0, and zero where x > 0."""
    random = np.random.default_rng(5)
    for _ in range(20):
        a = random.random((40, 12)) - 0.3
        b = random.random(40)
        x = nnls(a, b)
        gradient = a.T @ (a @ x - b)
        assert (x >= 0).all()
        assert (gradient > -1e-8).all()
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8
    assert nnls(np.eye(3), np.array([1.0, -2.0, 3.0])).tolist() == pytest.approx([1, 0, 3])


def flat(works: list[Work]) -> dict[str, np.ndarray]:
    data = np.array([work_row(work) for work in works], dtype=np.float64)
    return {name: data[:, i] for i, name in enumerate(WORK_COLUMNS)}


def designed(rows: int, seed: int) -> list[Work]:
    return designed_works(HERE.model, HERE.lora.params(HERE.model), rows, seed)


def test_a_table_recovers_a_model_of_its_own_form() -> None:
    """Rows timed by a table are fitted by a table: the forms agree, so nearly no error is left."""
    teacher = Sampled(of=Roofline(), spread=0.0).build(HERE)
    works = designed(1500, 1)
    seconds = np.array([teacher.iteration_s(work) for work in works])
    fitted = Table.fit(flat(works), seconds).model()
    held_out = designed(400, 2)
    errors = [abs(fitted.iteration_s(w) / teacher.iteration_s(w) - 1) for w in held_out]
    assert np.median(errors) < 0.003
    assert np.quantile(errors, 0.9) < 0.01
    kappa = teacher.curves.overlap_contention
    assert fitted.curves.overlap_contention == pytest.approx(kappa, abs=0.02)


def test_the_contention_of_two_streams_is_found_behind_optimizer_steps() -> None:
    """Steps that take as long as the finetuning beside inference, in no other row with two streams."""
    curves = replace(Sampled(of=Roofline(), spread=0.0).build(HERE).curves, overlap_contention=0.6)
    teacher = IterationCost(curves)
    works = []
    for work in designed(1500, 1):
        if work.overlap:
            finetuning_s = teacher.iteration_s(work.finetuning._replace(overlap=False)) - curves.host_s
            work = work._replace(optimizer_params=round(finetuning_s / curves.optimizer_param_s))
        works.append(work)
    seconds = np.array([teacher.iteration_s(work) for work in works])
    fitted = Table.fit(flat(works), seconds)
    assert fitted.curves.overlap_contention == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_a_sampled_model_is_a_few_per_cent_off(device: str, model: str) -> None:
    context = load(device, model)
    truth, fitted = Roofline().build(context), Sampled(of=Roofline()).build(context)
    works = designed_works(context.model, context.lora.params(context.model), 500, 77)
    errors = np.array([fitted.iteration_s(w) / truth.iteration_s(w) - 1 for w in works])
    assert np.median(abs(errors)) < 0.03
    assert np.quantile(abs(errors), 0.9) < 0.10
    assert abs(np.median(errors)) < 0.01
    assert (errors != 0).mean() > 0.99, "independently fitted, so never exactly right"
    assert fitted.curves.host_s == pytest.approx(truth.curves.host_s, rel=0.3)


@pytest.mark.parametrize(("device", "model"), PAIRS)
def test_a_sampled_model_knows_what_few_tokens_after_a_long_context_wait_for(device: str, model: str) -> None:
    """Reading the keys, not the products; 32,768 of them are eight times what its rows had."""
    context = load(device, model)
    truth, fitted = Roofline().build(context), Sampled(of=Roofline()).build(context)
    for before, most in ((4096, 0.10), (32_768, 0.40)):
        window = Chunk(16, before)
        slices = [(LayerChunk(layers, *window),) for layers in (8, context.model.layers)]
        for work in (
            Work((window,), 4, 4000, 5),
            Work(forward=(window,)),
            *(Work(backward=chunks) for chunks in slices),
            Work(backward=slices[-1], recompute=(window,)),
        ):
            assert fitted.iteration_s(work) == pytest.approx(truth.iteration_s(work), rel=most)


def noisy_fits(rows: int) -> list[IterationCost]:
    """Tables of so many rows of the roofline with 5 % of noise."""
    truth, fits = Roofline().build(HERE), []
    for seed in range(20):
        works = designed(rows, seed)
        noise = np.exp(0.05 * np.random.default_rng(seed).standard_normal(rows))
        seconds = noise * [truth.iteration_s(work) for work in works]
        fits.append(Table.fit(flat(works), seconds).model())
    return fits


def test_a_few_rows_do_not_bend_a_curve() -> None:
    truth, works = Roofline().build(HERE), designed(200, 77)
    errors = [fit.iteration_s(w) / truth.iteration_s(w) - 1 for fit in noisy_fits(60) for w in works]
    assert np.quantile(np.abs(errors), 0.95) < 0.17


def test_passes_longer_than_any_row_go_on_by_more_than_the_last_few_rows() -> None:
    work = Work(prefill=(Chunk(8192, 0),), sampled_tokens=1)
    exact_s = Roofline().build(HERE).iteration_s(work)
    for fit in noisy_fits(200):
        assert fit.region["prefill_tokens"][1] < 8192
        assert fit.iteration_s(work) == pytest.approx(exact_s, rel=0.15)


def test_a_sampled_model_knows_the_loop_it_predicts() -> None:
    now = Sampled(of=Roofline()).build(HERE)
    ahead = Sampled(of=Roofline()).build(load(DEVICES[0], MODELS[0], lookahead=1))
    assert now.iteration_s(DECODE) == pytest.approx(ahead.iteration_s(DECODE) + ahead.curves.host_s)


def test_a_table_says_where_it_extrapolates() -> None:
    fitted = Sampled(of=Roofline()).build(HERE)
    assert isinstance(fitted, FittedCost)
    far = Work(decode_count=4000, decode_context_tokens=10**9, sampled_tokens=1)
    for work, columns in ((DECODE, []), (far, ["decode_count", "decode_context_tokens"])):
        values = zip(WORK_COLUMNS, work_row(work), strict=True)
        assert [n for n, v in values if not fitted.region[n][0] <= v <= fitted.region[n][1]] == columns


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [("seconds", 0.0, "row 3, column seconds"), ("decode_count", -1.0, "decode_count"),
     ("prefill_pairs", float("nan"), "row 3, column prefill_pairs")],
)  # fmt: skip
def test_bad_rows_are_refused_by_name(column: str, value: float, match: str) -> None:
    columns = flat(designed(120, 1))
    seconds = np.full(120, 0.01)
    (columns if column != "seconds" else {"seconds": seconds})[column][3] = value
    with pytest.raises(ValueError, match=match):
        Table.fit(columns, seconds)


def test_missing_columns_and_unequal_lengths_are_refused() -> None:
    columns = flat(designed(120, 1))
    with pytest.raises(ValueError, match="shape"):
        Table.fit(columns, np.full(7, 0.01))
    del columns["adapters"]
    with pytest.raises(ValueError, match="column adapters is missing"):
        Table.fit(columns, np.full(120, 0.01))
    alone = flat([DECODE._replace(overlap=True)] * 3)
    with pytest.raises(ValueError, match="without overlap"):
        Table.fit(alone, np.full(3, 0.01))


@pytest.mark.parametrize(
    ("builder", "values"),
    [(Noisy, {"spread": -0.1}), (Noisy, {"spread": 1.0}), (Noisy, {"spread": 0.1, "seed": -1}),
     (Scaled, {"factor": 0.0}), (Scaled, {"factor": float("nan")}), (Sampled, {"rows": 10}),
     (Sampled, {"spread": 2.0})],
)  # fmt: skip
def test_bad_settings_are_refused(builder: type, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=list(values)[-1]):
        builder(of=Roofline(), **values)


@pytest.mark.parametrize("values", [{"host_s": -1.0}, {"overlap_contention": 1.1}, {"max_tokens": 100}])
def test_bad_roofline_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Roofline(**values)
