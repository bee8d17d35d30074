"""Datasets and settings that nobody thought of: random rows of every format, under chat templates as models have
them, become the samples that a plain reading of the formats gives, in steps at the rates of transformers.

`python -m tests.engine.test_random_data FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from engine.config import ModelConfig
from engine.finetune import Sample
from engine.generate import Prompt
from engine.generate import _encode as prompt_of
from engine.load import random_model
from engine.text import BUNDLED, read_text
from engine.training import CONFIGS, Training
from engine.training_settings import Settings
from sim.core.specs import ModelShape
from tests.engine.mixtures import try_seeds
from tests.engine.saved import save_model

Message = dict[str, str]
Parts = list[tuple[str, bool]]
"""A conversation as written: pieces, and whether they are trained on."""
SPECIAL = (
    *("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>"),
)
VOCAB = 420
SHAPE = ModelShape(
    name="t",
    layers=2,
    hidden=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn=24,
    vocab=VOCAB,
    max_context_tokens=4096,
)


class Chat(NamedTuple):
    """A chat template, and the same in Python."""

    jinja: str
    parts: Callable[[Sequence[Message]], Parts]
    eos: str


def _llama3(messages: Sequence[Message]) -> Parts:
    parts = [("<|begin|>", False)]
    for m in messages:
        parts.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        parts.append((f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"))
    return parts


def _chatml(messages: Sequence[Message]) -> Parts:
    parts: Parts = []
    for m in messages:
        parts.append((f"<|im_start|>{m['role']}\n", False))
        parts.append((f"{m['content']}<|im_end|>\n", m["role"] == "assistant"))
    return parts


def _qwen(messages: Sequence[Message]) -> Parts:
    if messages[0]["role"] == "system":
        return _chatml(messages)
    return _chatml([{"role": "system", "content": "You help."}, *messages])


def _mistral(messages: Sequence[Message]) -> Parts:
    """The system's text goes into the first question; no role is announced."""
    parts = [("<|begin|>", False)]
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"] + "\n\n", messages[1:]
    for n, m in enumerate(messages):
        if m["role"] == "user":
            parts.append((f"[INST] {system if n == 0 else ''}{m['content']} [/INST]", False))
        else:
            parts.append((f" {m['content'].strip()}</s>", True))
    return parts


def _vicuna(messages: Sequence[Message]) -> Parts:
    """Roles are words, and the announcement of an answer ends in the space that its first token has."""
    parts: Parts = []
    for m in messages:
        parts.append((f"{m['role'].upper()}: ", False))
        answer = m["role"] == "assistant"
        parts.append((m["content"] + ("</s>" if answer else " "), answer))
    return parts


def _unannounced(messages: Sequence[Message]) -> Parts:
    """Without a generation prompt, what says that an answer comes is part of it."""
    return [(f"<|{m['role']}|>{m['content']}<|end|>", m["role"] == "assistant") for m in messages]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = {
    "llama3": Chat(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        _llama3,
        "<|eot_id|>",
    ),
    "chatml": Chat(CHATML, _chatml, "<|im_end|>"),
    "qwen": Chat(
        "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}\n"
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n",
        _qwen,
        "<|end|>",
    ),
    "marked": Chat(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' + '\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _chatml,
        "<|im_end|>",
    ),
    "mistral": Chat(
        "{{ bos_token }}{% set ns = namespace(system='') %}"
        "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (ns.system if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        _mistral,
        "</s>",
    ),
    "vicuna": Chat(
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        _vicuna,
        "</s>",
    ),
    "unannounced": Chat(
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
        _unannounced,
        "<|end|>",
    ),
}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = {"plain": "$A", "begin": "<|begin|> $A", "both": "<|begin|> $A EOS"}
"""What a tokenizer adds to a text."""


@functools.cache
def tokenizer_of(words: str, ends: str, chat: Chat) -> Any:
    """A byte-pair tokenizer trained on the bundled text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
    if words == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        own = pre_tokenizers.Sequence([split, own])
    tokenizer.pre_tokenizer = own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    text = read_text(BUNDLED)
    tokenizer.train_from_iterator([text, "  \n\n   \n a\n\n b" * 40], trainer)
    if ends != "plain":
        single = ENDS[ends].replace("EOS", chat.eos)
        added = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=chat.eos, chat_template=chat.jinja
    )


class Draw:
    """Random things."""

    def __init__(self, seed: int, stream: int = 4) -> None:
        self.random = np.random.default_rng((seed, stream))
        self._words = read_text(BUNDLED).split()

    def some(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def count(self, least: int, most: int) -> int:
        return int(self.random.integers(least, most + 1))

    def text(self, most: int = 14) -> str:
        """Words, and sometimes what hurts."""
        words = [self.some(*self._words) for _ in range(self.count(0 if self.chance(0.1) else 1, most))]
        odd = (
            "\u00e9t\u00e9",
            "\u6e2f\u53e3",
            "\U0001f469\u200d\U0001f52c",
            "a\u0301",
            "\u2028",
            "\u00a0",
            "x\ty",
        )
        for _ in range(self.count(0, 2)):
            words.insert(self.count(0, len(words)), self.some(*odd, *SPECIAL, "a\n\nb", "{{ m }}", "1234567"))
        text = " ".join(words)
        return self.some("\n", " ", "\r\n", "\t") + text if self.chance(0.02) else text

    def asked(self) -> str:
        """A question, with space around it or not."""
        return self.some("", "", "", " ", "\n") + self.text() + self.some("", "", "", " ", "\n", "  ")

    def turns(self) -> list[Message]:
        turns = []
        for _ in range(self.count(1, 3)):
            turns.append({"role": "user", "content": self.asked()})
            turns.append({"role": "assistant", "content": self.text() + self.some("", "", "", "\n", " ")})
        return turns


# Rows: as users have them, and as the formats mean them.

Read = list[Message] | tuple[str, str] | str
"""A conversation, a prompt and its completion, or text."""


def row_of(kind: str, draw: Draw) -> tuple[dict[str, Any], Read]:
    if kind == "text":
        text = draw.text(60) or "a"
        return {"text": text, "id": 7}, text
    if kind == "prompt":
        prompt, completion = draw.asked(), draw.text(30)
        return {"prompt": prompt, "completion": completion}, (prompt, completion)
    turns, row = draw.turns(), {}
    if kind == "alpaca":
        *history, last, answer = turns
        pairs = [[a["content"], b["content"]] for a, b in zip(history[::2], history[1::2], strict=True)]
        asked = [draw.some(last["content"], last["content"], ""), draw.some("", draw.text())]
        row = {"instruction": asked[0], "output": answer["content"]}
        if asked[1] or draw.chance(0.5):
            row["input"] = asked[1]
        if pairs or draw.chance(0.3):
            row["history"] = pairs
        turns = [*history, {"role": "user", "content": "\n".join(filter(None, asked))}, answer]
    if kind == "messages":
        row = {"messages": turns}
    if kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns]}
    if draw.chance(0.3):
        system = draw.text() or "Be brief."
        if kind == "messages" and draw.chance(0.5):
            turns = [{"role": "system", "content": system}, *turns]
            row = {"messages": turns}
        else:
            row["system"] = system
            turns = [{"role": "system", "content": system}, *turns]
    elif draw.chance(0.3):
        row["system"] = ""
    return row, turns


def encoded(read: Read, tokenizer: Any, chat: Chat, begins: bool) -> tuple[list[int], list[bool]]:
    """Tokens, and which are trained on."""

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    begin = [tokenizer.bos_token_id] if begins else []
    end = [tokenizer.eos_token_id]
    if isinstance(read, str):
        tokens = begin + plain(read) + end
        return tokens, [True] * len(tokens)
    if isinstance(read, tuple):
        prompt, answer = begin + plain(read[0]), plain(read[1]) + end
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    whole, spans = "", []
    for text, trained in chat.parts(read):
        if trained:
            spans.append((len(whole), len(whole) + len(text)))
        whole += text
    out = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for _, edge in out["offset_mapping"]:
        # A token across a border belongs to what follows it.
        mask.append(any(start < edge <= stop for start, stop in spans))
    return list(out["input_ids"]), mask


def samples_of(reads: Sequence[Read], keys: dict[str, Any], *chat: Any) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of a dataset, in its order."""
    rows = []
    for read in reads[: keys["max_samples"]]:
        tokens, trained = encoded(read, *chat)
        own = [t if keys["train_on_prompt"] or on else -100 for t, on in zip(tokens, trained, strict=True)]
        rows.append((tokens, own))
    cutoff = keys["cutoff_len"]
    if keys["packing"]:
        tokens, labels = (list(itertools.chain(*(row[n] for row in rows))) for n in range(2))
        rows = [(tokens[at : at + cutoff], labels[at : at + cutoff]) for at in range(0, len(tokens), cutoff)]
    cut = [(tokens[:cutoff], labels[:cutoff]) for tokens, labels in rows]
    return [(tokens, labels) for tokens, labels in cut if set(labels[1:]) - {-100}]


class Case(NamedTuple):
    """A dataset, and the keys of a job on it."""

    reads: list[Read]
    keys: dict[str, Any]
    chat: tuple[Any, Chat, bool]
    """Tokenizer, template, whether a text begins with a token of its own."""


def defaults() -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / "finetune.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key not in ("defaults", "policy", "hydra")}


def case_of(draw: Draw, folder: Path) -> Case:
    """Writes a model and a dataset to `folder`."""
    from transformers import AutoTokenizer

    chat = draw.some(*CHATS.values())
    ends = draw.some(*ENDS)
    tokenizer_of(draw.some("gpt2", "llama3"), ends, chat).save_pretrained(folder / "model")
    family = draw.some("llama", "qwen2")
    shape = SHAPE if family == "llama" else SHAPE.__class__(**{**_fields(SHAPE), "qkv_bias": True})
    model = random_model(ModelConfig(family=family, shape=shape), torch.float32, "cpu", 3, 0.2)
    save_model(model, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    kind = draw.some("messages", "sharegpt", "alpaca", "prompt", "text")
    pairs = [row_of(kind, draw) for _ in range(draw.count(1, 24))]
    ascii = draw.chance(0.5)
    lines = [json.dumps(row, ensure_ascii=ascii) for row, _ in pairs]
    if draw.chance(0.5):
        path, text = folder / "d.jsonl", draw.some("\n", "\n\n").join(lines) + draw.some("", "\n", "\n \n")
    else:
        path, text = folder / "d.json", f"[{', '.join(lines)}]"
    path.write_text(text, encoding="utf-8")
    keys = defaults() | {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(path),
        "output_dir": str(folder / "out"),
        "seed": draw.count(0, 99),
        "cutoff_len": draw.some(2, *(16, 33, 64, 100, 200) * 3),
        "max_samples": draw.some(None, None, 1, 5, 9, 50),
        "packing": draw.chance(0.4),
        "train_on_prompt": draw.chance(0.3),
        "gradient_accumulation_steps": draw.count(1, 5),
        "num_train_epochs": draw.count(1, 3),
        "max_steps": draw.some(None, None, 1, 3, 17),
        "learning_rate": draw.some(1e-4, 3e-3),
        "lr_scheduler_type": draw.some("constant", "constant_with_warmup", "linear", "cosine"),
        "warmup_steps": draw.some(0, 0, 1, 4, 40),
        "val_size": draw.some(0.0, 0.0, 0.05, 0.3, 0.5, 1, 3),
    }
    if keys["lr_scheduler_type"] == "constant":
        keys["warmup_steps"], keys["warmup_ratio"] = 0, 0.0
    elif not keys["warmup_steps"]:
        keys["warmup_ratio"] = draw.some(0.0, 0.03, 0.1, 0.5, 1.0)
    return Case([read for _, read in pairs], keys, (tokenizer, chat, ends != "plain"))


def _fields(shape: ModelShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def rates_of(keys: dict[str, Any], total: int) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=keys["learning_rate"])
    name = keys["lr_scheduler_type"]
    warmup = keys["warmup_steps"] or math.ceil(total * keys["warmup_ratio"])
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def plain(sample: Sample) -> tuple[list[int], list[int]]:
    return sample.tokens.tolist(), sample.labels.tolist()


def check_prompt(case: Case, draw: Draw) -> None:
    """What `coserve generate` asks is what training has before an answer."""
    tokenizer, chat, begins = case.chat
    asked = draw.asked().replace("\n", " ") + "?"
    answered = [{"role": "user", "content": asked}, {"role": "assistant", "content": ""}]
    before = "".join(text for text, trained in chat.parts(answered) if not trained)
    framed = [tokenizer.bos_token_id] * begins + tokenizer(asked, add_special_tokens=False)["input_ids"]
    for given, expected in (
        (None, tokenizer(before, add_special_tokens=False)["input_ids"]),
        (False, framed),
    ):
        settings: Any = SimpleNamespace(chat=given)
        assert prompt_of(Prompt("it", asked), settings, tokenizer) == expected


def check(seed: int) -> str:
    """Returns what came of it, for who counts."""
    draw = Draw(seed)
    with TemporaryDirectory() as name:
        case = case_of(draw, Path(name))
        check_prompt(case, draw)
        keys = case.keys
        settings = Settings(**keys)
        expected = samples_of(case.reads, keys, *case.chat)
        size = keys["val_size"]
        held = math.ceil(size * len(expected)) if size < 1 else size
        if len(expected) <= held:
            with pytest.raises(ValueError, match=r"no row has a token|must leave something"):
                Training(settings)
            return "too few"
        training = Training(settings)
        steps = keys["max_steps"]
        count = steps and steps * keys["gradient_accumulation_steps"]
        count = count or (len(expected) - held) * keys["num_train_epochs"]
        steps = math.ceil(count / keys["gradient_accumulation_steps"])
        assert training.total == steps
        order = list(map(plain, training.job.samples))
        assert len(order) == count
        ours = [training.job.optimizer.rate(n) for n in range(steps)]
        assert ours == pytest.approx(rates_of(keys, steps), rel=1e-12, abs=1e-20)
        held_out = list(map(plain, training.held_out))
        assert len(held_out) == held
        # An epoch is every sample once, whatever the order.
        each = len(expected) - held
        for at in range(0, count, each):
            epoch = order[at : at + each]
            if len(epoch) == each:
                assert sorted(epoch + held_out) == sorted(expected)
            left = list(expected)
            for sample in epoch + held_out:
                left.remove(sample)
        if each > 8 and count >= 2 * each and len({str(s) for s in order}) > 6:
            assert order[:each] != order[each : 2 * each]
    return "compared"


@pytest.mark.parametrize("seed", range(6))
def test_rows_become_the_samples_that_their_formats_mean(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
