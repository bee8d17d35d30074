"""A command of its own, with the smallest task there is, for tests of everything around a task."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sim.hydra_app import hydra_main
from sim.results import SUMMARY


def task(config: DictConfig) -> dict[str, Any]:
    """Write the seed into the run's folder."""
    if config.policy.name == "broken":
        raise ValueError("policy broken cannot run")
    if config.seed == 99:
        raise ZeroDivisionError("a mistake of ours")
    if config.seed == 97:
        np.zeros(2**50)
    if config.seed == 98:
        sys.exit(7)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.wait_s:
        (folder / "waiting.log").touch()
        time.sleep(config.wait_s)
    (folder / "seed.txt").write_text(str(config.seed))
    (folder / SUMMARY).write_text("{}")
    return {"policy": config.policy.name, "seed": config.seed, "folder": str(folder)}


def show(rows: Sequence[Any], _: Path) -> None:
    print("rows:", *(f"{row['policy']}/{row['seed']}" for row in rows))


def main(argv: list[str]) -> int:
    return hydra_main(task, argv, prog="coserve small", config_dir=Path("configs").resolve(), at_end=show)


def failing_over(stop: KeyboardInterrupt) -> Exception:
    """As OmegaConf fails where it is stopped in the middle."""
    try:
        try:
            try:
                raise stop
            finally:
                None.flags  # type: ignore[attr-defined]  # noqa: B018
        except AttributeError as error:
            raise ValueError("half a config") from error
    except ValueError as error:
        return error


if __name__ == "__main__":
    from sim import cli

    cli.COMMANDS["small"] = ("does little", "tests.cli.small_app:main")
    sys.exit(cli.main(["small", *sys.argv[1:]]))
