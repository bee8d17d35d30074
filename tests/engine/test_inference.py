"""Served tokens are those of transformers, however they were batched, cut, preempted and adapted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import engine.sampling
from engine.sampling import Sampling, sample
from sim.core.plan import Limits
from sim.core.request import Request
from tests.engine.tiny import CONFIGS, EngineRun, adapter_of, tiny_model, tokens_of, twin
from tests.support import build_policy, limits_of

GREEDY = Sampling()


def prompts_of(count: int, **changes: Any) -> dict[int, tuple[Request, list[int], Sampling]]:
    """Requests 5 ms apart with prompts of 3..60 tokens and outputs of 1..18."""
    adapters = changes.pop("adapters", (None,))
    sampling = changes.pop("sampling", GREEDY)
    found = {}
    for id in range(count):
        length, outputs = 3 + (id * 23) % 58, 1 + (id * 7) % 18
        request = Request(id, id * 0.005, length, outputs, "default", adapters[id % len(adapters)])
        found[id] = (request, tokens_of(length, seed=100 + id), sampling)
    return found


def serve(family: str, limits: Limits, prompts: Any, **more: Any) -> EngineRun:
    return EngineRun(tiny_model(family), build_policy("inference_only"), limits, prompts, **more)


def assert_same(run: EngineRun, prompts: Any, reference: Any) -> None:
    """Logits at every output of every request equal those of one pass over its final text."""
    for id, (request, prompt, _) in prompts.items():
        own = run.tokens[id]
        assert len(own) == request.output_tokens
        with torch.no_grad():
            logits = reference(request)(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(run.logits[id]), logits, atol=1e-4, rtol=1e-4)
        assert own == logits.argmax(1).tolist()


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("max_tokens", [8, 17, 256])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_logits_equal_transformers_for_any_chunking(family: str, max_tokens: int, lookahead: int) -> None:
    prompts, model = prompts_of(9), twin(family)
    limits = limits_of(block_tokens=4, max_sequences=8, max_tokens=max_tokens, lookahead=lookahead)
    run = serve(family, limits, prompts)
    chunks = [chunk for plan in run.policy.plans for chunk in plan.prefills]
    assert max_tokens == 256 or len(chunks) > len(prompts)
    assert_same(run, prompts, lambda _: model)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(family: str, lookahead: int) -> None:
    prompts, model = prompts_of(9), twin(family)
    run = serve(family, limits_of(kv_tokens=96, block_tokens=4, lookahead=lookahead), prompts)
    assert any(plan.preempted for plan in run.policy.plans)
    assert_same(run, prompts, lambda _: model)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_greedy_text_equals_generate(family: str) -> None:
    model, prompts = twin(family), prompts_of(5)
    run = serve(family, limits_of(max_tokens=24), prompts)
    for id, (request, prompt, _) in prompts.items():
        text = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=request.output_tokens,
            min_new_tokens=request.output_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert run.tokens[id] == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", list(CONFIGS))
def test_adapters_of_different_ranks_and_the_base_model_share_a_batch(family: str, tmp_path: Any) -> None:
    """Read back by peft from what was written; preempted among them."""
    from peft import PeftModel

    from engine.lora import write_adapter

    adapters = {
        "wide": adapter_of(family, 8, ["q_proj", "v_proj", "down_proj"], seed=1),
        "narrow": adapter_of(family, 3, ["k_proj", "o_proj", "gate_proj", "up_proj"], seed=2),
    }
    prompts = prompts_of(9, adapters=(None, "wide", "narrow"))
    limits = limits_of(kv_tokens=96, block_tokens=4, max_tokens=24, max_sequences=8)
    run = serve(family, limits, prompts, adapters=adapters)
    assert any(plan.preempted for plan in run.policy.plans)
    models = {None: twin(family)}
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name)
        models[name] = PeftModel.from_pretrained(twin(family), tmp_path / name).eval()
    assert_same(run, prompts, lambda request: models[request.adapter])


def test_a_stop_token_ends_a_request_and_is_its_last() -> None:
    prompts = prompts_of(6)
    free = serve("llama", limits_of(), prompts)
    stop = free.tokens[5][2]
    stopping = {id: (r, p, Sampling(stop_tokens=frozenset([stop]))) for id, (r, p, _) in prompts.items()}
    for lookahead in (0, 1):
        run = serve("llama", limits_of(lookahead=lookahead), stopping)
        for id, tokens in free.tokens.items():
            expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
            assert run.tokens[id] == expected
        assert run.state.kv.free == run.state.kv.total == run.engine.tables.free


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_batch() -> None:
    prompts = prompts_of(8, sampling=Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=3))
    together = serve("llama", limits_of(), prompts)
    cramped = serve("llama", limits_of(kv_tokens=96, block_tokens=4, max_tokens=17), prompts)
    assert any(plan.preempted for plan in cramped.policy.plans)
    assert together.tokens == cramped.tokens
    other = serve("llama", limits_of(), prompts_of(8, sampling=Sampling(temperature=1.0, seed=4)))
    assert other.tokens != together.tokens


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.6, None, 1.0), (1.3, 7, 1.0), (1.0, None, 0.8), (0.8, 20, 0.7), (1.0, None, 1e-9)],
)
def test_tokens_are_drawn_as_often_as_transformers_gives_them_probability(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    draws, vocab = 20_000, 50
    logits = 2 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    expected = warped.softmax(1)[0]
    settings = [Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=n) for n in range(draws)]
    tokens = sample(logits.float().expand(draws, vocab), settings, [n % 3 for n in range(draws)])
    found = torch.bincount(tokens, minlength=vocab) / draws
    assert (found[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 1e-12).all()


@pytest.mark.parametrize("temperature", [1e-9, 1e-308, 5e-324])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_the_smallest_temperatures_are_greedy(temperature: float, limits: dict[str, Any]) -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0, 3.0], [-9.0, -4.0, -8.0, -5.0]])
    assert sample(logits, [Sampling(temperature=temperature, **limits)] * 2, [0, 1]).tolist() == [2, 1]


def test_what_is_drawn_depends_on_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}]
    settings = [Sampling(**kinds[n % 3], seed=n) for n in range(9)]  # type: ignore[arg-type]
    together = sample(logits, settings, list(range(9)))
    alone = [sample(logits[n : n + 1], settings[n : n + 1], [n]) for n in range(9)]
    assert together.tolist() == torch.cat(alone).tolist()
    monkeypatch.setattr(engine.sampling, "MOST_NUMBERS", 80)
    assert sample(logits, settings, list(range(9))).tolist() == together.tolist()


def test_logits_that_are_not_numbers_give_some_token() -> None:
    """An index outside of the vocabulary would end CUDA for the whole process."""
    logits = torch.full((2, 9), math.nan)
    for settings in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3, top_p=0.5)):
        tokens = sample(logits, [settings] * 2, [0, 1])
        assert ((tokens >= 0) & (tokens < 9)).all()


def test_an_unknown_adapter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no adapter named 'nobody'; known: wide"):
        serve(
            "llama",
            limits_of(),
            prompts_of(1, adapters=("nobody",)),
            adapters={"wide": adapter_of("llama", 2, ["q_proj"])},
        )
