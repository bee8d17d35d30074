"""`coserve generate`: answer prompts, all of them in one continuous batch.

    coserve generate model_name_or_path=FOLDER prompts=questions.txt
    echo "Why is the sky blue?" | coserve generate model_name_or_path=FOLDER temperature=0.7

One line of JSON per prompt on standard output, in the order of the prompts: prompt, output, whether the model
ended it (stop) or max_new_tokens (length), and its tokens. Blank lines are no prompts; a note counts them. A prompt
whose logits are not numbers has no line, and an error says so at the end.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from engine.config import read_config
from engine.driver import Driver, EngineArrivals, GivenArrivals, WallClock
from engine.launching import LaunchSettings
from engine.load import check_model_folder, load_model
from engine.lora import read_adapter
from engine.replica import replica
from engine.sampling import Sampling
from engine.tokenizer import check_tokens, prompt_tokens, read_tokenizer, stop_tokens, template
from engine.training import CONFIGS
from engine.training_settings import DTYPES
from sim.checked import build
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from sim.errors import FailedInPart, keys_as
from sim.hydra_app import hydra_main


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of `generate.yaml`."""

    model_name_or_path: str
    adapter_name_or_path: str | None
    prompts: str | None
    chat: bool | None
    device: str
    tp: int
    dtype: str
    max_new_tokens: int
    ignore_eos: bool
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    limits: Limits
    launch: LaunchSettings

    def __post_init__(self) -> None:
        check_model_folder(self.model_name_or_path)
        if self.prompts is not None and not self.prompts.strip():
            raise ValueError("prompts must be a file or null, got nothing")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a CUDA device, and torch finds none")
        for key, least in (("tp", 1), ("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")


class Prompt(NamedTuple):
    """A line to be answered."""

    where: str
    """Its file and line."""
    text: str


def main(argv: Sequence[str]) -> int:
    """`coserve generate`."""
    return hydra_main(generate, argv, prog="coserve generate", config_name="generate", config_dir=CONFIGS)


def generate(config: DictConfig) -> dict[str, Any]:
    """Answer prompts from a file or from standard input, a line each."""
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    policy: Policy = build(None, node.pop("policy"), "policy")
    if not policy.serves:
        raise ValueError(f"policy must be one that serves, got {type(policy).__name__}")
    if isinstance(node["launch"], dict) and "streams" in node["launch"]:
        raise ValueError("launch.streams changes nothing here: it is for finetuning beside inference")
    with keys_as({"cluster.": "", "generate.": ""}):
        settings: Settings = build(Settings, node, "generate")
    prompts = _prompts(settings)
    rows = answer(settings, policy, prompts)
    for row in rows:
        if row is not None:
            print(json.dumps(row, ensure_ascii=False))
    lost = [n for n, row in enumerate(rows) if row is None]
    result = {"prompts": len(rows) - len(lost)}
    if lost:
        adapter = settings.adapter_name_or_path
        raise FailedInPart(
            f"{len(lost)} of {len(rows)} prompts have no answer, the first is that of {prompts[lost[0]].where}: its "
            f"logits are not numbers; numbers in {settings.model_name_or_path}{f' or {adapter}' if adapter else ''} "
            f"are not finite, or too large for {settings.dtype}",
            result,
        )
    return result


def answer(settings: Settings, policy: Policy, prompts: Sequence[Prompt]) -> list[dict[str, Any] | None]:
    """A record for each prompt: prompt, output, finish (stop or length), tokens; None for one whose logits are not
    numbers."""
    tokenizer = read_tokenizer(settings.model_name_or_path)
    encoded = [_encode(prompt, settings, tokenizer) for prompt in prompts]
    shape = read_config(settings.model_name_or_path).shape
    shape.check_tp(settings.tp)
    given = settings.limits
    limits = replace(given, max_sequence_tokens=min(given.max_sequence_tokens, shape.max_context_tokens))
    blocks = limits.kv_tokens // limits.block_tokens
    longest = min(limits.max_sequence_tokens, blocks * limits.block_tokens)
    room = f"limits.kv_tokens, limits.max_sequence_tokens, the model's own {shape.max_context_tokens}"
    for prompt, tokens in zip(prompts, encoded, strict=True):
        check_tokens(tokens, shape.vocab, settings.model_name_or_path)
        if not tokens or len(tokens) >= longest:
            raise ValueError(f"{prompt.where} must have 1..{longest - 1} tokens ({room}), got {len(tokens)}")
    stops = frozenset[int]() if settings.ignore_eos else stop_tokens(settings.model_name_or_path, tokenizer)
    sampling = Sampling(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, stop_tokens=stops
    )
    if settings.temperature == 0 and (settings.top_k is not None or settings.top_p < 1):
        raise ValueError(
            "top_k and top_p change nothing with temperature=0, which takes the likeliest token; "
            f"got {settings.top_k} and {settings.top_p}"
        )

    adapters = {}
    if settings.adapter_name_or_path is not None:
        adapters["adapter"] = read_adapter(settings.adapter_name_or_path, shape)
    outputs: list[list[int]] = [[] for _ in prompts]
    lost: set[int] = set()
    name = "adapter" if adapters else None
    requests = [
        Request(n, 0.0, len(tokens), settings.max_new_tokens, "default", name)
        for n, tokens in enumerate(encoded)
    ]
    with replica(settings.tp, settings.device) as ranks:
        model = ranks.load(load_model, settings.model_name_or_path, DTYPES[settings.dtype])
        engine, _ = ranks.assemble(
            model,
            limits,
            (),
            adapters,
            on_token=lambda id, token: outputs[id].append(token),
            launching=settings.launch.on(model),
        )
        engine.on_lost = lost.add
        source = EngineArrivals(
            GivenArrivals(requests),
            engine,
            lambda request: (encoded[request.id], replace(sampling, seed=settings.seed + request.id)),
        )
        slos = {"default": Slo()}
        state = PipelineState(limits=limits, slos=slos, recorder=Recorder())
        Driver(engine, WallClock()).run(run_loop(state, policy, source, Horizon()))
    rows = [
        None
        if n in lost
        else {
            "prompt": prompt.text,
            "output": tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "finish": "stop" if output[-1] in stops else "length",
            "tokens": len(output),
        }
        for n, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    cut = sum(
        row is not None and row["finish"] == "length" and row["tokens"] < settings.max_new_tokens
        for row in rows
    )
    if cut:
        print(
            f"note: {cut} of {len(rows)} answers end before max_new_tokens={settings.max_new_tokens}: a prompt and its "
            f"answer have at most {longest} tokens ({room})",
            file=sys.stderr,
        )
    return rows


def _prompts(settings: Settings) -> list[Prompt]:
    where = "standard input" if settings.prompts is None else settings.prompts
    if settings.prompts is None and sys.stdin is None:
        raise ValueError("there is no prompt: standard input is closed, and prompts names no file")
    try:
        content = sys.stdin.buffer.read() if settings.prompts is None else Path(where).read_bytes()
        # Read alike wherever they come from: standard input itself keeps \r, and takes its encoding from the locale.
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except FileNotFoundError:
        raise ValueError(f"prompts: {where} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {where} is not UTF-8 at byte {error.start}") from None
    prompts = [
        Prompt(f"{where}: line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not prompts:
        raise ValueError("there is no prompt: expected one per line")
    lines = len(text.rstrip().split("\n"))  # blank ones at the end are missed by nobody
    if blank := lines - len(prompts):
        told = "blank and have no answer; those of the others are in order"
        print(f"note: {where}: {blank} of {lines} lines are {told}", file=sys.stderr)
    return prompts


def _encode(prompt: Prompt, settings: Settings, tokenizer: Any) -> list[int]:
    chat = tokenizer.chat_template is not None if settings.chat is None else settings.chat
    if not chat:
        return prompt_tokens(tokenizer, prompt.text)
    if tokenizer.chat_template is None:
        raise ValueError("chat=true needs a tokenizer with a chat template")
    turn = {"role": "user", "content": prompt.text}
    return template(tokenizer, [turn], prompt.where, add_generation_prompt=True)
