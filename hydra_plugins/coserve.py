"""Sweeps: `-m` runs every combination in parallel processes, with one progress bar.

Hydra's own sweeper composes every run's config in the parent before the first one starts, and its
launcher runs them one after the other. Here a run is composed in the worker that runs it; the parent
composes the first and looks up the names that the others choose, so that a misspelt one is told at
once. The first and the last run of a grid share no value of any key that varies: when both fail with the
same line, its cause lies in what all runs share, and the sweep ends with it.

The package has to be called `hydra_plugins`: Hydra makes launchers and sweepers of no other.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, run_job, setup_globals
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from sim.errors import message, stop_behind
from sim.outcome import Outcome, caught
from sim.pool import WorkerDied, run_calls
from sim.results import SWEEP
from sim.run_folder import complete_as_they_were, remove_unused, there


class SweepInterrupted(KeyboardInterrupt):
    """`stop`, Ctrl-C or SIGTERM, in a sweep; `finished` are the runs done by then."""

    def __init__(self, stop: KeyboardInterrupt, finished: Sequence[JobReturn]) -> None:
        super().__init__()
        self.stop = stop
        self.finished = finished


class ProcessLauncher(Launcher):
    """Runs the jobs of a sweep in `workers` processes; null is one per core."""

    def __init__(self, workers: int | None = None) -> None:
        _check_count("hydra.launcher.workers", workers)
        self.workers = _usable_cores() if workers is None else workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = [(initial_job_idx + i, tuple(overrides)) for i, overrides in enumerate(job_overrides)]
        # Both ends first: what they say decides whether the others are worth their time.
        order = list(dict.fromkeys([0, len(jobs) - 1, *range(len(jobs))]))
        args = (self.hydra_context, self.task_function, self.config, JobRuntime.instance().get("name"))
        returns: dict[int, JobReturn] = {}
        untold: list[Outcome] = []
        try:
            with (
                closing(run_calls(_prepare, args, [jobs[i] for i in order], self.workers)) as results,
                tqdm(total=len(jobs), unit="run", file=sys.stderr, disable=None) as bar,
            ):
                for place, result in results:
                    index = order[place]
                    outcome = _outcome(result, jobs[index][1])
                    returns[index] = JobReturn(overrides=jobs[index][1], status=JobStatus.COMPLETED)
                    returns[index].return_value = outcome
                    if outcome.failed:
                        untold.append(outcome)
                    all_failed = len(untold) == len(returns)
                    if not all_failed or {0, len(jobs) - 1} <= returns.keys():
                        if all_failed:
                            begun = len(returns) + self.workers - 1  # that one waits for the next
                            _check_ends(returns[0], returns[len(jobs) - 1], len(jobs), begun)
                        while untold:
                            bar.write(untold.pop(0).failure, file=sys.stderr)
                    bar.update()
        except (KeyboardInterrupt, Exception) as error:
            stop = stop_behind(error)
            if stop is None:
                raise
            # Runs end their own folders; those that were cut short could not.
            for index in [i for i in order if i not in returns][: self.workers]:
                remove_unused(self._folder(*jobs[index]), there(Path(self.config.hydra.sweep.dir)))
            raise SweepInterrupted(stop, [returns[i] for i in sorted(returns)]) from None
        return [returns[i] for i in sorted(returns)]

    def _folder(self, number: int, overrides: Sequence[str]) -> Path:
        config = _job_config(self.hydra_context, self.config, number, overrides)
        HydraConfig.instance().set_config(config)  # the folder's name may ask it for the run's number
        return Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, which tells `task_function.start` what is coming and hands the outcomes of all
    runs to `task_function.collect`."""

    def __init__(self, max_batch_size: int | None, params: DictConfig | None = None) -> None:
        _check_count("hydra.sweeper.max_batch_size", max_batch_size)
        if params is not None and not isinstance(params, DictConfig):
            raise ValueError(f"hydra.sweeper.params must be null or a group of keys, got {params}")
        super().__init__(max_batch_size, params)  # type: ignore[arg-type]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task_function = task_function

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(self._parse_config() + arguments)
        for override in overrides:
            if override.is_discrete_sweep() and not list(override.sweep_iterator()):
                raise ValueError(f"{override.input_line!r} gives no value, and nothing would run")
        batches = self.split_arguments(overrides, self.max_batch_size)
        runs = [run for batch in batches for run in batch]
        self.validate_batch_is_legal(runs)
        folder = Path(self.config.hydra.sweep.dir)
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(runs[0]))
        self.task_function.start(config, len(runs), folder)  # type: ignore[attr-defined]

        if not _has_folders(self.config):
            self._launch(batches)
            return
        kept = there(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with complete_as_they_were(folder, sweep=True):
                OmegaConf.save(self.config, folder / SWEEP)
                self._launch(batches)
        finally:
            remove_unused(folder, kept)

    def _launch(self, batches: Sequence[Sequence[Sequence[str]]]) -> None:
        assert self.launcher is not None
        runs = [run for batch in batches for run in batch]
        if isinstance(self.launcher, BasicLauncher):
            self._one_by_one(runs)
            return
        first = 0
        for batch in batches:
            try:
                self._collect(self.launcher.launch(batch, initial_job_idx=first))
            except SweepInterrupted as stopped:
                self._collect(stopped.finished)
                raise stopped.stop from None
            first += len(batch)

    def _one_by_one(self, runs: Sequence[Sequence[str]]) -> None:
        """Run in this process; what has ended is collected, so that Ctrl-C keeps it."""
        assert self.launcher is not None
        launcher = self.launcher

        def launch(number: int) -> JobReturn:
            return launcher.launch([runs[number]], initial_job_idx=number)[0]

        first, last = launch(0), []
        if first.return_value.failed and len(runs) > 1:
            last = [launch(len(runs) - 1)]
            _check_ends(first, last[0], len(runs), 2)
        self._collect([first])
        for number in range(1, len(runs) - len(last)):
            self._collect([launch(number)])
        self._collect(last)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose the first run; of the others, look up that what they choose from groups exists, with the keys that
        are given."""
        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        self._check_keys(batch)
        loader.load_sweep_config(self.config, list(batch[0]))
        for override in {override for run in batch for override in run}:
            key, _, choice = override.partition("=")
            group = key.lstrip("+~").partition("@")[0]
            options = loader.get_group_options(group, config_name=self.config.hydra.job.config_name)
            if options and choice.replace("_", "").isalnum() and choice not in [*options, "null"]:
                raise MissingConfigException(
                    f"no {group} named {choice}", missing_cfg_file=f"{group}/{choice}", options=options
                )

    def _check_keys(self, runs: Sequence[Sequence[str]]) -> None:
        """ValueError for a given key that only some of the choices have that a sweep makes from its group."""
        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        first_runs: dict[str, dict[str, Sequence[str]]] = {}
        for run in runs:
            for override in run:
                key, _, value = override.removeprefix("+").partition("=")
                first_runs.setdefault(key, {}).setdefault(value, run)
        for group, choices in first_runs.items():
            node = group.replace("/", ".") + "."
            for key in [key for key in first_runs if key.startswith(node) and len(choices) > 1]:
                found: dict[bool, list[str]] = {True: [], False: []}
                for choice, run in choices.items():
                    others = [override for override in run if not override.lstrip("+").startswith(node)]
                    config = loader.load_sweep_config(self.config, others)
                    found[_has(config, key)].append(choice)
                if found[True] and found[False]:
                    without, having = ", ".join(found[False]), ", ".join(found[True])
                    raise ValueError(
                        f"{key!r} is no key of {group}={without}; of those in this sweep, {group}={having} alone"
                    )

    def _collect(self, returns: Sequence[JobReturn]) -> None:
        collect: Callable[[Any], None] = self.task_function.collect  # type: ignore[attr-defined]
        for job in returns:
            collect(job.return_value)


def _check_count(key: str, value: object) -> None:
    """ValueError unless `value` is null or a number of things."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{key} must be null or a whole number of at least 1, got {value!r}")


def _has_folders(config: DictConfig) -> bool:
    """Whether Hydra makes the folders of runs; some programs write where a key of their own says."""
    node: Any = OmegaConf.to_container(config.hydra, resolve=False)
    return node["output_subdir"] is not None or node["sweep"]["subdir"] != "."


def _has(config: DictConfig, key: str) -> bool:
    """Whether the config has the dotted key, whatever its value."""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _check_ends(first: JobReturn, last: JobReturn, runs: int, begun: int) -> None:
    """ValueError with their line when both ends of a sweep failed alike, by what a user can cause."""
    one, other = first.return_value, last.return_value
    alike = one.user_caused and one.error == other.error and one.row is None and other.row is None
    if runs > 2 and alike:
        left = max(0, runs - begun)
        rest = f", {left} of {runs} were not begun" if left else ""
        raise ValueError(f"{one.error}; the first and the last run fail so{rest}")


class _ParsedOnce(CachingConfigRepository):
    """Config files as pickles, kept over all runs of a worker.

    Hydra parses every file again for every run; with twenty small files that is 19 of 49 ms of
    composing. It copies the repository each time and changes what it loads, hence the two methods.
    """

    def __init__(self, delegate: IConfigRepository) -> None:
        super().__init__(delegate)
        self._pickles: dict[str, bytes] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _ParsedOnce:
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._pickles:
            self._pickles[config_path] = pickle.dumps(self.delegate.load_config(config_path))
        loaded: ConfigResult | None = pickle.loads(self._pickles[config_path])
        return loaded


def _prepare(
    context: HydraContext, task_function: TaskFunction, config: DictConfig, name: str
) -> Callable[[tuple[int, tuple[str, ...]]], Outcome]:
    """In a worker: Hydra's state as the parent has it, once; then what runs one job."""
    loader: Any = context.config_loader
    loader.repository = _ParsedOnce(loader.repository)
    version.setbase(config.hydra.runtime.version_base)
    setup_globals()
    JobRuntime.instance().set("name", name)

    def run(job: tuple[int, tuple[str, ...]]) -> Outcome:
        number, overrides = job
        try:
            result = run_job(
                task_function=task_function,
                config=_job_config(context, config, number, overrides),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
            outcome: Outcome = result.return_value
        except Exception as error:
            outcome = caught(error, overrides, message(error))
        return _sendable(outcome)

    return run


def _job_config(
    context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str]
) -> DictConfig:
    """Of one run of a sweep."""
    result = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(result):
        result.hydra.job.id = result.hydra.job.num = number
    return result


def _sendable(outcome: Outcome) -> Outcome:
    """Without the exception, which may hold anything; its text goes along."""
    return Outcome(
        overrides=outcome.overrides, row=outcome.row, error=outcome.error, user_caused=outcome.user_caused
    )


def _outcome(result: Outcome | WorkerDied, overrides: Sequence[str]) -> Outcome:
    if isinstance(result, WorkerDied):
        return Outcome(overrides=tuple(overrides), error=str(result))
    return result


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
