"""`coserve finetune` with settings that nobody thought of, stopped wherever it stands and again as it goes on: adapter
and log are those of a run that nobody stopped, bit for bit.

`python -m tests.engine.test_random_finetunes FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import checkpoints
from engine.engine import Engine
from engine.training import main as finetune
from tests.engine.conftest import finetune_arguments, write_model_folder
from tests.engine.mixtures import try_seeds
from tests.engine.test_finetune_gradients import ALL, MODES
from tests.engine.tiny import log_of
from tests.engine.wild import one_of

PLACES = ((Engine, "launch"), (Engine, "collect"), (os, "rename"), (Path, "write_bytes"), (shutil, "rmtree"))
"""Where a run is stopped: in its iterations, and in the middle of a checkpoint."""


def settings(random: np.random.Generator) -> list[str]:
    """Of a run of one to some thirty steps."""
    order, memory = one_of(random, *MODES)
    targets = [str(t) for t in random.permutation(ALL)[: int(random.integers(1, 8))]]
    given = {
        "seed": int(random.integers(99)),
        "order": order,
        "memory": memory,
        "max_samples": int(random.integers(6, 20)),
        "cutoff_len": int(random.integers(8, 30)),
        "packing": one_of(random, "true", "false"),
        "val_size": one_of(random, 0, 0, 2, 0.3),
        "lora_rank": int(random.integers(1, 6)),
        "lora_target": f"[{','.join(targets)}]",
        "lora_dropout": one_of(random, 0.0, 0.2),
        "use_rslora": one_of(random, "true", "false"),
        "gradient_accumulation_steps": int(random.integers(1, 5)),
        "num_train_epochs": int(random.integers(1, 4)),
        "max_steps": one_of(random, "null", "null", int(random.integers(1, 12))),
        "optim": one_of(random, "adamw", "sgd"),
        "max_grad_norm": one_of(random, "null", 0.5),
        "weight_decay": one_of(random, 0.0, 0.1),
        "lr_scheduler_type": one_of(random, "constant_with_warmup", "linear", "cosine"),
        "logging_steps": int(random.integers(1, 4)),
        "save_steps": int(random.integers(1, 5)),
        "save_total_limit": one_of(random, "null", 1, 2),
        one_of(random, "warmup_steps", "warmup_ratio"): one_of(random, 0, 1),
    }
    if given["val_size"]:
        given["eval_steps"] = int(random.integers(1, 5))
    return [f"{key}={value}" for key, value in given.items()]


def stop(patch: pytest.MonkeyPatch, random: np.random.Generator) -> None:
    """As Ctrl-C in one of the calls to come."""
    owner, name = one_of(random, *PLACES, *2 * PLACES[:2])
    inner, calls, last = getattr(owner, name), itertools.count(), int(random.integers(12))

    def stopped(*given: Any, **named: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return inner(*given, **named)

    patch.setattr(owner, name, stopped)


def check(arguments: list[str], seed: int) -> None:
    """In the present folder."""
    random = np.random.default_rng(seed)
    arguments = [*arguments, *settings(random)]
    whole, out = f"whole-{seed}", f"out-{seed}"
    assert finetune([*arguments, f"output_dir={whole}"]) == 0
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, random)
            resume = f"resume={bool(checkpoints(out))}"
            finetune([*arguments, f"output_dir={out}", resume])
    assert finetune([*arguments, f"output_dir={out}", "resume=true"]) == 0
    name = "adapter_model.safetensors"
    assert (Path(out) / name).read_bytes() == (Path(whole) / name).read_bytes()
    assert log_of(Path(out)) == log_of(Path(whole))


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(arguments: list[str], seed: int) -> None:
    check(arguments, seed)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        write_model_folder(Path("model"))
        given = finetune_arguments(Path("model").resolve(), Path())
        try_seeds(lambda seed: check(given, seed))
