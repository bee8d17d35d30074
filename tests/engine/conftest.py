"""A model folder with a tokenizer of its own, and the arguments of a short `coserve finetune`; workers that lose
their GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.load import random_model
from engine.text import BUNDLED, read_text
from sim.core.specs import ModelShape
from tests.engine.saved import save_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    """A kernel that reads or writes outside of its tensors ends CUDA for its process, where all later tests would
    fail: a worker ends with it, which fails this test, and pytest-xdist starts another for the tests that are left."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{nodeid}: {error}", file=sys.stderr)
            os._exit(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder)
    return folder


def write_model_folder(folder: Path) -> None:
    """A Hugging Face folder: random weights, a byte-pair tokenizer trained on the bundled text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return finetune_arguments(model_folder, tmp_path)


def finetune_arguments(model_folder: Path, folder: Path) -> list[str]:
    """Of a short run on sentences, which are written to `folder`."""
    sentences = [s for s in read_text(BUNDLED).replace("\n", " ").split(". ") if s]
    rows = [json.dumps({"text": s}) + "\n" for s in sentences[:24]]
    (folder / "d.jsonl").write_text("".join(rows))
    return [
        f"model_name_or_path={model_folder}",
        "dataset=d.jsonl",
        "output_dir=out",
        "device=cpu",
        "cutoff_len=24",
        "gradient_accumulation_steps=2",
        "num_train_epochs=2",
        "learning_rate=5e-3",
        "save_steps=3",
    ]
