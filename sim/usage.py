"""`coserve NAME --help` of a command whose options are a Hydra config: what can be chosen and set."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_FOOT = """\
Any key of a chosen file can be set too: `{prog} --cfg job` prints them all with their values.

  -m                         run every combination of values: KEY=A,B  KEY=range(1,6)  GROUP=glob(*)
  hydra/launcher=NAME        how a sweep runs: processes (hydra.launcher.workers=N), basic, ...
  hydra.run.dir=FOLDER       where the run is written; hydra.sweep.dir=FOLDER for a sweep
  --cfg job                  print the config and run nothing; --info for where it comes from
"""


def usage(prog: str, task: Callable[..., Any], config_dir: Path, config_name: str) -> str:
    """The text; the first line of the task's docstring says what the command does, the comment at the head of
    its config what else there is to say, and its last line is the example."""
    path = config_dir / f"{config_name}.yaml"
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    groups = _groups(config_dir)
    chosen = {
        key: value
        for entry in config.get("defaults", [])
        if isinstance(entry, DictConfig)
        for key, value in entry.items()
    }
    about = (inspect.getdoc(task) or "").partition("\n")[0]
    said, commands = _head(path, prog)
    lines = [f"usage: {prog} [GROUP=NAME | KEY=VALUE]... [-m]", "", about, *said, ""]
    lines.append("Groups (* is the default):")
    width = max((len(group) for group in groups), default=0)
    for group, names in groups.items():
        marked = [f"{name}*" if name == chosen.get(group) else name for name in names]
        lines.append(f"  {group:<{width}}  {', '.join(marked)}")
    lines += ["", "Keys:"]
    own = [str(key) for key in config if key not in ("defaults", "hydra")]
    lines += [f"  {line}" for key in own for line in _keys(key, config[key])]
    example = [f"\nExample: {command}" for command in commands] or [_example(prog, groups, chosen)]
    return "\n".join([*lines, "", _FOOT.format(prog=prog) + "\n".join(example)])


def _head(path: Path, prog: str) -> tuple[list[str], list[str]]:
    """What the comment at the head of a config says, and the commands in it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line[1:].removeprefix(" ") for line in itertools.takewhile(lambda line: line[:1] == "#", lines)]
    commands = [line for line in head if line.startswith(f"{prog} ")]
    return [line for line in head if line not in commands], commands


def _groups(config_dir: Path) -> dict[str, list[str]]:
    """Group -> names of its files, Hydra's own groups left out."""
    groups: dict[str, list[str]] = {}
    for path in sorted(config_dir.rglob("*.yaml")):
        group = path.parent.relative_to(config_dir).as_posix()
        if group != "." and not group.startswith("hydra/"):
            groups.setdefault(group, []).append(path.stem)
    return groups


def _keys(key: str, value: Any) -> list[str]:
    if isinstance(value, DictConfig):
        return [line for name in map(str, value) for line in _keys(f"{key}.{name}", value[name])]
    return [f"{key}={'null' if value is None else value}"]


def _example(prog: str, groups: dict[str, list[str]], chosen: dict[Any, Any]) -> str:
    """A command that sweeps the first group, made of names that exist."""
    group = next((group for group, names in groups.items() if group in chosen and len(names) > 1), None)
    if group is None:
        return f"\nExample: {prog} seed=1\n"
    return f"\nExample: {prog} -m {group}={','.join(groups[group][:2])} seed=1,2\n"
