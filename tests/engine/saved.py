"""A model as a Hugging Face folder, for what reads such folders."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from engine.config import hf_config
from engine.load import named_tensors
from engine.model import Model


def save_model(model: Model, folder: str | Path) -> None:
    """Write weights and config so that `transformers` loads them; a tied head is left out, as it does."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.shape.tied_embeddings else set()
    tensors = {n: t.detach().cpu().clone() for n, t in named_tensors(model) if n not in tied}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
