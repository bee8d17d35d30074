"""Placements of bypasses: the published candidates are there, the cheapest is chosen, and every legal
composition computes what the unsharded bypass does."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.compile.bypass import S1, Bypass, P, R, adapter_bypass, ia3_bypass, lora_bypass
from sim.compile.parallel import Composition, compositions
from sim.compile.placements import PUBLISHED, placement_table, print_placements
from sim.core.specs import DeviceSpec, ModelShape

A100 = DeviceSpec(
    name="a100", peak_flops=312e12, memory_bandwidth_bytes_s=2.0e12, memory_bytes=80e9,
    link_bandwidth_bytes_s=300e9, sms=108, source="A100 datasheet",
)  # fmt: skip
HIDDEN, FFN = 4096, 14336


def priced(bypass: Bypass, tp: int, tokens: int = 1024) -> list[Composition]:
    return compositions(bypass, tp, tokens, A100, 8 * tokens)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_published_candidates_of_a_column_parallel_layer_are_enumerated(rank: int, tp: int) -> None:
    found = {c.label: c for c in priced(lora_bypass("up_proj", HIDDEN, FFN, rank, False), tp)}
    assert {"1 4", "R>S1 2 P>R 4", "R>S0 3 3 S0>S1", "R>S0 3 S0>R 4"} <= set(found)
    assert found["1 4"].collectives == ()
    assert found["R>S1 2 P>R 4"].collectives[0] == "all_reduce"
    assert found["R>S0 3 3 S0>S1"].collectives == ("all_to_all", "all_to_all")
    assert found["R>S0 3 S0>R 4"].collectives[0] == "all_gather"


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_low_rank_partial_sums_fold_into_the_row_parallel_all_reduce(rank: int, tp: int) -> None:
    best = priced(lora_bypass("down_proj", FFN, HIDDEN, rank, True), tp)[0]
    if tp * rank <= 512:
        assert best.label == "2 5"
        assert best.weights == ("Sin", "R")
        assert best.collectives == ()
        assert best.reduced == (1,), "at the update only the gradient of B is reduced"


def test_bytes_of_a_collective_are_those_of_a_ring() -> None:
    """2+4 all-reduces the rank-r partials forward and again their gradient backward: 2 (p-1)/p of
    tokens * rank * 2 bytes each."""
    for tp in (2, 4, 8):
        found = {c.label: c for c in priced(lora_bypass("up_proj", HIDDEN, FFN, 16, False), tp)}
        expected = 2 * 2 * (tp - 1) / tp * 1024 * 16 * 2
        assert found["R>S1 2 P>R 4"].collective_bytes == pytest.approx(expected)


def test_redundant_computation_wins_small_windows_and_loses_large_ranks() -> None:
    """1+4 computes xA on every device and sends nothing; 2+4 and 3+4 split it and pay collectives. The
    first saves time while their latency is more than the work it repeats."""
    chosen = [
        priced(lora_bypass("up_proj", HIDDEN, FFN, rank, False), 8, tokens)[0].label
        for rank, tokens in ((8, 256), (256, 8192))
    ]
    assert chosen[0] == "1 4"
    assert chosen[1] in ("R>S1 2 P>R 4", "R>S0 3 S0>R 4")


def test_a_nonlinear_bypass_never_sees_partial_sums() -> None:
    for c in priced(adapter_bypass("o_proj", HIDDEN, 64, True), 4):
        assert all(s.before != P for s in c.steps if s.kind == "pointwise")


def test_tp_that_does_not_divide_the_features_is_refused() -> None:
    with pytest.raises(ValueError, match="tp must divide"):
        priced(lora_bypass("up_proj", 30, 50, 4, False), 4)


def test_one_device_needs_no_collective() -> None:
    for bypass in bypasses():
        assert priced(bypass, 1)[0].collectives == ()


def bypasses() -> list[Bypass]:
    return [
        lora_bypass("up_proj", 24, 40, 8, False),
        lora_bypass("down_proj", 40, 24, 8, True),
        adapter_bypass("o_proj", 24, 8, True),
        adapter_bypass("q_proj", 24, 8, False),
        ia3_bypass("k_proj", 24, S1),
        ia3_bypass("o_proj", 24, P),
        ia3_bypass("hidden", 24, R),
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_compositions_equal_the_unsharded_bypass_on_real_processes(processes: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plans = [(b, priced(b, processes, tokens=12)) for b in bypasses()]
    assert sum(len(found) for _, found in plans) > 60
    if processes > 2:  # the rest says nothing new and costs half a minute
        plans = [(b, [c for i, c in enumerate(f) if i < 6 or c.label in PUBLISHED]) for b, f in plans]
    torch.multiprocessing.spawn(_worker, args=(processes, plans, str(tmp_path)), nprocs=processes)
    assert len(list(tmp_path.glob("done-*"))) == processes


Plans = list[tuple[Bypass, list[Composition]]]


def _worker(rank: int, processes: int, plans: Plans, folder: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from tests.compile.composition import run_composition, unsharded

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=10),
    )
    generator = torch.Generator().manual_seed(0)
    for bypass, found in plans:
        weights = [
            torch.randn(
                (s.features_in, s.features_out) if s.kind == "linear" else (s.features_out,),
                generator=generator, dtype=torch.float64,
            )
            for s in bypass.stages
            if s.params
        ]  # fmt: skip
        x = torch.randn(12, bypass.stages[0].features_in, generator=generator, dtype=torch.float64)
        grad = torch.randn(12, bypass.stages[-1].features_out, generator=generator, dtype=torch.float64)
        expected = unsharded(bypass, weights, x, grad)
        for plan in found:
            error = run_composition(bypass, plan, weights, x, grad).error(expected)
            assert error < 1e-12, (bypass.name, plan.label, error)
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


def test_placement_table_shows_the_published_candidates_beside_the_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ModelShape(
        name="m", layers=32, hidden=HIDDEN, heads=32, kv_heads=8, head_dim=128, ffn=FFN, vocab=128256
    )
    rows = placement_table(model, A100, tokens=256, accumulation_tokens=8 * 4096)
    groups = {(r.layer, r.tp, r.rank) for r in rows}
    assert len(groups) == 2 * 3 * 4
    for layer, tp, rank in groups:
        group = [r for r in rows if (r.layer, r.tp, r.rank) == (layer, tp, rank)]
        named = {r.published for r in group} - {""}
        assert named == ({"1+4", "2+4", "3+3", "3+4"} if layer == "up_proj" else {"partial sums joined"})
        chosen = [r for r in group if r.chosen]
        assert len(chosen) == 1
        assert chosen[0].seconds == min(r.seconds for r in group)
    print_placements(rows[:4])
    assert "LoRA under tensor parallelism" in capsys.readouterr().out
