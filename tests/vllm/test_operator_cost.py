"""The operator cost model: exact where it was measured, linear between, and additive over operators."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.core.work import Chunk, Work
from sim.cost.grid import AttentionGrid
from sim.cost.operators import (
    PRODUCTS,
    Curve,
    OperatorCost,
    OperatorProfile,
    Spread,
    as_one_chunk,
    padded_sizes,
)
from sim.cost.skew import Box, Skew

CHUNKS, CONTEXTS, COUNTS = (16, 64, 256), (0, 128, 512), (1, 8, 32)


def attention_s(chunk: float, before: float, decodes: float, context: float) -> float:
    """Linear in each axis, so that linear blending along each axis must give it everywhere."""
    return 1e-5 + 1e-8 * chunk * (before + 300) + 2e-9 * decodes * (context + 50)


def grid() -> AttentionGrid:
    points = {(0, 0, n, k): attention_s(0, 0, n, k) for n in COUNTS for k in (16, 128, 512)}
    points |= {(c, b, 0, 0): attention_s(c, b, 0, 0) for c in CHUNKS for b in CONTEXTS}
    points |= {
        (c, b, n, k): attention_s(c, b, n, k)
        for c in CHUNKS
        for b in CONTEXTS
        for n in COUNTS
        for k in (16, 128, 512)
        if n * k < 16000  # the largest corner does not fit the card
    }
    return AttentionGrid(points)


def profile(skew: Skew | None = None) -> OperatorProfile:
    names = ["embedding", "final_layernorm", "layernorm", "qkv_proj", "rotary_emb", "o_proj"]
    names += ["gate_up_proj", "act_fn", "down_proj"]
    dense = {name: Curve((1, 512), (1e-6 * i, 5e-5 * i)) for i, name in enumerate(names, 1)}
    heads = {"lm_head": Curve((1, 64), (1e-3, 2e-3)), "sampler": Curve((1, 64), (1e-5, 2e-5))}
    return OperatorProfile(dense=dense, per_sequence=heads, attention=grid(), skew=skew or Skew({}))


@pytest.mark.parametrize(
    "point", [(0, 0, 8, 128), (0, 0, 20, 300), (64, 128, 0, 0), (100, 200, 0, 0), (64, 0, 8, 16)]
)
def test_the_grid_is_linear_along_each_axis(point: tuple[int, int, int, int]) -> None:
    assert grid().at(*point) == pytest.approx(attention_s(*point), rel=1e-12)


def test_a_corner_that_was_not_measured_continues_the_line_below_it() -> None:
    assert grid().at(64, 128, 32, 512) == pytest.approx(attention_s(64, 128, 32, 512), rel=1e-9)
    assert grid().at(64, 128, 32, 2000) == pytest.approx(attention_s(64, 128, 32, 2000), rel=1e-9)


def test_no_kernel_is_shorter_than_the_shortest_measured() -> None:
    assert grid().at(0, 0, 1, 1) == grid().at(0, 0, 1, 16)
    assert grid().at(1, 0, 0, 0) == grid().at(16, 0, 0, 0)


def test_a_pass_is_its_layers_and_its_head() -> None:
    one, four = (OperatorCost(profile(), layers=n, max_tokens=512) for n in (1, 4))
    work = Work((Chunk(64, 128),), 8, 8 * 128, 9)
    once, often = one.parts(work), four.parts(work)
    assert often["attention"] == pytest.approx(4 * once["attention"])
    assert often["head"] == once["head"] == pytest.approx((1e-3 + 1e-5) * (1 + 8 / 63))
    per_layer = sum(i * (2 if i == 3 else 1) for i in range(3, 10))
    tokens_s = 1e-6 + (5e-5 - 1e-6) * 71 / 511  # far from the next measured count
    assert once["dense"] == pytest.approx((1 + 2 + per_layer) * tokens_s)
    assert often["dense"] == pytest.approx((1 + 2 + 4 * per_layer) * tokens_s)


def test_products_take_the_time_of_whole_tiles() -> None:
    curve = Curve((1, 64, 80, 512), (1e-6, 2e-6, 5e-6, 6e-6))
    assert [curve.at_tile(n) for n in (1, 64, 65, 80)] == [1e-6, 2e-6, 5e-6, 5e-6]
    assert curve.at_tile(300) == curve.at(300), "the next count is tiles away"
    assert curve.at_tile(600) == curve.at(600)
    names = ["embedding", "final_layernorm", "layernorm", "rotary_emb", "act_fn", *PRODUCTS]
    operators = profile()
    flat = Curve((1, 512), (1e-6, 1e-6))
    stepped = replace(operators, dense={name: curve if name in PRODUCTS else flat for name in names})
    cost = OperatorCost(stepped, layers=1, max_tokens=512)
    dense = [cost.parts(Work((Chunk(n, 0),)))["dense"] for n in (64, 65, 80)]
    assert dense[1] == dense[2] == pytest.approx(dense[0] + 4 * 3e-6)


@pytest.mark.parametrize("chunks", [(Chunk(100, 0),), (Chunk(30, 70), Chunk(5, 900)), (Chunk(9, 0),) * 6])
def test_one_chunk_stands_for_all_tokens_and_pairs(chunks: tuple[Chunk, ...]) -> None:
    tokens, before = as_one_chunk(chunks)
    assert tokens == sum(c.tokens for c in chunks)
    assert tokens * (before + (tokens + 1) / 2) == pytest.approx(sum(c.attention_pairs for c in chunks))


def test_a_chunk_of_one_token_costs_what_a_decode_costs() -> None:
    cost = OperatorCost(profile(), layers=2, max_tokens=512, decode_sizes=(16,))
    decode = cost.parts(Work((), 9, 8 * 100 + 50, 9))
    assert cost.parts(Work((Chunk(1, 50),), 8, 8 * 100, 9)) == decode
    mixed = cost.parts(Work((Chunk(64, 0),), 9, 8 * 100 + 50, 10))
    assert cost.parts(Work((Chunk(1, 50), Chunk(64, 0)), 8, 8 * 100, 10)) == mixed


def test_many_short_prompts_cost_less_than_one_long_one_and_more_than_one_of_them() -> None:
    cost = OperatorCost(profile(), layers=1, max_tokens=512)
    long, short, many = (
        cost.parts(Work(chunks))["attention"]
        for chunks in ((Chunk(256, 0),), (Chunk(64, 0),), (Chunk(64, 0),) * 4)
    )
    assert short <= many < long


def test_batches_are_padded_to_the_next_graph_and_no_further_than_the_last() -> None:
    assert padded_sizes((1, 4, 8), 10) == [0, 1, 4, 4, 4, 8, 8, 8, 8, 9, 10]
    cost = OperatorCost(profile(), layers=1, max_tokens=512, decode_sizes=(8,))
    decodes = [cost.parts(Work((), n, n * 100, n))["dense"] for n in (5, 8, 9)]
    assert decodes[0] == decodes[1] < decodes[2]
    mixed = [cost.parts(Work((Chunk(n, 0),)))["dense"] for n in (5, 8)]
    assert mixed[0] < mixed[1]


def test_unequal_decodes_cost_the_share_of_the_longest_that_the_profile_says() -> None:
    box = Box(32, 0.5, 1024, 0)
    cost = OperatorCost(profile(Skew({0: {box: (0.25, 3)}})), layers=1, max_tokens=512)
    work = Work((), 8, 8 * 200, 8)
    equal, all_long = cost.iteration_s(work), cost.iteration_s(work._replace(decode_context_tokens=8 * 500))
    assert cost.iteration_s(work, Spread(100, 500)) == pytest.approx(equal + 0.25 * (all_long - equal))
    assert cost.iteration_s(work, Spread(200, 200)) == equal


def test_finetuning_work_is_refused() -> None:
    with pytest.raises(ValueError, match="inference only"):
        OperatorCost(profile(), layers=1, max_tokens=512).iteration_s(Work(forward=(Chunk(8, 0),)))
