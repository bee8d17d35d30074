"""`coserve NAME --help` of a command whose options are a Hydra config: what can be chosen and set.

All of it is read from the config file that the command runs: the groups that it chooses from, its keys with what
is said beside them, and as example the command in its header.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

_GROUPS = "Any key of a chosen file can be set too: `{prog} --cfg job` prints them all with their values."
_FOOT_SWEEPS = """\
  -m                         run every combination of values: KEY=A,B  KEY=range(1,6)
"""
_FOOT = """\
  --cfg job                  print the config and run nothing; --info for where it comes from
"""
_FOOT_FOLDERS = """\
  hydra.run.dir=FOLDER       where the run is written; hydra.sweep.dir=FOLDER for a sweep
"""
_FOOT_GROUPS = """\
  --config-dir FOLDER        choices of your own beside these: FOLDER/GROUP/NAME.yaml
"""
_FOOT_LAUNCHER = """\
  hydra/launcher=NAME        how a sweep runs: processes (hydra.launcher.workers=N), basic, ...
"""
WIDTH = 100
_COMMENT = re.compile(r"^( *)([\w-]+):[^#]*?(?:\s#\s*(.*))?$")
_HIDDEN = ("defaults", "hydra")
SIMULATOR = Path(__file__).resolve().parent.parent / "configs"
OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
"""The search paths of other programs' configs name the simulator's by it."""


def usage(prog: str, about: str, path: Path, example: str | None = None) -> str:
    """The text: `about` says what the command does, the header of its config, which is at `path`, what else there is
    to say, unless an `example` tells that the header is another command's. A config that names a sweeper is one of
    sweeps."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    chosen = _chosen(config)
    groups = all_groups(path.parent, path.stem)
    said, commands = _header(path, prog) if example is None else ([], [example])
    options = "[GROUP=NAME | KEY=VALUE]..." if groups else "[KEY=VALUE]..."
    sweeps = "sweeper" in path.read_text(encoding="utf-8")
    lines = [f"usage: {prog} {options}{' [-m]' if sweeps else ''}", "", about, *said, ""]
    if groups:
        width = max(map(len, groups))
        lines.append("Groups (* is the default):")
        for group, names in groups.items():
            stands_for = _stands_for(_folders(config, path.parent), group, names)
            marked = [
                name + ("*" if name == chosen.get(group) else "") + stands_for.get(name, "") for name in names
            ]
            lines += textwrap.wrap(
                f"  {group:<{width}}  {', '.join(marked)}", WIDTH, subsequent_indent=" " * (width + 4)
            )
        lines.append("")
    comments = _comments(path.read_text(encoding="utf-8"))
    keys = [pair for key in map(str, config) if key not in _HIDDEN for pair in _keys(key, config)]
    width = min(40, max((len(text) for _, text in keys), default=0))
    lines += [
        "Keys:",
        *(line for key, text in keys for line in _key_lines(text, comments.get(key), width)),
        "",
    ]
    foot = (_FOOT_SWEEPS if sweeps else "") + _FOOT + (_FOOT_GROUPS if groups else "")
    foot += _FOOT_LAUNCHER if groups and sweeps else ""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    if plain.get("hydra", {}).get("run", {}).get("dir", ".") != ".":
        foot += _FOOT_FOLDERS
    lines += [_GROUPS.format(prog=prog), ""] if groups else []
    return "\n".join([*lines, foot, _example(prog, commands, groups, chosen)])


def all_groups(config_dir: Path, config_name: str) -> dict[str, list[str]]:
    """Group -> names of its files, in `config_dir` and on the search path: groups that the config uses."""
    config = _config(config_dir, config_name)
    used = _chosen(config)
    groups: dict[str, list[str]] = {}
    for folder in _folders(config, config_dir):
        for group, names in _groups(folder).items():
            # An experiment overrides the defaults of one config, and means nothing to another.
            foreign = group == "experiment" and folder != config_dir
            if not foreign and (group in used or group.partition("/")[0] in used):
                groups[group] = list(dict.fromkeys([*groups.get(group, ()), *names]))
    return dict(sorted(groups.items()))


def _stands_for(folders: Sequence[Path], group: str, names: Sequence[str]) -> dict[str, str]:
    """Choice -> ' (NAME)' where it is called as another one, which is its own case: temporal is temporal_64."""
    found = {}
    for name in names:
        if any(other.startswith(f"{name}_") for other in names):
            file = next(path for folder in folders if (path := folder / group / f"{name}.yaml").is_file())
            called = OmegaConf.select(OmegaConf.load(file), "name")
            if called != name and called in names:
                found[name] = f" ({called})"
    return found


def is_group(key: str, config_dir: Path, config_name: str) -> bool:
    """Whether Hydra takes `key=` for the choice of a file, also where the config has no such choice."""
    folders = _folders(_config(config_dir, config_name), config_dir)
    return key.startswith("hydra/") or key == "hydra" or any((folder / key).is_dir() for folder in folders)


def _config(config_dir: Path, config_name: str) -> DictConfig:
    config = OmegaConf.load(config_dir / f"{config_name}.yaml")
    assert isinstance(config, DictConfig)
    return config


def _folders(config: DictConfig, config_dir: Path) -> list[Path]:
    """In which configs are looked for."""
    entries = OmegaConf.select(config, "hydra.searchpath", default=())
    return [config_dir, *(Path(str(entry).removeprefix("file://")) for entry in entries)]


def _groups(folder: Path) -> dict[str, list[str]]:
    """Hydra's own groups left out."""
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        group = path.parent.relative_to(folder).as_posix()
        if group != "." and not group.startswith("hydra/"):
            groups.setdefault(group, []).append(path.stem)
    return groups


def _chosen(config: DictConfig) -> dict[str, str]:
    """Group -> the default, without Hydra's own."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    entries = [entry for entry in plain.get("defaults", []) if isinstance(entry, dict)]
    pairs = [(str(key), value) for entry in entries for key, value in entry.items()]
    return {key: value for key, value in pairs if not key.startswith("override ")}


def _keys(key: str, node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, KEY=VALUE) of a node and all below it."""
    dotted = f"{prefix}{key}"
    if OmegaConf.is_missing(node, key):
        yield dotted, f"{dotted}=... (must be given)"
        return
    value = node[key]
    if isinstance(value, DictConfig):
        for name in map(str, value):
            if name != "_target_":
                yield from _keys(name, value, f"{dotted}.")
    else:
        yield dotted, f"{dotted}={_as_typed(value)}"


def _as_typed(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(_as_typed, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _key_lines(text: str, comment: str | None, width: int) -> list[str]:
    if comment is None:
        return [f"  {text}"]
    return textwrap.wrap(f"  {text:<{width}}  {comment}", WIDTH, subsequent_indent=" " * (width + 4))


def _comments(text: str) -> dict[str, str]:
    """Dotted key -> what is said of it, behind it or in the first sentence above."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        match = _COMMENT.match(line)
        if match is not None:
            indent, key, behind = len(match[1]), match[2], match[3]
            parents = [*(p for p in parents if p[0] < indent), (indent, key)]
            said = behind or " ".join(above).partition(". ")[0]
            if said:
                found[".".join(name for _, name in parents)] = said
        above = [*above, line.strip()[2:]] if line.strip().startswith("# ") else []
    return found


def _header(path: Path, prog: str) -> tuple[list[str], list[str]]:
    """What the comment at the head of a config says, and the commands in it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line[1:].removeprefix(" ") for line in takewhile(lambda line: line.startswith("#"), lines)]
    commands = [line for line in head if line.startswith(f"{prog} ")]
    return [line for line in head if line not in commands], commands


def _example(prog: str, commands: Sequence[str], groups: dict[str, list[str]], chosen: dict[str, str]) -> str:
    """The first command of the header, or a sweep over the first group, made of names that exist."""
    if commands:
        return f"Example: {commands[0]}\n"
    group = next((group for group, names in groups.items() if group in chosen and len(names) > 1), None)
    choice = f"-m {group}={','.join(groups[group][:2])} seed=1,2" if group else "seed=1"
    return f"Example: {prog} {choice}\n"
