"""What `coserve reference` compares with is right: the same loss as PEFT, floors and operations as counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import reference, reference_iterations
from engine.assemble import TrainingJob, assemble_engine
from engine.config import ModelConfig
from engine.finetune import Sample
from engine.launching import Launching, LaunchSettings, SecondStream
from engine.lora import peft_tensors
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.reference import main
from engine.reference_iterations import (
    JOB,
    Memory,
    decode_floor_s,
    decode_times,
    finetune_times,
    forward_flops,
    place,
    prefill_times,
    stream_times,
)
from engine.reference_peft import SETUPS, Setup, hf_model, loss_of, peft_model
from engine.reference_rows import Row, compared
from engine.text import random_samples
from sim.assemble import CONFIGS as SIMULATOR
from sim.core.finetune import Backward, Forward, Step
from sim.core.plan import Limits, Plan
from sim.core.specs import LoraSpec
from tests.engine.test_streams import Device
from tests.engine.tiny import CONFIGS, adapter_of, tiny_model

SMALL = [
    "sizes.copy_bytes=65536",
    "sizes.product=64",
    "sizes.decode_sequences=[2]",
    "sizes.prefill_tokens=[16]",
    "sizes.window_tokens=16",
    "sizes.sample_tokens=24",
    "sizes.recompute_tokens=8",
    "sizes.long_sample_tokens=32",
]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("group", ["scale", "sizes"])
def test_every_device_has_its_sizes(group: str) -> None:
    engine = Path(reference.__file__).parent / "configs"
    devices = {path.name for folder in (engine, SIMULATOR) for path in (folder / "device").iterdir()}
    assert {path.name for path in (engine / group).iterdir()} == {*devices, "gpu.yaml"}


@pytest.mark.parametrize("targets", [ALL, ("down_proj",)], ids=["all", "down"])
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_and_engine_compute_the_same_loss_and_gradient(
    family: str, targets: tuple[str, ...], checkpointing: bool
) -> None:
    """On the same weights, adapter and sample; so their times are those of the same work."""
    from peft import set_peft_model_state_dict

    model, adapter = tiny_model(family), adapter_of(family, 4, targets)
    (sample,) = random_samples(1, 24, model.config.shape.vocab)
    loss, norm = _engine_step(model, adapter, sample)
    lora = LoraSpec(rank=4, alpha=adapter.alpha, targets=targets)
    made = peft_model(model, lora, Setup(checkpointing=checkpointing))
    set_peft_model_state_dict(made, dict(peft_tensors(adapter)))
    trained = [p for p in made.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == lora.params(model.config.shape)
    theirs = loss_of(made, sample, autocast=False)
    theirs.backward()  # type: ignore[no-untyped-call]
    their_norm = torch.linalg.vector_norm(
        torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    )
    assert theirs.item() == pytest.approx(loss, rel=1e-5)
    assert their_norm.item() == pytest.approx(norm, rel=1e-4)
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


def _engine_step(model: Model, adapter: Any, sample: Sample) -> tuple[float, float]:
    """Loss and gradient norm of one step on one sample, by the engine."""
    tokens = len(sample.tokens)
    job = TrainingJob(
        id=JOB,
        samples=[sample],
        max_sample_tokens=tokens,
        adapter=adapter,
        optimizer=OptimizerSettings(schedule="constant"),
        accumulation=1,
    )
    limits = Limits(kv_tokens=16, max_sequences=1, max_tokens=1, max_sequence_tokens=1)
    engine, _ = assemble_engine(model, limits, [job])
    back = Backward(JOB, tokens * model.config.shape.layers)
    for piece in (Forward(JOB, 10), Forward(JOB, tokens - 10), back, Step(JOB)):
        engine.launch(Plan(finetune=(piece,)))
        engine.collect()
    return engine.steps[0].loss, engine.steps[0].grad_norm


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_hugging_face_model_shares_the_engines_weights(family: str) -> None:
    model = tiny_model(family)
    own = {model.weights.layers[0].down.data_ptr(), model.weights.layers[0].qkv.data_ptr()}
    built = hf_model(model)
    assert own <= {parameter.data_ptr() for parameter in built.parameters()}
    assert sum(p.numel() for p in built.parameters()) == model.config.shape.params


@pytest.mark.parametrize("family", list(CONFIGS))
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """torch counts attention over all pairs, causal attention needs half of them."""
    model, tokens = tiny_model(family), 20
    shape = model.config.shape
    built = hf_model(model)
    built.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.zeros(1, tokens, dtype=torch.int64))
    above_diagonal = 4 * shape.layers * shape.q_dim * tokens * (tokens - 1) / 2
    # Some versions of transformers compute the angles of the rotary embedding as a product.
    angles = counter.get_total_flops() - forward_flops(shape, tokens, logits=tokens) - above_diagonal
    assert angles in (0, shape.head_dim * tokens)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_decode_must_read_every_weight_but_the_embedding_and_its_cache(family: str) -> None:
    model = tiny_model(family)
    w = model.weights
    tensors = [w.head, w.norm, *(t for layer in w.layers for t in layer if t is not None)]
    pages = model.new_pages(6, 16)
    read = sum(t.nbytes for t in tensors) + pages.k.nbytes + pages.v.nbytes
    shape = _in_float32(model.config)
    assert decode_floor_s(shape, 3, 32, 1e9) == pytest.approx(read / 1e9)


def _in_float32(config: ModelConfig) -> Any:
    from dataclasses import replace

    return replace(config.shape, dtype_bytes=4)


def test_placed_sequences_decode_at_their_context_and_do_not_run_out_of_room() -> None:
    model = tiny_model("llama")
    limits = Limits(kv_tokens=3 * 96, max_sequences=3, max_tokens=3, max_sequence_tokens=96)
    engine, _ = assemble_engine(model, limits)
    place(engine, 3, 40)
    spans = engine.tables.apply(Plan(decode=True)).decodes
    assert [span.context for span in spans] == [40, 40, 40]
    times = decode_times(model, 3, 40, 0.2)
    assert 0 < times.p20_s <= times.p50_s <= times.p80_s
    assert prefill_times(model, 30, 0.05).p50_s > 0


@pytest.mark.parametrize(
    "how", [Memory("layer_major", "stash", None), Memory("window_major", "recompute", 8)]
)
def test_a_sample_is_trained_whole_and_stepped(how: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = reference_iterations.run
    monkeypatch.setattr(
        reference_iterations, "run", lambda setup, plans: (seen.append(setup), run(setup, plans))[1]
    )
    finetune_times(tiny_model("llama"), LoraSpec(rank=2, targets=("o_proj",)), 20, how, 0.0)
    (setup,) = seen
    steps = len(setup.engine.steps)
    assert steps == setup.jobs[0].steps == 5
    assert setup.jobs[0].virtual_s == pytest.approx(steps * 2 * 20), "each token goes forward and back once"


@pytest.mark.parametrize("family", list(CONFIGS))
def test_backward_is_timed_beside_decodes_and_after_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Plan] = []
    run = reference_iterations.run

    def watched(setup: Any, plans: Any) -> Any:
        return run(setup, (seen.append(planned.plan) or planned for planned in plans))

    monkeypatch.setattr(reference_iterations, "run", watched)
    lora = LoraSpec(rank=2, targets=("o_proj", "down_proj"))
    model = tiny_model(family)
    assert stream_times(model, lora, 20, 3, 16, 0.0) == {}
    monkeypatch.setattr(LaunchSettings, "on", lambda *_: Launching(None, SecondStream(Device())))
    times = stream_times(model, lora, 20, 3, 16, 0.0)
    assert set(times) == {"after", "beside"}
    both = [plan for plan in seen if plan.decode]
    layers = model.config.shape.layers
    assert all(isinstance(plan.finetune[0], Backward) for plan in both)
    assert {plan.overlap for plan in both} == {False, True}
    backward = sum(plan.finetune[0].layer_tokens for plan in both)
    samples = sum(isinstance(piece, Forward) for plan in seen for piece in plan.finetune)
    assert backward == samples * 20 * layers


def test_the_command_writes_a_row_for_everything_and_missing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "prefill_times", too_large)
    assert main(["seconds=0.01", "out=found", *SMALL]) == 0
    rows = pd.read_parquet("found/reference.parquet")
    assert (Path("found") / "manifest.json").exists()
    kinds = {"ceiling", "decode", "prefill", "window", "fused", "streams", "finetune", "memory"}
    assert set(rows["what"]) == kinds
    (streams,) = rows[rows["what"] == "streams"].to_dict("records")
    assert streams["note"] == "one stream on cpu" and math.isnan(streams["ratio"])
    assert rows["peak_bytes"].isna().all(), "a CPU has no allocator that tells"
    lost = rows[rows["what"] == "prefill"].iloc[0]
    assert lost["note"] == "out of memory" and math.isnan(lost["p50_s"]) and math.isnan(lost["ratio"])
    timed = rows[(rows["note"] == "") & (rows["what"] != "prefill")]
    assert (timed["p20_s"] <= timed["p50_s"]).all() and (timed["p50_s"] <= timed["p80_s"]).all()
    out = capsys.readouterr().out
    assert "time to copy its bytes" in out and "target" not in out, "targets are those of a GPU"
    ours = rows[(rows["what"] == "finetune") & rows["variant"].str.contains("engine")]
    assert len(ours) == 4 and ours["ratio"].notna().all()


def test_pages_that_the_memory_does_not_hold_are_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_pages = Model.new_pages

    def scarce(model: Model, blocks: int, block_tokens: int) -> Any:
        if blocks > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return new_pages(model, blocks, block_tokens)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "new_pages", scarce)
    sizes = "sizes.decode_contexts=[32,512]"
    assert main(["seconds=0.01", "out=found", "parts=[decode,prefill]", *SMALL, sizes]) == 0
    rows = pd.read_parquet("found/reference.parquet").set_index("variant")
    assert rows.loc["2 x 512", "note"] == "out of memory"
    assert rows.loc[["2 x 32", "16"], "p50_s"].notna().all()


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_measurement_that_breaks_off_leaves_the_others(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise kind("an illegal address\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "window_times", broken)
    assert main(["seconds=0.01", "out=found", "parts=[window,prefill,peft]", *SMALL]) != 0
    assert {"prefill", "finetune"} <= set(pd.read_parquet("found/reference.parquet")["what"])
    assert (Path("found") / "manifest.json").exists()
    error = capsys.readouterr().err
    assert "Traceback" in error, "nothing says that it is not a mistake of the program"
    told = f"window all-linear: {kind.__name__}: an illegal address; window down_proj: {kind.__name__}"
    assert told in error.splitlines()[-1]


def test_ratios_are_against_the_same_adapter_and_what_did_not_fit_has_none() -> None:
    def row(what: str, variant: str, **known: Any) -> Row:
        return Row(what=what, variant=variant, **known)

    rows = compared(
        [
            row("finetune", "down_proj: engine + stash", tok_s=90.0),
            row("finetune", "all-linear: engine + stash", tok_s=50.0),
            row("finetune", f"down_proj: {SETUPS[1].name}", tok_s=60.0),
            row("finetune", f"all-linear: {SETUPS[1].name}", note="out of memory"),
            row("memory", "down_proj: engine + recompute", peak_bytes=20),
            row("memory", f"down_proj: {SETUPS[0].name}", peak_bytes=100),
        ]
    )
    assert [row.ratio for row in rows] == [1.5, None, None, None, 0.2, None]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("out=", "out must be a folder, got nothing"),
        ("parts=[decodes]", "parts must be some of"),
        ("seconds=0", "seconds must be above 0"),
        ("device=h200", "needs a CUDA device"),
        ("sizes.product=big", "sizes.product must be a whole number"),
        ("sizes.decode_sequences=[]", "sizes.decode_sequences must be at least 1, got ()"),
        ("sizes.long_sample_tokens=1", "sizes.long_sample_tokens must be at least 2, got 1"),
        ("rank=0", "rank must be above 0 and finite, got 0"),
        ("learning_rate=-1", "learning_rate must be above 0 and finite, got -1.0"),
        ("seconds=inf", "seconds must be above 0 and finite, got inf"),
    ],
)
def test_a_mistake_is_told_in_one_line(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("swept", "folder", "written"),
    [
        (["rank=8,16"], None, "'out=runs/reference/${rank}'"),
        (["rank=8,16", "alpha=1,2"], "r/${rank}", "'out=r/${rank}/${rank}-${alpha}'"),
        (["model=tiny,llama_3_1_8b", "rank=8,16"], "r", "'out=r/${hydra:job.num}'"),
        (["model=tiny,llama_3_1_8b"], "r/${model.name}", None),
        (["rank=8,16"], "a,b", "'out=a/${rank},b/${rank}'"),
        (["rank=8,16"], "a/${rank},b/${rank}", None),
        (["rank=8,16"], "${hydra:runtime.cwd}/r", "'out=${hydra:runtime.cwd}/r/${rank}'"),
        (["rank=8,16"], "r/${hydra:job.num}", None),
        (["rank=8"], "a,b", None),
        (["rank=8"], None, None),
    ],
)
def test_runs_of_a_sweep_have_folders_of_their_own(
    swept: list[str],
    folder: str | None,
    written: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", *swept, "seconds=0", *([] if folder is None else [f"out={folder}"])]
    assert main(sweep) != 0
    error = capsys.readouterr().err
    if written is None:
        assert "seconds must be above 0" in error, "it has begun"
    else:
        assert error.endswith(f"need folders of their own, such as {written}\n") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
