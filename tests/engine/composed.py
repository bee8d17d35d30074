"""The config of a bench, composed as its program does."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from engine.bench import CONFIGS
from sim.assemble import CONFIGS as SIMULATOR


def bench_config(*overrides: str, with_hydra: bool = False) -> DictConfig:
    """With hydra's own node if that is asked for."""
    OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("bench", [*overrides], return_hydra_config=with_hydra)
