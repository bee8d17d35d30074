"""`coserve finetune` and `coserve generate` on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import codecs
import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from engine import training, training_log
from engine.config import read_config
from engine.datasets import read_dataset
from engine.generate import main as generate
from engine.lora import new_adapter, read_adapter, write_adapter
from engine.text import read_text
from engine.tokenizer import prompt_tokens
from engine.training import main as finetune
from sim.cli import main as coserve
from sim.core.specs import LoraSpec
from tests.engine.tiny import log_of, without_notes

QUESTION, ANSWER = "When does the water come?", "It always comes."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ROWS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": TURNS},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "text": {"text": ANSWER},
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", list(ROWS))
def test_a_format_is_known_by_its_columns_and_trains_on_the_answer(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.jsonl", [ROWS[kind]])
    (sample,) = read_dataset(path, tokenizer, cutoff_len=100).samples
    trained = tokenizer.decode(sample.tokens[sample.labels != -100])
    assert trained == f"{ANSWER}<|end|>"
    whole = tokenizer.decode(sample.tokens)
    expected = {"text": "", "prompt": QUESTION}.get(kind, f"<|user|>{QUESTION}<|end|><|assistant|>")
    assert whole == expected + trained
    (every,) = read_dataset(path, tokenizer, cutoff_len=100, train_on_prompt=True).samples
    assert (every.labels == every.tokens).all()


@pytest.mark.parametrize("kind", list(ROWS))
def test_a_conversation_needs_a_template_and_other_rows_do_not(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    path = write(tmp_path / "d.jsonl", [ROWS[kind]])
    if kind in ("text", "prompt"):
        assert len(read_dataset(path, bare, cutoff_len=100).samples) == 1
    else:
        with pytest.raises(
            ValueError, match=r"row 1: holds a conversation, .* rows of prompt and completion"
        ):
            read_dataset(path, bare, cutoff_len=100)


SPACED = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_an_answer_after_a_space_begins_with_the_token_that_has_both(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = copy.deepcopy(tokenizer)
    spaced.chat_template = SPACED
    turns = [CHAT[0], {"role": "assistant", "content": "the harbour waits"}] * 2
    path = write(tmp_path / "d.jsonl", [{"messages": turns}])
    (sample,) = read_dataset(path, spaced, cutoff_len=100).samples
    assert sample.tokens.tolist() == spaced.apply_chat_template(turns)["input_ids"]
    assert spaced.decode(sample.tokens[sample.labels != -100]) == " the harbour waits<|end|>" * 2
    monkeypatch.setattr(type(spaced), "is_fast", False)
    with pytest.raises(ValueError, match="row 1: a token is of a question and of its answer"):
        read_dataset(path, spaced, cutoff_len=100)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 1: the chat template changes earlier turns"):
        read_dataset(write(tmp_path / "d.jsonl", [{"messages": CHAT}]), forgetful, cutoff_len=100)


def test_a_row_ends_with_its_line_alone(tokenizer: Any, tmp_path: Path) -> None:
    path, text = tmp_path / "d.jsonl", "one" + chr(0x2028) + "more" + chr(0x85) + "end"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for _ in range(2)))
    samples = read_dataset(path, tokenizer, cutoff_len=100).samples
    assert [tokenizer.decode(s.tokens) for s in samples] == [f"{text}<|end|>"] * 2


HISTORY = [["Who keeps the clock?", "Marta."]]


def test_an_alpaca_row_has_a_system_text_and_a_history(tokenizer: Any, tmp_path: Path) -> None:
    row = ROWS["alpaca"] | {"input": "Say when.", "system": "Be short.", "history": HISTORY}
    path = write(tmp_path / "d.jsonl", [row])
    (sample,) = read_dataset(path, tokenizer, cutoff_len=100).samples
    earlier = "<|system|>Be short.<|end|><|user|>Who keeps the clock?<|end|><|assistant|>Marta.<|end|>"
    now = f"<|user|>{QUESTION}\nSay when.<|end|><|assistant|>{ANSWER}<|end|>"
    assert tokenizer.decode(sample.tokens) == earlier + now
    assert tokenizer.decode(sample.tokens[sample.labels != -100]) == f"Marta.<|end|>{ANSWER}<|end|>"


def test_an_alpaca_row_without_an_instruction_asks_its_input(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"instruction": "", "input": QUESTION, "output": ANSWER}])
    (sample,) = read_dataset(path, tokenizer, cutoff_len=100).samples
    assert tokenizer.decode(sample.tokens) == f"<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|>"


@pytest.fixture
def framing(tokenizer: Any) -> Any:
    """The tokenizer of a model whose texts begin and end with tokens of their own."""
    from tokenizers import processors

    framing = copy.deepcopy(tokenizer)
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", 3), ("<|end|>", 0)]
    )
    assert framing.decode(framing.encode("a")) == "<|system|>a<|end|>"
    return framing


@pytest.mark.parametrize("kind", ["text", "prompt", "alpaca"])
def test_a_sample_begins_and_ends_once(kind: str, framing: Any, tmp_path: Path) -> None:
    (sample,) = read_dataset(write(tmp_path / "d.jsonl", [ROWS[kind]]), framing, cutoff_len=100).samples
    asked = {"text": "<|system|>", "prompt": f"<|system|>{QUESTION}"}.get(
        kind, f"<|user|>{QUESTION}<|end|><|assistant|>"
    )
    assert framing.decode(sample.tokens) == f"{asked}{ANSWER}<|end|>"


@pytest.mark.parametrize("text", [QUESTION, "", "a", "a<|end|>"])
def test_a_prompt_is_not_ended(text: str, framing: Any) -> None:
    assert framing.decode(prompt_tokens(framing, text)) == f"<|system|>{text}"


def test_long_rows_are_cut_and_packed_ones_lose_nothing(tokenizer: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl", [ROWS["text"], {"text": "The harbour at Lowmouth has two clocks."}] * 3
    )
    whole = read_dataset(path, tokenizer, cutoff_len=1000)
    assert whole.note is None
    assert read_dataset(path, tokenizer, cutoff_len=1000, max_samples=2).samples[1] is not None
    assert len(read_dataset(path, tokenizer, cutoff_len=1000, max_samples=2).samples) == 2
    cut = read_dataset(path, tokenizer, cutoff_len=12)
    lengths = [min(12, len(s.tokens)) for s in whole.samples]
    assert [len(s.tokens) for s in cut.samples] == lengths and sum(n == 12 for n in lengths) == 3
    assert cut.note == f"{path}: 3 of 6 samples are longer than cutoff_len 12 and lose their end"
    packed = read_dataset(path, tokenizer, cutoff_len=9, packing=True)
    tokens = list(itertools.chain.from_iterable(s.tokens.tolist() for s in whole.samples))
    assert list(itertools.chain.from_iterable(s.tokens.tolist() for s in packed.samples)) == tokens
    assert all(len(s.tokens) == 9 for s in packed.samples[:-1])
    assert packed.note is None


def test_rows_without_an_answer_within_the_cutoff_are_left_out_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    long = {"prompt": "When does the water come? " * 20, "completion": ANSWER}
    path = write(tmp_path / "d.jsonl", [ROWS["prompt"], long])
    data = read_dataset(path, tokenizer, cutoff_len=40)
    assert len(data.samples) == 1
    assert data.note is not None and data.note.endswith(
        "1 of 2 samples are left out, with no token to train on"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"text": "fine"}', "{broken"], "row 2 is not JSON"),
        (['{"text": "fine"}', '{"text": 3}'], "row 2: text must be text, got 3"),
        (['{"words": "x"}'], "row 1: columns must include messages"),
        (['{"messages": [{"role": "cook", "content": "x"}]}'], "row 1: a turn must be of human"),
        (['{"messages": [{"role": "user", "content": "x"}]}'], "row 1: has no answer to train on"),
        (['{"messages": [{"role": ["user"], "content": "x"}]}'], "row 1: a turn must be of human"),
        (['{"text": "fine"}', '{"text": "half \\ud83d"}'], "row 2 is not JSON: half a surrogate pair"),
        (["[" * 10_000], "row 1 is not JSON: nested too deep"),
        (['{"instruction": "x", "output": "y", "history": [["x"]]}'], "row 1: history must be a list"),
        (['{"instruction": "x", "output": "y", "history": 0}'], "row 1: history must be a list"),
        (['{"instruction": "x", "output": "y", "input": 0}'], "row 1: input must be text, got 0"),
        (['{"instruction": "x", "output": "y", "system": []}'], "row 1: system must be text, got"),
        (
            ['{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}'],
            r"row 1: conversations cannot have tool_calls here, got \[\{\}\]",
        ),
        (
            ['{"conversations": [{"from": "gpt", "value": "x", "weight": 0}]}'],
            "row 1: conversations cannot have weight here, got 0",
        ),
        (
            ['{"instruction": "x", "output": "y", "tools": "[{}]"}'],
            "row 1: conversations cannot have tools here",
        ),
        (['{"messages": "x"}'], "row 1: messages must be a list of records"),
        (['["x"]'], "row 1 must be a record"),
        (["\udcff"], "is not UTF-8 at byte 0"),
        ([], "holds no rows"),
    ],
)
def test_a_malformed_row_is_named(rows: list[str], words: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(rows), errors="surrogateescape")
    with pytest.raises(ValueError, match=words) as error:
        read_dataset(path, tokenizer, cutoff_len=100)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "template fails on it: roles must alternate"),
        ("{% for %}", "template fails on it: Expected an expression"),
        ("{{ 1 / 0 }}", "template fails on it: division by zero"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(
    template: str, words: str, tokenizer: Any, tmp_path: Path
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = template
    path = write(tmp_path / "d.jsonl", [ROWS["messages"]])
    with pytest.raises(ValueError, match=f"row 1: the tokenizer's chat {words}"):
        read_dataset(path, strict, cutoff_len=100)


def test_a_template_that_writes_nothing_leaves_nothing_to_train_on(tokenizer: Any, tmp_path: Path) -> None:
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = ""
    path = write(tmp_path / "d.jsonl", [ROWS["messages"]])
    with pytest.raises(ValueError, match="no row has a token to train on"):
        read_dataset(path, silent, cutoff_len=100)


def test_a_byte_order_mark_is_no_part_of_a_dataset(tokenizer: Any, tmp_path: Path) -> None:
    plain = write(tmp_path / "d.jsonl", [ROWS["text"]])
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(codecs.BOM_UTF8 + plain.read_bytes())
    for sample, same in zip(
        *(read_dataset(path, tokenizer, cutoff_len=100).samples for path in (plain, marked)), strict=True
    ):
        assert sample.tokens.tolist() == same.tokens.tolist()
    assert read_text(marked) == plain.read_text()


def test_finetuning_lowers_the_loss_and_the_adapter_changes_what_is_generated(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert finetune(arguments) == 0
    assert re.fullmatch(r"out: 24 steps, loss \d\.\d{4}\n", capsys.readouterr().out)
    log = log_of(Path("out"))
    assert [row["step"] for row in log] == list(range(1, 25))
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert {p.name for p in Path("out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(3, 25, 3)}

    Path("p.txt").write_text("The harbour\nMarta keeps\n")
    common = [
        arguments[0],
        "device=cpu",
        "prompts=p.txt",
        "chat=false",
        "max_new_tokens=12",
        "ignore_eos=true",
    ]
    assert generate([*common, "adapter_name_or_path=out"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), "out").eval()
    for row, prompt in zip(rows, ("The harbour", "Marta keeps"), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        assert row["prompt"] == prompt and row["finish"] == "length" and row["tokens"] == 12
        assert row["output"] == tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(common) == 0
    plain = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    assert plain != [row["output"] for row in rows]


@pytest.mark.parametrize("row", ['{"text": 3}', "{broken"])
def test_a_malformed_row_stops_a_run_before_the_model_is_loaded(
    row: str, model_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights cannot be read, and nobody has tried."""
    shutil.copytree(model_folder, "model")
    Path("model/model.safetensors").write_bytes(b"")
    arguments = [*arguments, "model_name_or_path=model"]
    assert finetune([*arguments, "output_dir=other"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    with Path("d.jsonl").open("a") as file:
        file.write(row + "\n")
    assert finetune(arguments) == 2
    error = capsys.readouterr().err
    assert "d.jsonl: row 25" in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_long_samples_are_said_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune([*arguments, "cutoff_len=8", "max_steps=2"]) == 0
    error = capsys.readouterr().err
    assert error.count("note: d.jsonl: ") == 1 and "are longer than cutoff_len 8" in error


def test_samples_beyond_the_models_context_are_said(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune([*arguments, "packing=true", "cutoff_len=300", "max_steps=1"]) == 0
    beyond = "note: samples have up to 300 tokens, more than the model's context of 256; a smaller cutoff_len"
    assert beyond in capsys.readouterr().err
    assert finetune([*arguments, "cutoff_len=300", "max_steps=1", "output_dir=short"]) == 0
    assert "context" not in capsys.readouterr().err, "no sample is as long as it may be"


def test_a_row_of_the_log_stands_for_its_steps(arguments: list[str]) -> None:
    """The mean of their losses, as transformers logs it; warmup by ratio rounds up as there."""
    every = [*arguments, "warmup_ratio=0.22", "lr_scheduler_type=linear"]
    assert finetune([*every, "output_dir=each"]) == 0
    assert finetune([*every, "output_dir=fifth", "logging_steps=5"]) == 0
    each, fifth = log_of(Path("each")), log_of(Path("fifth"))
    assert [row["step"] for row in fifth] == [5, 10, 15, 20, 24]
    assert [row["epoch"] for row in fifth] == pytest.approx([n * 2 / 24 for n in (5, 10, 15, 20, 24)])
    losses = [row["loss"] for row in each]
    for row, steps in zip(fifth, (losses[n : n + 5] for n in range(0, 24, 5)), strict=True):
        assert row["loss"] == pytest.approx(sum(steps) / len(steps))
    shared = ("grad_norm", "learning_rate", "samples")
    assert [[row[key] for key in shared] for row in fifth] == [
        [each[row["step"] - 1][key] for key in shared] for row in fifth
    ]
    warmup = 6  # of 24 steps, 0.22 rounded up
    rates = [5e-3 * (n / warmup if n < warmup else (24 - n) / (24 - warmup)) for n in range(24)]
    assert [row["learning_rate"] for row in each] == pytest.approx(rates)


def test_a_loss_that_is_higher_at_the_end_is_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a resume too, of all rows."""
    add = training.TrainingLog.add

    def turned(log: training.TrainingLog, record: Any, *rest: Any) -> None:
        add(log, record._replace(loss=10.0 - record.loss), *rest)

    monkeypatch.setattr(training.TrainingLog, "add", turned)
    assert finetune(arguments) == 0
    losses = [row["loss"] for row in log_of(Path("out"))]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    told = f"out: the loss is higher at the end: mean {first:.4f} to step 3, {last:.4f} after step 21"
    assert capsys.readouterr().out.splitlines() == [f"out: 24 steps, loss {losses[-1]:.4f}", told]
    shutil.rmtree("out/checkpoint-24")
    assert finetune([*arguments, "resume=true"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [told]


@pytest.mark.parametrize("printed_s", [0.0, math.inf])
def test_without_a_terminal_the_job_and_its_course_are_lines(
    printed_s: float,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_log, "PRINTED_S", printed_s)
    own = ["val_size=4", "eval_steps=8", "logging_steps=3"]
    assert finetune([*arguments, *own, "max_steps=14"]) == 0
    job, memory, *course = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")
    ]
    assert job.startswith("out: 20 samples of ") and "14 steps of 2 samples, 7,424 trainable" in job
    assert job.endswith("float32 on cpu") and memory.startswith("memory: stash")
    steps = [int(line.split()[1]) for line in course]
    assert steps == ([3, 6, 8, 9, 12, 14, 14] if printed_s == 0 else [3, 8, 14, 14]), "also those measured"
    rows = log_of(Path("out"))
    last = next(row for row in rows if row["step"] == 14)
    assert course[-2].startswith(f"step 14 of 14: loss {last['loss']:.4g}, grad_norm ")
    assert course[-1].endswith(f"eval_loss {rows[-1]['eval_loss']:.4g}")
    assert finetune([*arguments, *own, "max_steps=14", "resume=true"]) == 0
    assert "14 steps of 2 samples (14 done)" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["d.jsonl", "d.jsonl/out", "/dev/null/out"])
def test_a_folder_that_cannot_be_is_told_by_its_key(
    folder: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "load_model", pytest.fail)
    assert finetune([*arguments, f"output_dir={folder}"]) == 2
    assert f"error: output_dir: {folder} cannot be written: " in capsys.readouterr().err


def test_tensorboard_gets_the_rows_of_the_log(arguments: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert finetune([*arguments, "report_to=tensorboard", "logging_steps=4"]) == 0
    events = EventAccumulator("out/runs")
    events.Reload()
    log = log_of(Path("out"))
    assert len(log) == 6
    for name in ("loss", "grad_norm", "learning_rate", "epoch"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log]
    assert all(event.value > 0 for event in events.Scalars("train/tok_s"))


def test_tensorboard_that_is_missing_is_told_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert finetune([*arguments, "report_to=tensorboard"]) == 2
    error = capsys.readouterr().err
    assert "pip install -c constraints.txt -e '.[tensorboard]'" in error and error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(("step", "told"), [(1, "no checkpoint yet (save_steps)"), (3, "checkpoint-2")])
@pytest.mark.parametrize(
    ("number", "code", "end"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_who_stops_a_training_is_told_what_it_goes_on_from(
    number: int,
    code: int,
    end: str,
    step: int,
    told: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add = training.TrainingLog.add

    def stopped(log: training.TrainingLog, record: Any, *rest: Any) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)
        add(log, record, *rest)

    monkeypatch.setattr(training.TrainingLog, "add", stopped)
    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    found = coserve(["finetune", *arguments, "save_steps=2"])
    signal.signal(signal.SIGINT, before)
    assert found == code
    note, last = capsys.readouterr().err.splitlines()[-2:]
    assert note.startswith("note: ") and note.endswith(told)
    assert last == f"coserve finetune: {end}"


def test_a_loss_that_is_no_number_ends_a_run_and_keeps_its_checkpoints(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["optim=sgd", "learning_rate=1.0e+37", "lr_scheduler_type=constant", "save_steps=1"]
    assert finetune([*arguments, *wild]) == 2
    error = capsys.readouterr().err
    assert "error: job out: step 2 gave loss" in error and "out has checkpoint-1" in error
    assert len(without_notes(error)) == 1
    assert {path.name for path in Path("out").iterdir()} == {"checkpoint-1", "trainer_log.jsonl"}
    assert [row["step"] for row in log_of(Path("out"))] == [1]


def test_runs_of_a_sweep_have_folders_of_their_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [*arguments, "-m", "max_steps=1", "lora_rank=2,4", "seed=1,2"]
    assert finetune(sweep) == 2
    written = "'output_dir=out/${lora_rank}-${seed}'"
    assert capsys.readouterr().err.endswith(f"need folders of their own, such as {written}\n")
    assert finetune([*sweep, written.strip("'")]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"2-1", "2-2", "4-1", "4-2"}


@pytest.mark.parametrize("given", ["q_proj,v_proj", "'q_proj, v_proj'", "[q_proj,v_proj]"])
def test_layers_may_be_listed_as_llamafactory_lists_them(given: str, arguments: list[str]) -> None:
    assert finetune([*arguments, "max_steps=1", f"lora_target={given}"]) == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_steps_are_counted_beyond_the_epochs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers, where max_steps stands instead of epochs; the rows come again in another order."""
    assert finetune([*arguments, "num_train_epochs=1", "max_steps=15"]) == 0
    assert "out: 15 steps, loss" in capsys.readouterr().out
    assert log_of(Path("out"))[-1]["epoch"] == 30 / 24


def test_an_adapter_says_its_dropout_and_its_scale(arguments: list[str]) -> None:
    assert finetune([*arguments, "max_steps=1", "lora_rank=4", "use_rslora=true", "lora_dropout=0.25"]) == 0
    for folder in ("out", "out/checkpoint-1"):
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.25)
        adapter = read_adapter(folder, read_config(arguments[0].partition("=")[2]).shape)
        assert (adapter.scale, adapter.dropout) == (8.0, 0.25)


REFUSED = {
    "model_name_or_path": ["3", "nowhere"],
    "dataset": ["3", "nowhere.jsonl", ""],
    "output_dir": ["3", ""],
    "resume": ["maybe"],
    "device": ["tpu"],
    "tp": ["0", "1.5"],
    "dtype": ["float16"],
    "seed": ["-1", "1.5"],
    "cutoff_len": ["-4", "1", "long"],
    "max_samples": ["0", "1.5"],
    "packing": ["2"],
    "train_on_prompt": ["answers"],
    "eval_dataset": ["3", "nowhere.jsonl", ".", ""],
    "val_size": ["-0.1", "1.5", "24", "1e300", ".nan", "all"],
    "eval_steps": ["0", "1.5", "3"],
    "lora_rank": ["0", "eight"],
    "lora_alpha": ["0", ".nan", "1e300"],
    "lora_target": ["[]", "[q_proj,qkv]", "3", "'q_proj,'"],
    "lora_dropout": ["1", "-0.1", ".nan", "some"],
    "use_rslora": ["2"],
    "gradient_accumulation_steps": ["0", "0.5"],
    "num_train_epochs": ["-1", "1.5"],
    "max_steps": ["0", "ten"],
    "optim": ["adam"],
    "adam_beta1": ["1", "-0.1", ".nan", "half"],
    "adam_beta2": ["1", "-0.1", ".nan"],
    "adam_epsilon": ["0", "1e-50", ".inf", ".nan"],
    "learning_rate": ["0", "-1e-4", ".inf", "1e300", "fast"],
    "weight_decay": ["-0.1", "1e300", "null"],
    "max_grad_norm": ["0", "-1"],
    "lr_scheduler_type": ["step"],
    "warmup_steps": ["-1", "2.5"],
    "warmup_ratio": ["-0.1", "1.1"],
    "logging_steps": ["0", "null"],
    "report_to": ["wandb"],
    "save_steps": ["0", "1.5"],
    "save_total_limit": ["0", "all"],
    "order": ["sideways"],
    "memory": ["swap", "recompute"],
}


def test_every_option_of_finetune_is_checked_and_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Too small, of the wrong kind, or unknown: one line that says which."""
    keys = set(OmegaConf.load(training.CONFIGS / "finetune.yaml")) - {"defaults", "hydra"}
    assert set(REFUSED) | {"policy"} == keys
    for key, values in REFUSED.items():
        for value in values:
            assert finetune([*arguments, f"{key}={value}"]) == 2, (key, value)
            error = capsys.readouterr().err
            assert key in error and error.count("\n") == 1, (key, value, error)
    serving = "policy._target_=sim.policies.inference_only.InferenceOnly"
    assert finetune([*arguments, serving]) == 2
    assert "policy must be one that finetunes, got InferenceOnly" in capsys.readouterr().err
    assert finetune([*arguments, "warmup_steps=2", "warmup_ratio=0.1"]) == 2
    assert "only one of warmup_steps and warmup_ratio" in capsys.readouterr().err
    for warm in ("warmup_steps=2", "warmup_ratio=0.1"):
        assert finetune([*arguments, warm, "lr_scheduler_type=constant"]) == 2
        told = "warmup_steps or warmup_ratio changes nothing with the schedule constant"
        assert told in capsys.readouterr().err
    assert finetune([*arguments, "val_size=2", "eval_dataset=d.jsonl"]) == 2
    assert "only one of eval_dataset and val_size" in capsys.readouterr().err
    assert finetune([*arguments, "optim=sgd", "adam_beta1=0.8"]) == 2
    assert "adam_beta1 changes nothing with optim=sgd" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model_name_or_path=nowhere", "model_name_or_path must be a folder with a Hugging Face model"),
        ("limits.kv_tokens=16", "p.txt: line 1 must have 1..15 tokens (limits.kv_tokens"),
        ("limits.max_sequence_tokens=9", "p.txt: line 1 must have 1..8 tokens"),
        ("limits.lookahead=2", " limits.lookahead must be 0 or 1, got 2"),
        ("limits.max_tokens=many", " limits.max_tokens must be a whole number, got 'many'"),
        (
            "policy._target_=sim.policies.finetune_only.FinetuneOnly",
            "policy must be one that serves, got FinetuneOnly",
        ),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("top_p=0", "top_p must be in (0, 1], got 0.0"),
        ("temperature=-1", "temperature must be at least 0"),
        ("top_k=3", "top_k and top_p change nothing with temperature=0"),
        ("top_p=0.5", "top_k and top_p change nothing with temperature=0"),
        ("+launch.streams=1", "launch.streams changes nothing here"),
        ("max_new_tokens=0", "max_new_tokens must be at least 1"),
        ("adapter_name_or_path=nowhere", "nowhere/adapter_config.json is missing"),
        ("prompts=nowhere", "nowhere does not exist"),
        ("prompts=", "prompts must be a file or null, got nothing"),
        (
            "limits.kv_tokens=1000000000000000",
            "limits.kv_tokens is 1,000,000,000,000,000: K/V pages of 1,000,000,000,000,000 tokens need "
            "238,418,579.1 GiB on a device, free are ",
        ),
        (
            "limits.kv_tokens=1000000000000000000",
            "limits.kv_tokens is 1,000,000,000,000,000,000: K/V pages of 1,000,000,000,000,000,000 tokens need "
            "238,418,579,101.6 GiB on a device, free are ",
        ),
        ("device=tpu", "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_a_mistake_in_generate_is_told_in_one_line(
    change: str, words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("The harbour at Lowmouth has two clocks, and only one of them is right. " * 2)
    assert generate([arguments[0], "prompts=p.txt", "chat=false", change]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", None, "model.safetensors is cut short or damaged"),
        ("model.safetensors", b"", "model.safetensors is cut short or damaged"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b'{"model_type": "llama"}', "config.json: vocab_size is missing"),
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b"{}", "its tokenizer cannot be read"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON"),
        (
            "generation_config.json",
            b'{"eos_token_id": [[1]]}',
            "eos_token_id must be a token or a list of tokens",
        ),
        ("adapter/adapter_model.safetensors", None, "adapter_model.safetensors is cut short or damaged"),
        ("adapter/adapter_config.json", b"{", "adapter_config.json is not JSON"),
        ("adapter/adapter_config.json", b'{"peft_type": "LORA"}', "adapter_config.json: r is missing"),
        ("p.txt", b"\xff", "p.txt is not UTF-8 at byte 0"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    file: str,
    content: bytes | None,
    words: str,
    arguments: list[str],
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`content` instead of it; None is its first half."""
    folder = Path("m")
    shutil.copytree(model_folder, folder)
    shape = read_config(folder).shape
    write_adapter(new_adapter(LoraSpec(rank=2), shape, torch.float32, "cpu", 0), folder / "adapter")
    (folder / "p.txt").write_text("The harbour\n")
    whole = (folder / file).read_bytes() if (folder / file).exists() else b""
    (folder / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    common = ["model_name_or_path=m", "device=cpu"]
    given = ["prompts=m/p.txt", "adapter_name_or_path=m/adapter", "chat=false", "max_new_tokens=2"]
    assert generate([*common, *given]) == 2
    error = capsys.readouterr().err
    assert words in error and f"m/{file}".rpartition("/")[0] in error and error.count("\n") == 1
    if file in ("model.safetensors", "tokenizer.json"):
        assert finetune([*arguments, *common]) == 2
        assert words in capsys.readouterr().err


def test_a_token_without_an_embedding_is_told_before_the_model_is_asked(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, "m")
    path = Path("m/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|beyond|>"}))
    Path("p.txt").write_text("The harbour <|beyond|>\n")
    told = "m: its tokenizer has a token 400, and its config.json a vocab_size of 400"
    assert finetune([*arguments, "model_name_or_path=m"]) == 2
    assert told in capsys.readouterr().err
    assert generate(["model_name_or_path=m", "prompts=p.txt", "chat=false"]) == 2
    assert told in capsys.readouterr().err


def test_a_prompt_must_leave_room_in_the_models_own_context(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The model was made for 256 positions, whatever the cache would hold."""
    Path("p.txt").write_text("The harbour\n\n" + "The harbour at Lowmouth has two clocks. " * 40)
    assert generate([arguments[0], "prompts=p.txt", "chat=false"]) == 2
    assert "p.txt: line 3 must have 1..255 tokens" in capsys.readouterr().err
    Path("p.txt").write_text("The harbour at Lowmouth has two clocks.\n")
    assert (
        generate([arguments[0], "prompts=p.txt", "chat=false", "ignore_eos=true", "max_new_tokens=999"]) == 0
    )
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert 200 < row["tokens"] < 256 and row["finish"] == "length"


def test_blank_lines_among_prompts_are_counted_in_a_note(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for text in ("The harbour\nTwo clocks\n\n \n", "\nThe harbour\n \nTwo clocks\n\n"):
        Path("p.txt").write_text(text)
        assert generate([arguments[0], "prompts=p.txt", "chat=false", "max_new_tokens=2"]) == 0
        out, err = capsys.readouterr()
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["The harbour", "Two clocks"]
        told.append(err)
    note = "note: p.txt: 2 of 4 lines are blank and have no answer; those of the others are in order\n"
    assert told == ["", note]


def test_generate_tells_answers_that_the_models_context_cuts(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("The harbour\nTwo clocks\n")
    own = [arguments[0], "prompts=p.txt", "chat=false", "ignore_eos=true"]
    assert generate([*own, "max_new_tokens=2"]) == 0
    assert capsys.readouterr().err == ""
    assert generate([*own, "max_new_tokens=1000"]) == 0
    out, err = capsys.readouterr()
    assert all(json.loads(line)["tokens"] < 256 for line in out.splitlines())
    assert err == (
        "note: 2 of 2 answers end before max_new_tokens=1000: a prompt and its answer have at most 256 tokens "
        "(limits.kv_tokens, limits.max_sequence_tokens, the model's own 256)\n"
    )


def test_generate_without_standard_input_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert generate(arguments[:1]) == 2
    assert capsys.readouterr().err == (
        "coserve generate: error: there is no prompt: standard input is closed, and prompts names no file\n"
    )


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_prompts_are_the_same_from_a_file_and_from_standard_input(
    mark: bytes,
    end: bytes,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of Windows, under a locale that is not UTF-8, on a system that leaves line ends as they are."""
    content = mark + end.join(line.encode() for line in ("The harbour", "\u6c34 clocks"))
    common = [arguments[0], "chat=false", "max_new_tokens=2"]
    Path("p.txt").write_bytes(content)
    assert generate([*common, "prompts=p.txt"]) == 0
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape", newline="\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    out = capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["The harbour", "\u6c34 clocks"]
    assert generate(common) == 0
    assert capsys.readouterr().out == out


def test_standard_input_that_is_not_utf_8_is_told_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"The\xff harbour\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate([arguments[0], "chat=false"]) == 2
    assert capsys.readouterr().err.endswith("error: prompts: standard input is not UTF-8 at byte 3\n")


def test_memory_auto_lets_the_free_memory_choose_the_plan(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune([*arguments, "memory=auto", "max_steps=2"]) == 0
    assert "memory: stash" in capsys.readouterr().err, "a tiny model fits whole"


@pytest.mark.parametrize(
    "given", [["limits.lookahead=0"], ["limits.lookahead=1", "temperature=0.8"], ["limits.max_sequences=1"]]
)
def test_prompts_whose_logits_are_no_numbers_are_told_and_the_others_answered(
    given: list[str],
    arguments: list[str],
    model_folder: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("p.txt").write_text("The harbour\nThe Zebra\nTwo clocks\n")
    common = ["prompts=p.txt", "chat=false", "max_new_tokens=4", "ignore_eos=true", *given]
    assert generate([arguments[0], *common]) == 0
    sound = capsys.readouterr().out.splitlines()
    shutil.copytree(model_folder, "m")
    tensors = load_file("m/model.safetensors")
    (letter,) = tokenizer.encode("Z")
    tensors["model.embed_tokens.weight"][letter] = math.nan
    save_file(tensors, "m/model.safetensors")
    assert generate(["model_name_or_path=m", *common]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [sound[0], sound[2]]
    assert err.startswith(
        "coserve generate: error: 1 of 3 prompts have no answer, the first is that of p.txt: line 2: its logits are "
        "not numbers; numbers in m are not finite"
    )
    assert err.count("\n") == 1


def test_an_adapter_that_holds_no_numbers_is_told(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = new_adapter(LoraSpec(rank=2), read_config(model_folder).shape, torch.float32, "cpu", 0)
    adapter.b["down_proj"][1, 3, 0] = math.inf
    write_adapter(adapter, "nowhere_finite")
    Path("p.txt").write_text("The harbour\n")
    assert generate([arguments[0], "adapter_name_or_path=nowhere_finite", "prompts=p.txt", "chat=false"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"numbers in {model_folder} or nowhere_finite are not finite, or too large for float32" in err
