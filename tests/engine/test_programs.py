"""`coserve finetune` and `coserve generate` on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import last_checkpoint
from engine.config import ModelConfig
from engine.datasets import read_samples
from engine.generate import main as generate
from engine.load import random_model, save_model
from engine.text import BUNDLED, read_text
from engine.training import main as finetune
from sim.core.specs import ModelShape

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random weights, a byte-pair tokenizer trained on the bundled text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([read_text(BUNDLED)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    shape = ModelShape(
        name="t",
        layers=2,
        hidden=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        ffn=48,
        vocab=400,
        max_context_tokens=256,
    )
    save_model(random_model(ModelConfig(family="llama", shape=shape), torch.float32, "cpu", 3, 0.1), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


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
    (sample,) = read_samples(path, tokenizer, cutoff_len=100)
    trained = tokenizer.decode(sample.tokens[sample.labels != -100])
    assert trained == f"{ANSWER}<|end|>"
    whole = tokenizer.decode(sample.tokens)
    expected = {"text": "", "prompt": QUESTION}.get(kind, f"<|user|>{QUESTION}<|end|><|assistant|>")
    assert whole == expected + trained
    (every,) = read_samples(path, tokenizer, cutoff_len=100, train_on_prompt=True)
    assert (every.labels == every.tokens).all()


def test_long_rows_are_cut_and_packed_ones_lose_nothing(tokenizer: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl", [ROWS["text"], {"text": "The harbour at Lowmouth has two clocks."}] * 3
    )
    whole = read_samples(path, tokenizer, cutoff_len=1000)
    assert [len(s.tokens) for s in read_samples(path, tokenizer, cutoff_len=5)] == [5] * 6
    packed = read_samples(path, tokenizer, cutoff_len=9, packing=True)
    tokens = list(itertools.chain.from_iterable(s.tokens.tolist() for s in whole))
    assert list(itertools.chain.from_iterable(s.tokens.tolist() for s in packed)) == tokens
    assert all(len(s.tokens) == 9 for s in packed[:-1])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"text": "fine"}', "{broken"], "row 2 is not JSON"),
        (['{"text": "fine"}', '{"text": 3}'], "row 2: text must be text, got 3"),
        (['{"words": "x"}'], "row 1: columns must include messages"),
        (['{"messages": [{"role": "cook", "content": "x"}]}'], "row 1: a turn must be of human"),
        (['{"messages": [{"role": "user", "content": "x"}]}'], "row 1: has no answer to train on"),
        ([], "holds no rows"),
    ],
)
def test_a_malformed_row_is_named(rows: list[str], words: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=words) as error:
        read_samples(path, tokenizer, cutoff_len=100)
    assert str(path) in str(error.value)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    sentences = [s for s in read_text(BUNDLED).replace("\n", " ").split(". ") if s]
    write(tmp_path / "d.jsonl", [{"text": s} for s in sentences[:24]])
    return [
        f"model_name_or_path={model_folder}",
        "dataset=d.jsonl",
        "output_dir=out",
        "cutoff_len=24",
        "gradient_accumulation_steps=2",
        "num_train_epochs=2",
        "learning_rate=5e-3",
        "save_steps=3",
    ]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def log_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "elapsed_s"} for row in rows]


def test_finetuning_lowers_the_loss_and_the_adapter_changes_what_is_generated(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert finetune(arguments) == 0
    assert "out: 24 steps, loss" in capsys.readouterr().out
    log = log_of(Path("out"))
    assert [row["step"] for row in log] == list(range(1, 25))
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert {p.name for p in Path("out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(3, 25, 3)}

    Path("p.txt").write_text("The harbour\nMarta keeps\n")
    common = [arguments[0], "prompts=p.txt", "chat=false", "max_new_tokens=12", "ignore_eos=true"]
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


def test_a_killed_run_goes_on_to_the_same_adapter_bit_for_bit(arguments: list[str]) -> None:
    """Killed at whatever moment it is, twice, and with half a checkpoint left behind."""
    assert finetune([*arguments, "output_dir=whole"]) == 0
    for kill_after in (1, 3):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sim.cli", "finetune", *arguments, "resume=true"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(Path("out").glob("checkpoint-*"))) < kill_after:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    half = Path("out/.checkpoint-99.partial")
    half.mkdir()
    (half / "state.json").write_text("{")
    last = last_checkpoint("out")
    assert last is not None and last.name != "checkpoint-99"
    assert finetune([*arguments, "resume=true"]) == 0
    assert adapter_bytes(Path("out")) == adapter_bytes(Path("whole"))
    assert log_of(Path("out")) == log_of(Path("whole"))


def test_a_full_disk_leaves_older_checkpoints_and_no_half_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from engine import checkpoint

    save, calls = torch.save, []

    def full(*given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*given, **named)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert finetune(arguments) != 0
    error = capsys.readouterr().err
    assert "checkpoint of step 9: No space left on device" in error
    assert {p.name for p in Path("out").iterdir()} == {"checkpoint-3", "checkpoint-6", "trainer_log.jsonl"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "has checkpoint-3; resume=true goes on"),
        (["resume=true", "learning_rate=1e-3"], "was made with learning_rate=0.005, got 0.001"),
    ],
)
def test_a_folder_with_a_checkpoint_is_not_overwritten_by_another_run(
    changes: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune([*arguments, "max_steps=3"]) == 0
    assert finetune([*arguments, "max_steps=3", *changes]) == 2
    assert words in capsys.readouterr().err
