"""A replica on two and four processes is the replica on one: tokens, logits, gradients, adapters, files."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import engine.ranks
from engine.bench import main as bench
from engine.generate import main as generate
from engine.load import load_model
from engine.lora import Adapter, read_adapter, write_adapter
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.parallel import ALONE, Group, share_of
from engine.placement import Placement
from engine.ranks import RankFailed
from engine.replica import Replica, replica
from engine.sampling import Sampling
from engine.training import main as finetune
from sim.compile.compiler import Analysis, bypasses_of
from sim.compile.parallel import compositions
from sim.compile.peft import PeftSpec
from sim.core.plan import Limits, Policy
from sim.core.rows import Outcome
from sim.core.specs import DeviceSpec, ModelShape
from sim.results import read_run
from tests.engine.saved import save_model
from tests.engine.test_finetune_gradients import ALL, MODES, Splits, traffic
from tests.engine.test_inference import prompts_of
from tests.engine.tiny import (
    EngineRun,
    JobSetup,
    adapter_of,
    config_of,
    log_of,
    sample_of,
    tiny_model,
    tokens_of,
    twin,
)
from tests.engine.virtual import bench_on_a_virtual_clock
from tests.support import LinearCost, build_policy, limits_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelShape(name="tiny", layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=192, vocab=256)
GQA = ("llama", {})
"""Two key and value heads: each on two of four ranks."""
ODD = ("qwen2", {"kv_heads": 1, "vocab": 99})
"""A bias, one key and value head, tied embeddings and a vocabulary that nothing divides."""


# Those that start ranks of their own come first: a process leads one replica at a time.

# Programs


def test_a_tp_that_divides_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["model=tiny", "device=cpu", "model.tp=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "coserve bench: error: tp must divide heads 4, kv_heads 2 and ffn 192 of model tiny, got 3"
    ]


def test_a_bench_on_two_ranks_serves_every_request_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench_on_a_virtual_clock(monkeypatch)
    short = ["workload.duration_s=1.5", "run.drain_s=20", "measure_s=4", "policy=coserving_static"]
    short += ["model.layers=1", "limits.max_sequences=8", "limits.max_tokens=32"]
    short += ["job.sample_tokens=24", "job.accumulation=1", "job.optimizer.warmup_steps=0"]
    assert bench([*short, "model.tp=2", "hydra.run.dir=out"]) == 0
    run = read_run(Path("out"))
    assert run.summary["finished"] == run.summary["requests"] > 2
    assert len(run.table("steps")) > 0
    adapter = read_adapter("out/adapter", TINY)
    assert all(bool(b.abs().max() > 0) for b in adapter.b.values()), "every layer was trained"


def test_training_goes_on_from_one_rank_on_two_and_both_generate_the_same(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["max_steps=9", "val_size=4", "lora_dropout=0.1"]
    assert finetune([*arguments, "output_dir=whole"]) == 0
    shutil.copytree("whole/checkpoint-6", "out/checkpoint-6")
    assert finetune([*arguments, "resume=true", "tp=2"]) == 0
    for own, alone in zip(log_of(Path("out")), log_of(Path("whole"))[7:], strict=True):
        assert own == pytest.approx(alone, rel=1e-4)
    ours, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "whole"))
    assert ours.keys() == other.keys()
    assert max(error(ours[name], other[name]) for name in ours) < 1e-4
    state, other_state = (
        torch.load(f"{folder}/checkpoint-9/optimizer.pt")["state"] for folder in ("out", "whole")
    )
    assert all(state[n]["exp_avg"].shape == other_state[n]["exp_avg"].shape for n in other_state)

    Path("p.txt").write_text("The harbour\nMarta keeps\n")
    common = [arguments[0], "prompts=p.txt", "chat=false", "max_new_tokens=12", "ignore_eos=true"]
    capsys.readouterr()
    assert generate([*common, "adapter_name_or_path=out"]) == 0
    one = capsys.readouterr().out
    assert generate([*common, "adapter_name_or_path=out", "tp=2"]) == 0
    assert capsys.readouterr().out == one


def test_too_few_devices_are_one_line() -> None:
    count = torch.cuda.device_count()
    words = f"tp {count + 2} needs {count + 2} CUDA devices, this machine has {count}"
    with pytest.raises(ValueError, match=words), replica(count + 2, "cuda"):
        pass


# Failures


def fail_on_rank_one(device: torch.device, group: Group) -> Model:
    if group.rank == 1:
        raise ValueError("no weights here")
    return tiny_model("llama", group=group)


def add_up_with_rank_one() -> None:
    with replica(2, "cpu") as ranks:
        model = ranks.load(fail_on_rank_one)
        model.group.all_reduce(torch.ones(1))


def test_a_failing_rank_ends_all_with_its_own_words() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: ValueError: no weights here$"):
        add_up_with_rank_one()
    assert not ranks_left()


def sleep_while_rank_one_is_killed() -> None:
    """For a process of its own: nothing here needs the other rank, which goes."""
    engine.ranks.GRACE_S = 0.5
    with replica(2, "cpu"):
        (rank_one,) = multiprocessing.active_children()
        os.kill(rank_one.pid or 0, signal.SIGKILL)
        time.sleep(60)


def test_a_killed_rank_ends_a_leader_that_sleeps(tmp_path: Path) -> None:
    program = f"from tests.engine.{Path(__file__).stem} import sleep_while_rank_one_is_killed as run"
    guarded = f"{program}\nif __name__ == '__main__': run()"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", guarded], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not list(tmp_path.glob("coserve-*"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["coserve: error: rank 1 of 2 was killed by signal 9"]


def destroy_together() -> None:
    """In this process `destroy_process_group` waits for the other ranks from now on, as NCCL's does."""
    destroy = dist.destroy_process_group

    def together() -> None:
        dist.barrier()
        destroy()

    dist.destroy_process_group = together


def model_of_a_rank_that_waits(device: torch.device, group: Group) -> Model:
    if group.rank > 0:  # a process of its own
        destroy_together()
    return tiny_model("llama", group=group)


def test_ranks_give_up_their_group_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ranks, "GRACE_S", 0.5)
    monkeypatch.setattr(dist, "destroy_process_group", dist.destroy_process_group)
    with replica(2, "cpu") as ranks:
        ranks.load(model_of_a_rank_that_waits)
        destroy_together()
    assert not dist.is_initialized()
    assert not ranks_left()


def test_what_has_begun_is_given_up_where_the_other_ranks_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    destroy, abort = dist.destroy_process_group, dist.ProcessGroup.abort
    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda group: done.append("abort") or abort(group))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy") or destroy())
    with pytest.raises(KeyboardInterrupt), replica(2, "cpu"):
        raise KeyboardInterrupt
    assert done == ["abort", "destroy"]
    assert not dist.is_initialized()
    assert not ranks_left()


# Ranks that the tests below share


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Replica]:
    threads = torch.get_num_threads()
    with replica(request.param, "cpu") as started:
        yield started
    torch.set_num_threads(threads)
    assert not ranks_left(), "no process is left"


def ranks_left() -> list[str]:
    return [p.name for p in multiprocessing.active_children() if p.name.startswith("coserve-rank")]


class RanksRun(EngineRun):
    """A run on a replica; without one, in this process alone."""

    def __init__(self, ranks: Replica | None, *given: Any, **named: Any) -> None:
        self._ranks = ranks or Replica(ALONE, torch.device("cpu"))
        super().__init__(*given, **named)

    def _build(self, limits: Limits, adapters: Mapping[str, Adapter], jobs: Sequence[JobSetup]) -> None:
        self.engine, self.jobs = self._ranks.assemble(
            self.model,
            limits,
            [job.of() for job in jobs],
            adapters,
            lambda id, token: self.tokens[id].append(token),
        )
        self.trainers = list(self.engine.trainers.values())


def model_on(ranks: Replica | None, family: str, dtype: torch.dtype, changes: dict[str, int]) -> Model:
    if ranks is None:
        return tiny_model(family, dtype, **changes)
    return ranks.load(tiny_model, family, dtype, **changes)


def assert_same(own: EngineRun, alone: EngineRun, tolerance: float) -> None:
    """Plans, tokens, logits, steps, adapter and optimizer state; errors relative to the largest entry."""
    assert own.policy.plans == alone.policy.plans
    assert own.tokens == alone.tokens
    for id, rows in alone.logits.items():
        assert error(torch.stack(own.logits[id]), torch.stack(rows)) < tolerance
    assert len(own.engine.steps) == len(alone.engine.steps) > 0
    for step, other in zip(own.engine.steps, alone.engine.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=tolerance)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=10 * tolerance)
    trained = zip(own.engine.adapter("job").tensors(), alone.engine.adapter("job").tensors(), strict=True)
    for a, b in trained:
        assert error(a, b) < tolerance
    states = (run.engine.optimizer_state("job")["state"] for run in (own, alone))
    for mine, other in zip(*(state.values() for state in states), strict=True):
        for key, value in other.items():
            if value is not None:
                assert error(mine[key], value) < 10 * tolerance


def error(own: torch.Tensor, other: torch.Tensor) -> float:
    assert own.shape == other.shape
    return float((own - other).abs().max() / other.abs().max())


# Gradients


def gradient_run(ranks: Replica | None, case: tuple[str, Any], order: str, memory: str) -> RanksRun:
    """One step without clipping or moments: the adapter that comes out is the gradient, and nothing else."""
    family, changes = case
    job = JobSetup(
        samples=[sample_of(23, seed=1, ignored=6), sample_of(10, seed=2)],
        adapter=replace(adapter_of(family, 4, ALL, **changes), dropout=0.1),
        optimizer=OptimizerSettings(kind="sgd", learning_rate=1.0, max_grad_norm=None, schedule="constant"),
        order=order,
        memory=memory,
        max_tokens=24,
    )
    unit = 1 if order == "window_major" else config_of(family).shape.layers
    return RanksRun(
        ranks,
        model_on(ranks, family, torch.float64, changes),
        Splits([9, 5, 16], [11 * unit, 7 * unit]),
        limits_of(block_tokens=4, max_sequences=8, max_tokens=32),
        traffic(3, adapters=(None, "job")),
        jobs=[job],
    )


@functools.cache
def gradient_run_alone(family: str, order: str, memory: str) -> RanksRun:
    return gradient_run(None, GQA if family == "llama" else ODD, order, memory)


CASES = {
    2: [*((GQA, mode) for mode in MODES), (ODD, MODES[0])],
    4: [(GQA, MODES[0]), (ODD, MODES[2])],
}
"""By number of ranks."""


def test_gradients_on_ranks_equal_those_on_one(ranks: Replica) -> None:
    for case, mode in CASES[ranks.group.size]:
        alone, own = gradient_run_alone(case[0], *mode), gradient_run(ranks, case, *mode)
        assert own.trainers[0].masters.b["q_proj"].shape[1] * ranks.group.size == 64
        assert_same(own, alone, 1e-9)
        before = adapter_of(case[0], 4, ALL, **case[1])
        after = (run.engine.adapter("job").tensors() for run in (own, alone))
        for start, end, other in zip(before.tensors(), *after, strict=True):
            assert error(end - start, other - start) < 1e-9


def planned_run(ranks: Replica | None, targets: Sequence[str], share: float | None, mode: str) -> RanksRun:
    """One step with a plan along the list of its own number of ranks."""
    shape = replace(config_of("llama").shape, dtype_bytes=8)
    spec = PeftSpec(targets=tuple(targets), rank=4, alpha=8.0)
    tp = 1 if ranks is None else ranks.group.size
    plan = Analysis(shape, spec, seq_tokens=24, tp=tp, window_tokens=7).plan(mode, share)
    job = JobSetup(
        samples=[sample_of(23, seed=1)],
        adapter=adapter_of("llama", 4, targets),
        optimizer=OptimizerSettings(kind="sgd", learning_rate=1.0, max_grad_norm=None, schedule="constant"),
        accumulation=1,
        max_tokens=24,
        plan=plan,
    )
    model = model_on(ranks, "llama", torch.float64, {})
    run = RanksRun(ranks, model, Splits([9, 14], [11]), limits_of(block_tokens=4), {}, jobs=[job])
    assert run.trainers[0].plan == plan
    return run


def test_plans_that_run_again_do_so_on_ranks(ranks: Replica) -> None:
    """The far end makes everything again but the residual, whose all-reduce a rank never repeats."""
    for targets, share, mode in (
        (ALL, math.inf, "stash"),
        (("v_proj", "up_proj"), 0.2, "recompute"),
        (("down_proj",), None, "stash"),
    ):
        own, alone = (planned_run(on, targets, share, mode) for on in (ranks, None))
        before = adapter_of("llama", 4, targets)
        after = (run.engine.adapter("job").tensors() for run in (own, alone))
        for start, end, other in zip(before.tensors(), *after, strict=True):
            assert error(end - start, other - start) < 1e-9
        if share == math.inf:
            kept = {t.role for t in own.trainers[0].plan.tensors if t.action == "keep"}
            assert kept == {"x", "mid"}


# Serving and training


def served_run(ranks: Replica | None, dtype: torch.dtype, model: Model) -> RanksRun:
    """Preemption, chunks, three adapters and the base model in a batch, drawn and greedy tokens, three steps
    of AdamW with clipping, requests on versions that training publishes."""
    prompts = prompts_of(7, adapters=(None, "wide", "job", "narrow"))
    prompts[3] = (*prompts[3][:2], Sampling(temperature=0.8, top_k=40, seed=3))
    job = JobSetup(
        samples=[sample_of(9 + 4 * n, seed=n) for n in range(6)],
        adapter=adapter_of("llama", 4, ALL),
        optimizer=OptimizerSettings(learning_rate=1e-2, weight_decay=0.01, schedule="constant"),
        order="window_major",
        memory="recompute",
        max_tokens=32,
    )
    policy: Policy = build_policy(
        "coserving", predictor=LinearCost(forward_s=2.0**-9, backward_s=2.0**-10, optimizer_s=0.0)
    )
    run = RanksRun(
        ranks,
        model,
        policy,
        limits_of(kv_tokens=96, block_tokens=4, max_tokens=24, max_sequences=8, lookahead=1),
        prompts,
        adapters={
            "wide": adapter_of("llama", 8, ["q_proj", "v_proj", "down_proj"], seed=1),
            "narrow": adapter_of("llama", 3, ["k_proj", "o_proj", "gate_proj", "up_proj"], seed=2),
        },
        jobs=[job],
    )
    assert len(run.engine.steps) == 3
    assert all(step.grad_norm > 1.0 for step in run.engine.steps), "clipped by the norm of the whole"
    assert any(plan.preempted for plan in run.policy.plans)
    return run


@functools.cache
def served_alone(dtype: torch.dtype) -> RanksRun:
    return served_run(None, dtype, tiny_model("llama", dtype))


def test_serving_and_training_on_ranks_equal_those_on_one(ranks: Replica, tmp_path: Path) -> None:
    """In float32 on two: four round no worse, and are slow."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4))[: 4 // ranks.group.size]:
        folder = tmp_path / str(dtype)
        save_model(tiny_model("llama", dtype), folder)
        own = served_run(ranks, dtype, ranks.load(load_model, folder, dtype))
        assert_same(own, served_alone(dtype), tolerance)
        write_adapter(own.engine.adapter("job"), tmp_path / "own")
        write_adapter(served_alone(dtype).engine.adapter("job"), tmp_path / "alone")
        assert error(peft_logits(tmp_path / "own"), peft_logits(tmp_path / "alone")) < 1e-4


@pytest.mark.parametrize("lookahead", [0, 1])
def test_ranks_agree_that_a_step_is_spoilt(ranks: Replica, lookahead: int) -> None:
    """An entry of one rank's own share overflows; all keep the weights of before, and go on."""
    wild = OptimizerSettings(kind="sgd", learning_rate=3.4e38, max_grad_norm=None, schedule="constant")
    adapter = adapter_of("llama", 4, ALL)
    job = JobSetup(samples=[sample_of(9, seed=n) for n in range(6)], adapter=adapter, optimizer=wild)
    run = RanksRun(
        ranks,
        model_on(ranks, "llama", torch.float32, {}),
        build_policy("coserving", predictor=LinearCost(), budget_s=0.05),
        limits_of(block_tokens=4, max_tokens=24, max_sequences=8, lookahead=lookahead),
        prompts_of(4, adapters=(None, "job")),
        jobs=[job],
    )
    assert [failure.step for failure in run.engine.failures.values()] == [1]
    assert run.recorder.steps.arrays()["failed"].tolist() == [1]
    assert (run.recorder.requests.arrays()["outcome"] == Outcome.FINISHED).all()
    for now, before in zip(run.engine.adapter("job").tensors(), adapter.tensors(), strict=True):
        assert torch.equal(now, before)


def peft_logits(folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(twin("llama"), folder).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens_of(30, seed=5)])).logits


# Shares, without processes


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", [GQA, ODD], ids=["gqa", "odd"])
def test_a_rank_reads_and_draws_its_share_of_the_same_model(
    tp: int, case: tuple[str, Any], tmp_path: Path
) -> None:
    family, changes = case
    whole = tiny_model(family, **changes)
    save_model(whole, tmp_path)
    drawn = [tiny_model(family, group=Group(rank, tp), **changes) for rank in range(tp)]
    read = [load_model(tmp_path, torch.float32, "cpu", Group(rank, tp)) for rank in range(tp)]
    for models in (drawn, read):
        weights = [model.weights for model in models]
        assert torch.equal(torch.cat([w.embed for w in weights]), whole.weights.embed)
        assert torch.equal(torch.cat([w.head for w in weights]), whole.weights.head)
        for n, layer in enumerate(whole.weights.layers):
            own = [w.layers[n] for w in weights]
            assert torch.equal(torch.cat([w.o for w in own], 1), layer.o)
            assert torch.equal(torch.cat([w.down for w in own], 1), layer.down)
            halves = torch.cat([w.gate_up.chunk(2)[1] for w in own])
            assert torch.equal(halves, layer.gate_up.chunk(2)[1])
            shape = whole.config.shape
            per_rank, repeated = shape.q_dim // tp, max(1, tp // shape.kv_heads)
            assert torch.equal(torch.cat([w.qkv[:per_rank] for w in own]), layer.qkv[: shape.q_dim])
            rest = torch.cat([w.qkv[per_rank:].chunk(2)[0] for w in own[::repeated]])
            assert torch.equal(rest, layer.qkv[shape.q_dim :].chunk(2)[0])
            assert all(torch.equal(w.input_norm, layer.input_norm) for w in own)
            if layer.qkv_bias is not None:
                assert own[1].qkv_bias is not None
                assert torch.equal(own[1].qkv_bias[:per_rank], layer.qkv_bias[per_rank : 2 * per_rank])


LARGE = ModelShape(
    name="8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)
H100 = DeviceSpec(
    name="h100", peak_flops=989e12, memory_bandwidth_bytes_s=3.35e12, memory_bytes=80e9,
    link_bandwidth_bytes_s=450e9, sms=132, source="H100 datasheet",
)  # fmt: skip


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_adapters_lie_as_the_cheapest_composition_says(rank: int, tp: int) -> None:
    """Placement of A and B, and which gradients are reduced at the update."""
    spec = PeftSpec(method="lora", rank=rank, targets=ALL)
    plan = Analysis(LARGE, spec, seq_tokens=4096, device=H100, tp=tp, window_tokens=512).plan()
    for bypass, best in zip(plan.bypasses, bypasses_of(LARGE, spec), strict=True):
        cheapest = compositions(best, tp, 512, H100, 8 * 4096, 32)[0]
        placement = Placement(bypass, rank, Group(1, tp), LARGE)
        shares = (placement.a, placement.b)
        split = [{None: "R", 2: "Sin", 1: "Sout"}[share.dim] for share in shares]
        assert tuple(split) == cheapest.weights
        assert tuple(n for n, share in enumerate(shares) if share.reduced) == cheapest.reduced
        assert placement.plain and cheapest.collectives == ()


def test_what_a_rank_holds_is_what_the_memory_model_charges() -> None:
    """Weights and cached keys and values; norms are on every rank and counted as if split."""
    from sim.cost.memory import kv_bytes_per_token, weight_bytes

    for family, changes in (GQA, ODD):
        shape = replace(config_of(family, **changes).shape, dtype_bytes=4)
        for tp in (1, 2, 4):
            model = tiny_model(family, group=Group(0, tp), **changes)
            w = model.weights
            tensors = {t for layer in w.layers for t in layer if t is not None} | {w.embed, w.head, w.norm}
            norms = (2 * shape.layers + 1) * shape.hidden * (1 - 1 / tp)
            biases = 0.0
            if shape.qkv_bias:
                repeated = 2 * (share_of(shape, tp).kv_dim - shape.kv_dim / tp)
                biases = shape.layers * repeated
            uneven = model.vocab.stop - shape.vocab / tp
            rows = uneven * shape.hidden * (1 if shape.tied_embeddings else 2)
            expected = weight_bytes(shape, tp) + 4 * (norms + biases + rows)
            assert sum(t.nbytes for t in tensors) == pytest.approx(expected)
            pages = model.new_pages(1, 1)
            assert pages.k.nbytes + pages.v.nbytes == kv_bytes_per_token(shape, tp)
