"""A command whose options are a Hydra config: `policy=temporal workload.rate_rps=5 -m seed=1,2`.

Hydra's own app runs underneath, so `-m`, `--cfg job`, `--info` and everything else of it work. What is
added: errors as one line with the nearest known name, and the summaries of all runs of a sweep.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf

from sim.errors import (
    BUG,
    INTERRUPTED,
    TERMINATED,
    message,
    nearest,
    one_line,
    passed_over,
    report,
    stop_behind,
)
from sim.outcome import Outcome, caught
from sim.results import SUMMARY
from sim.run_folder import complete_as_they_were, remove_unused, there
from sim.usage import SIMULATOR, all_groups, is_group, usage

VERSION_BASE = "1.3"

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
"""Keys of what Hydra makes before anything runs."""

Task = Callable[[DictConfig], Mapping[str, Any]]
AtStart = Callable[[DictConfig, int], None]
AtEnd = Callable[[Sequence[Mapping[str, Any]], Path], None]


def hydra_main(
    task: Task,
    argv: Sequence[str],
    *,
    prog: str,
    config_name: str = "config",
    config_dir: Path = SIMULATOR,
    at_start: AtStart | None = None,
    at_end: AtEnd | None = None,
    about: str | None = None,
    example: str | None = None,
) -> int:
    """Run `task` on the config that `argv` asks for, once or as a sweep; returns the exit code.

    `task` is a function of a module (worker processes import it). It gets the resolved config
    without Hydra's part and returns its summary row; `HydraConfig.get().runtime.output_dir` is the
    run's folder. `at_start` gets the first config of a sweep and how many runs it has, `at_end` the rows
    of all runs that finished, in order, also after Ctrl-C, and the folder of the run or sweep. `about` and
    `example` are what `--help` says of a command that shares its config with another.
    """
    if "--help" in argv or "-h" in argv:
        told = (inspect.getdoc(task) or "").partition("\n")[0] if about is None else about
        print(usage(prog, told, config_dir / f"{config_name}.yaml", example))
        return 0
    # Hydra's parser takes overrides after a flag as unknown when others came before it.
    argv = sorted(argv, key=lambda arg: "=" in arg and not arg.startswith("-"))
    collected = _Task(task, at_start)
    try:
        _check_flags(argv)
        _check_choices(argv, config_dir, config_name)
        folder = _run_folder(argv, task, config_dir, config_name)
        collected.kept = None if folder is None else there(folder)
        _check_added(argv, config_dir, config_name)
        app = hydra.main(version_base=VERSION_BASE, config_path=str(config_dir), config_name=config_name)
        own = nullcontext() if folder is None else complete_as_they_were(folder)
        with own, _command_line(prog, _swept_with_groups(argv, config_dir, config_name)):
            app(collected)()
    except KeyboardInterrupt as stop:
        code = report(prog, stop, None)
    except Exception as error:
        if stop_behind(error) is None:
            return report(prog, error, _line(error, argv, config_dir, config_name))
        code = report(prog, error, None)
    else:
        code = collected.report(prog)
    rows = [outcome.row for outcome in collected.outcomes if outcome.row is not None]
    if rows and at_end is not None:
        at_end(rows, collected.folder)
    if rows and code in (INTERRUPTED, TERMINATED) and (Path(rows[0].get("folder", "")) / SUMMARY).is_file():
        print(
            f"{prog}: coserve report {collected.folder} shows again what is finished ({len(rows)}); "
            f"the same command with run.resume=true hydra.sweep.dir={collected.folder} runs the others",
            file=sys.stderr,
        )
    return code


def first_config(argv: Sequence[str], *alike: str) -> DictConfig | None:
    """The simulator's config of the first run of a sweep. None where it cannot be composed, which a run tells, or where
    what begins with one of `alike` is swept: then the first says little of the others."""
    given = _overrides_in(argv)
    if any(arg.lstrip("+").startswith(alike) and _is_sweep(arg) for arg in given):
        return None
    with passed_over(), _composing(SIMULATOR):
        (runs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)
        return hydra.compose("config", list(runs[0])) if runs else None
    return None


def shipped(group: str, name: str) -> dict[str, Any]:
    """A choice of a group of the simulator, as it comes."""
    with _composing(SIMULATOR):
        config = hydra.compose(f"{group}/{name}")
    node = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


class _Task:
    """The task as Hydra calls it: errors become outcomes, so that one failed run stops no other."""

    def __init__(self, task: Task, at_start: AtStart | None) -> None:
        functools.update_wrapper(self, task)
        self.task = task
        self.at_start = at_start
        self.kept: Collection[Path] | None = None
        """Folders that stay, even if nothing comes of a single run; None: all."""
        self.outcomes: list[Outcome] = []
        self.sweeping = False
        self.folder = Path()
        """Of the run, or of the sweep with the runs below it."""

    def __call__(self, config: DictConfig) -> Outcome:
        overrides = _overrides()
        run = HydraConfig.get()
        single = run.mode == hydra.types.RunMode.RUN
        try:
            outcome = Outcome(overrides=overrides, row=dict(self.task(config)))
        except Exception as error:
            if (stop := stop_behind(error)) is not None:
                raise stop from None
            outcome = caught(error, overrides, message(error))
        finally:
            kept = self.kept if single else there(Path(run.sweep.dir))
            if kept is not None:
                remove_unused(Path(run.runtime.output_dir), kept)
        if single:
            self.folder = Path(run.runtime.output_dir)
            self.outcomes.append(outcome)
        return outcome

    def start(self, config: DictConfig, runs: int, folder: Path) -> None:
        """Called by the sweeper before the first run, with its config and the sweep's folder."""
        self.folder = folder.absolute()
        if self.at_start is not None:
            self.at_start(config, runs)

    def collect(self, outcome: Outcome) -> None:
        """Called by the sweeper with each run's outcome, in order."""
        self.sweeping = True
        self.outcomes.append(outcome)
        if outcome.exception is not None:
            # It ran in this process, under a launcher that shows no failures; ours has shown its own.
            print(outcome.failure, file=sys.stderr)

    def report(self, prog: str) -> int:
        """Print what failed; 2 or 1 for a single run, 1 for a sweep with any failure."""
        failed = [outcome for outcome in self.outcomes if outcome.failed]
        if not failed:
            return 0
        if self.sweeping:
            print(f"{prog}: {len(failed)} of {len(self.outcomes)} runs failed", file=sys.stderr)
            return BUG
        error = failed[0].exception
        assert error is not None
        return report(prog, error, message(error))


def _overrides() -> tuple[str, ...]:
    """As given: an override may hold an interpolation that leads nowhere."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(given, list)
    return tuple(map(str, given))


@contextmanager
def _command_line(prog: str, argv: Sequence[str]) -> Iterator[None]:
    """What Hydra reads from its surroundings: `sys.argv`, and that errors are to be raised."""
    before_argv, before_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [prog, *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before_argv
        if before_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before_env


def _swept_with_groups(argv: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """`argv` with each key of a group that is swept as a sweep of one value. Hydra sets the others in the config with
    the group's default, which need not have them, before it chooses from the group."""
    groups = all_groups(config_dir, config_name)
    pairs = [arg.partition("=")[::2] for arg in argv]
    swept = tuple(
        f"{key.replace('/', '.')}."
        for arg, (key, _) in zip(argv, pairs, strict=True)
        if key in groups and _is_sweep(arg)
    )
    return [
        f"{key}=choice({_one_of(value)})" if key.startswith(swept) and value and not _is_sweep(arg) else arg
        for arg, (key, value) in zip(argv, pairs, strict=True)
    ]


def _one_of(value: str) -> str:
    """The value as `choice` takes it: null as a text, which is null again in the run."""
    return "'null'" if value.strip().lower() == "null" else value


def _is_sweep(arg: str) -> bool:
    """Whether the value is several, or cannot be read."""
    try:
        return bool(OverridesParser.create().parse_overrides([arg])[0].is_sweep_override())
    except OverrideParseException:
        return True


def _run_folder(argv: Sequence[str], task: Task, config_dir: Path, config_name: str) -> Path | None:
    """The folder that a single run is given, or where Hydra makes a new one below. None where it is not known before
    Hydra makes it."""
    given = [arg for arg in argv if re.match(r"\+*hydra(\.run)?(\.dir)?=", arg)]
    if not given:
        return Path(".")
    key, _, folder = given[-1].partition("=")
    if len(given) > 1 or key != "hydra.run.dir" or "${" in folder:
        name = task.__module__.rpartition(".")[2]
        with passed_over(), _composing(config_dir, name):
            config = hydra.compose(config_name, _overrides_in(argv), return_hydra_config=True)
            return Path(str(config.hydra.run.dir).strip("'\""))
        return None
    return Path(folder.strip("'\""))


def _check_flags(argv: Sequence[str]) -> None:
    """Refuse what Hydra's parser would refuse with a page of usage, and a run without a folder."""
    parser: ArgumentParser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        unknown = next((arg for arg in argv if arg.startswith("-") and arg not in flags), "")
        raise ValueError(message + nearest(unknown, flags))

    parser.error = refuse  # type: ignore[method-assign]
    configs = parser.parse_args(list(argv)).config_dir
    if configs is not None and not Path(configs).is_dir():
        what = "the file" if Path(configs).exists() else "nothing at"
        raise ValueError(f"--config-dir must be a folder, got {what} {configs}")
    for arg in argv:
        key, _, folder = arg.partition("=")
        if key in FOLDERS and not folder.strip("'\""):
            raise ValueError(f"{key} must be a folder, got nothing")


def _check_choices(argv: Sequence[str], config_dir: Path, config_name: str) -> None:
    """Refuse what is no name where one of a group is chosen: Hydra fails on it without saying of which."""
    groups = all_groups(config_dir, config_name)
    for arg in argv:
        key, equals, text = arg.partition("=")
        if not equals or arg.startswith("-"):
            continue
        if not key.strip("+~"):
            raise ValueError(f"cannot read {arg!r}: expected KEY=VALUE")
        if not is_group(key, config_dir, config_name):
            continue
        override = OverridesParser.create().parse_overrides([arg])[0]
        value: Any = override.value()
        choices = value.list if isinstance(value, ChoiceSweep) else [value]
        for choice in choices:
            names = choice if isinstance(choice, list) and choice else [choice]
            if any(name is None or isinstance(name, (int, float, list)) for name in names):
                known = f"one of {', '.join(groups[key])}" if key in groups else "a group of keys"
                raise ValueError(f"{key} must be {known}, got {text}")
            if isinstance(choice, list) and len(choice) > 1 and key in groups and key != "experiment":
                # Hydra would lay one file over the other.
                raise ValueError(
                    f"{key} takes one choice, got {text}; -m and {key}={text.strip('[]')} run each"
                )


def _check_added(argv: Sequence[str], config_dir: Path, config_name: str) -> None:
    """Refuse `+NAME...=` where the config has no NAME and no other argument refers to it: nobody would read it."""
    added = [re.split(r"[@=]", arg.lstrip("+"), maxsplit=1)[0] for arg in argv if arg.startswith("+")]
    names = {key: re.split(r"[./]", key, maxsplit=1)[0] for key in added}
    names = {key: name for key, name in names.items() if name != "hydra" and not _is_read(name, argv)}
    if not names:
        return
    groups = all_groups(config_dir, config_name)
    nodes = {key.partition(".")[0] for key in _config_keys(argv, groups, config_dir, config_name)}
    for key, name in sorted(names.items()):
        # A group of changes to the whole config, such as experiment, is no node of it.
        if nodes and name not in nodes and key not in groups:
            unknown = key if name in groups else name
            hint = nearest(unknown, nodes | groups.keys()) or "; --cfg job lists them"
            raise ValueError(f"no key or group named {unknown!r}{hint}")


def _is_read(name: str, argv: Sequence[str]) -> bool:
    """Whether another argument is taken from the key."""
    return any(f"${{{name}" in arg for arg in argv)


def _line(error: Exception, argv: Sequence[str], config_dir: Path, config_name: str) -> str | None:
    """`message`, with what only the configs tell: the nearest known key or choice."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        # Hydra does not list the choices where several of a group are asked for at once.
        options = sorted(error.options or all_groups(config_dir, config_name).get(group, []))
        return f"no {group} named {choice!r}{nearest(choice, options)}; known: {', '.join(options) or 'none'}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: expected KEY=VALUE, quotes around unusual values"
    if isinstance(error, ConfigCompositionException):
        text = str(error) or str(error.__cause__)
        key = _refused_key(text, argv)
        if key is not None:
            if "already at" in text:
                return f"{key!r} is there already; without the + it is set"
            inner = getattr(error.__cause__, "full_key", None) or ""
            key = inner if inner.startswith(f"{key}.") else key
            keys = _known_keys(argv, config_dir, config_name)
            if key in keys and "defaults list" in text:
                return f"nothing is chosen for {key!r} in this command; its keys are set one by one"
            if key in keys:
                return f"{key!r} cannot be set: another argument takes it away"
            elsewhere = _choices_with(key, config_dir, config_name)
            if elsewhere:
                return f"{key!r} is a key of {elsewhere} alone"
            keys = [known for known in keys if not known.endswith("_target_")]
            return f"no key or group named {key!r}{_nearest_key(key, keys)}"
        if "Ambiguous value" in text or "requires --multirun" in text:
            given = text.split("'")[1]
            return f"{given!r} gives several values: add -m to run each, or write KEY=[A,B] for a list"
        if (
            added := re.match(r"Multiple values for ([\w/@]+)|force-add .*'\+\+([\w/@]+)=", text)
        ) is not None:
            return f"{added[1] or added[2]!r} is a group; without the + its choice is set"
        if (merged := re.match(r"Error merging override (.+)", text)) is not None:
            key, _, value = merged[1].partition("=")
            cause = str(error.__cause__)
            wanted = f"cannot be set: {cause.splitlines()[0]}"
            if "Cannot merge" in cause:
                wanted = "must be a list" if "object_type=list" in cause else "must be a group of keys"
            return f"{key} {wanted}, got {value}"
        return one_line(text)
    if isinstance(error, OSError) and error.filename is not None:
        at = Path(error.filename).absolute()
        for key, _, given in (arg.partition("=") for arg in argv):
            folder = Path(given.strip("'\"")).absolute()
            if key in FOLDERS and at in (folder, *folder.parents):
                return f"{key}: {given} cannot be written: {error.strerror}"
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        return message(error.__cause__)
    return message(error)


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    """The key that was meant. What it shares with all of its node is no likeness: of a node that is there, its own
    keys are the ones to choose from."""
    node, _, name = key.rpartition(".")
    own = [known for known in keys if node and known.rpartition(".")[0] == node]
    if not own:
        return nearest(key, keys) or "; --cfg job lists them"
    alike = [known for known in own if nearest(name, [known.rpartition(".")[2]])]
    return nearest(key, alike) or f"; known: {', '.join(own)}"


def _refused_key(text: str, argv: Sequence[str]) -> str | None:
    """The key of the override that Hydra found no place for."""
    if not text.startswith(("Could not override", "Could not append", "Could not delete", "Key ")):
        return None
    keys = [arg.partition("=")[0].lstrip("+~") for arg in argv if "=" in arg or arg.startswith("~")]
    return next((key for key in keys if f"'{key}'" in text or f"full_key: {key}" in text), None)


def _known_keys(argv: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """Groups, and the dotted keys of the config."""
    groups = all_groups(config_dir, config_name)
    return [*groups, *_config_keys(argv, groups, config_dir, config_name)]


def _config_keys(
    argv: Sequence[str], groups: Collection[str], config_dir: Path, config_name: str
) -> list[str]:
    """The dotted keys of the config with the choices of `argv`; none where these cannot be composed."""
    given = {arg: arg.partition("=")[0] for arg in _overrides_in(argv)}
    choices = [arg for arg, key in given.items() if key in groups and "," not in arg]
    choices += [arg for arg, key in given.items() if key == "hydra.searchpath"]
    # The error told is the first one; suggestions for it are not worth a second.
    with passed_over(), _composing(config_dir):
        config = hydra.compose(config_name, choices)
        return list(_dotted(OmegaConf.to_container(config, resolve=False), ""))
    return []


def _choices_with(key: str, config_dir: Path, config_name: str) -> str:
    """`policy=a, b`: the choices of a group that bring the key; empty when there are none."""
    groups = all_groups(config_dir, config_name)
    group = next((group for group in groups if key.startswith(group.replace("/", ".") + ".")), None)
    found = []
    with _composing(config_dir):
        for name in groups.get(group or "", ()):
            # A choice that cannot be composed has no keys to tell of.
            with passed_over():
                config = hydra.compose(config_name, [f"{group}={name}"])
                if key in _dotted(OmegaConf.to_container(config, resolve=False), ""):
                    found.append(name)
    return f"{group}={', '.join(found)}" if found else ""


def _composing(config_dir: Path, job_name: str = "app") -> AbstractContextManager[None]:
    """Inside, `hydra.compose` takes configs from `config_dir`."""
    return hydra.initialize_config_dir(
        version_base=VERSION_BASE, config_dir=str(config_dir), job_name=job_name
    )


def _overrides_in(argv: Sequence[str]) -> list[str]:
    """Without flags; a folder of `--config-dir` as Hydra takes it outside of its own command line."""
    folder = get_args_parser().parse_known_args(list(argv))[0].config_dir
    path = [] if folder is None else [f"hydra.searchpath=[{Path(folder).absolute()}]"]
    return [*(arg for arg in argv if "=" in arg and not arg.startswith("-")), *path]


def _dotted(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _dotted(value, f"{prefix}{key}.")
