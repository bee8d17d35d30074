"""Folders of Hugging Face and peft are read as they are, and what does not fit is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig, config_of, hf_config, read_config
from engine.load import INDEX, load_model
from engine.lora import UNSUPPORTED, read_adapter, write_adapter
from engine.packing import Piece, pack
from sim.compile.peft_file import REFUSED
from tests.engine.saved import save_model
from tests.engine.tiny import CONFIGS, adapter_of, tiny_model, tokens_of, twin


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """All logits of one sequence, in one batch."""
    import numpy as np

    from engine.model import Batch

    pages = model.new_pages(-(-len(tokens) // 4), 4)
    blocks = np.arange(pages.k.shape[1], dtype=np.int32)
    packed = pack([Piece(np.array(tokens, np.int32), 0, blocks, -1)], 4)
    ids, positions, slots, tables, start, context, _, _ = (torch.from_numpy(a) for a in packed[:-1])
    batch = Batch(ids, positions, slots, tables, start, context, 0, packed.max_keys, None)
    with torch.no_grad():
        return model.logits(model.forward(batch, pages))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_sharded_folder_of_transformers_gives_its_logits(family: str, tmp_path: Path) -> None:
    model = twin(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = load_model(tmp_path, torch.float32, "cpu")
    tokens = tokens_of(150, seed=4)  # past the 64 positions from which frequencies are stretched
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(loaded, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_what_is_written_is_read_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path)
    again = load_model(tmp_path, torch.float32, "cpu")
    tokens = tokens_of(20, seed=1)
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert again.config.rope_scaling == model.config.rope_scaling


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    values = hf_config(CONFIGS["llama"])
    rope = values.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    old = config_of(values | {"rope_theta": theta, "rope_scaling": rope}, name="llama")
    assert old == config_of(hf_config(CONFIGS["llama"]), name="llama")
    assert isinstance(old, ModelConfig) and old.rope_scaling == CONFIGS["llama"].rope_scaling


STRETCHED = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, qwen2, got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be default or llama3, got 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads must be at least 1"),
        (
            {"vocab_size": 2**31},
            "config.json: vocab_size must be at least 1 and at most 2147483647, got 2147483648",
        ),
        ({"vocab_size": 10**30}, "config.json: vocab_size must be at most 9223372036854775807, got more"),
        ({"model_type": ["llama"]}, "model_type must be one of llama, qwen2"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of model.kv_heads, got 4 and 3"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps must be at least 0 and finite, got -1"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, got None"),
        ({"rope_parameters": ["default"]}, "config.json: rope_parameters must be a group of keys"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta must be a number, got \[1\]"),
        ({"rope_parameters": {"rope_theta": -1}}, "config.json: rope_theta must be above 0 and finite"),
        ({"rope_parameters": {"rope_theta": 0}}, "config.json: rope_theta must be above 0 and finite, got 0"),
        ({"rope_parameters": STRETCHED | {"factor": "8"}}, "rope_parameters.factor must be a number"),
        ({"rope_parameters": STRETCHED | {"factor": 0}}, "rope_parameters.factor must be above 0"),
        (
            {"rope_parameters": STRETCHED | {"low_freq_factor": 4}},
            "rope_parameters.low_freq_factor must be below high_freq_factor 4.0, got 4.0",
        ),
    ],
)
def test_a_config_that_would_change_the_result_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIGS["llama"]) | change))
    with pytest.raises(ValueError, match=words):
        read_config(tmp_path)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tiny_model("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_model(tmp_path, torch.float32, "cpu")
    save_file(whole | {name: whole[name][:5]}, path)
    with pytest.raises(ValueError, match=r"must have shape \[32, 48\], got \[5, 48\]"):
        load_model(tmp_path, torch.float32, "cpu")
    save_file(whole | {name: whole[name].to(torch.int8)}, path)
    with pytest.raises(ValueError, match=f"{name} must be of BF16, F16, F32, F64, got I8"):
        load_model(tmp_path, torch.float32, "cpu")
    save_file(whole | {"model.layers.9.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="extra belongs to no layer of llama"):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "weight_map must be a group of keys, got None"),
        ({"weight_map": ["a"]}, "weight_map must be a group of keys"),
        ({"weight_map": {"model.norm.weight": 3}}, "weight_map.model.norm.weight must be text, got 3"),
        ({"weight_map": {"a": "../b"}}, "weight_map.a must name a file of the folder, got '../b'"),
        ({"weight_map": {"a": ""}}, "weight_map.a must name a file of the folder, got ''"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
    ],
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_model(tiny_model("llama"), tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_is_read_and_written_back(rslora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["v_proj", "up_proj"], use_rslora=rslora, init_lora_weights=False
    )
    model = get_peft_model(twin("llama"), config)
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", CONFIGS["llama"].shape)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert adapter.scale == pytest.approx(layer.scaling["default"])
    assert torch.equal(adapter.b["up_proj"][1], layer.lora_B["default"].weight)
    write_adapter(adapter, tmp_path / "ours")
    again = PeftModel.from_pretrained(twin("llama"), tmp_path / "ours").eval()
    ids = torch.tensor([tokens_of(20, seed=2)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path: Path) -> None:
    write_adapter(adapter_of("llama", 2, ["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    for change, words in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias must be none"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is not supported"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config is not supported"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is not supported"),
        ({"monteclora_config": {"samples": 2}}, "monteclora_config is not supported"),
        ({"velora_config": {"groups": 2}}, "velora_config is not supported"),
        ({"lora_alpha": 1e40}, "adapter_config.json: lora_alpha must give a scale of at most 1e.30"),
        ({"target_modules": 3}, "target_modules must be text or a list, each item text, got 3"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be text or a list, each item text, got"),
        ({"target_modules": ["v_proj"]}, "target_modules must name the layer of base_model.*q_proj"),
        ({"target_modules": "("}, "target_modules must be a regular expression, got '\\('"),
        ({"target_modules": r".*\.k_proj"}, "target_modules must name the layer of base_model.*q_proj"),
    ):
        path.write_text(json.dumps(plain | change))
        with pytest.raises(ValueError, match=words):
            read_adapter(tmp_path, CONFIGS["llama"].shape)


@pytest.mark.parametrize("modules", ["all-linear", r".*\.q_proj", ["self_attn.q_proj"]])
def test_target_modules_name_layers_as_peft_has_it(modules: object, tmp_path: Path) -> None:
    write_adapter(adapter_of("llama", 2, ["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": modules}))
    assert read_adapter(tmp_path, CONFIGS["llama"].shape).targets == ("q_proj",)


def test_a_tensor_of_an_adapter_that_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(adapter_of("llama", 2, ["q_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    a, b = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight" for kind in "AB")
    for change, words in (
        ({a: None}, f"{a} is missing"),
        ({b: None}, f"{b} is missing"),
        ({a: torch.zeros(3, 32)}, rf"{a} must have shape \[2, 32\], got \[3, 32\]"),
        ({a: whole[a].int()}, f"{a} must be of bfloat16, float16, float32, float64, got int32"),
        ({"base_model.model.lm_head.weight": whole[a]}, "lm_head.weight belongs to no linear layer"),
        (dict.fromkeys(whole), "adapter_model.safetensors holds no tensors"),
    ):
        tensors = {name: tensor.clone() for name, tensor in (whole | change).items() if tensor is not None}
        save_file(tensors, path)
        with pytest.raises(ValueError, match=words):
            read_adapter(tmp_path, CONFIGS["llama"].shape)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path, CONFIGS["llama"].shape)


def test_what_the_engine_refuses_the_compiler_refuses() -> None:
    assert {*UNSUPPORTED} <= REFUSED["LORA"].keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, 2.0, True, "2", None)),
        *(("lora_alpha", value) for value in (math.nan, math.inf, "16", None, True)),
    ],
)
def test_an_adapter_s_rank_and_alpha_are_numbers(tmp_path: Path, key: str, value: object) -> None:
    write_adapter(adapter_of("llama", 2, ["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} must be .*, got {value!r}"):
        read_adapter(tmp_path, CONFIGS["llama"].shape)
