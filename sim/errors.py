"""What a user sees when something is wrong: one line that names what was given and what is allowed.

An error that a user can cause becomes a line and exit code 2. Everything else is a mistake of ours
and keeps its traceback; `COSERVE_DEBUG=1` shows the traceback of every error.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

USER_ERROR, BUG, INTERRUPTED, TERMINATED = 2, 1, 130, 143
"""Exit codes; the last two are what a shell gives a program that Ctrl-C or SIGTERM ended."""

EXTRAS = {
    "torch": "engine",
    "triton": "engine",
    "peft": "engine",
    "transformers": "engine",
    "safetensors": "engine",
    "liger_kernel": "engine",
    "tensorboard": "tensorboard",
    "starlette": "serve",
    "uvicorn": "serve",
}
"""Package -> the extra of coserve that brings it."""


NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
"""What torch says, with a plain RuntimeError or one of its own, of memory that is not there."""


def install_command(extra: str) -> str:
    """What installs an extra at the pinned versions."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in the folder of coserve"


class FailedInPart(ValueError):
    """Something in a run failed, the rest of it went on, and all that came of it is written."""

    def __init__(self, line: str, row: Mapping[str, Any]) -> None:
        """`row` is the run's summary."""
        super().__init__(line)
        self.row = dict(row)


class OutOfReach(ValueError):
    """A device cannot hold, or not keep up with, what was asked of it; another one, or more of them, could."""

    def __init__(self, line: str, bound: Mapping[str, object] | None = None) -> None:
        """`bound`: the key of a bound that cannot be kept, and a value that could."""
        super().__init__(line)
        self.bound = dict(bound or {})


@contextmanager
def keys_as(keys: Mapping[str, str]) -> Iterator[None]:
    """A ValueError inside whose text begins with one of `keys` begins with what this command calls it.

    What several programs build names the keys of one of them, and says so to the users of all.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for said, own in keys.items():
            if text.startswith(said):
                raise ValueError(own + text.removeprefix(said)) from error
        raise


@contextmanager
def writing(key: str, path: object) -> Iterator[None]:
    """An OSError inside is a ValueError that names the key whose file or folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{key}: {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def warnings_as_notes(*, shown: bool) -> Iterator[None]:
    """Warnings inside as lines on stderr, each once; not `shown` where they have been told already."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught if shown):
        print(f"note: {text}", file=sys.stderr)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?' for the closest of `known`, or nothing if none is close. One that begins so is closer
    than any that does not."""
    written = {_plain(other): other for other in known}
    name = _plain(name)
    begin = [other for other in written if name and other.startswith(name)]
    close = difflib.get_close_matches(name, begin or written, n=1, cutoff=0.0 if begin else 0.6)
    return f"; did you mean {written[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    """As our names are written: meta-llama/Llama-3.1-8B is llama_3_1_8b."""
    return re.sub(r"[^a-z0-9]+", "_", name.rpartition("/")[2].lower())


def message(error: BaseException) -> str | None:
    """One line for an error that a user can cause, None for any other. Below that of a policy that raised stand the
    frames of its own file."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return None
        return f"needs {package}, which is not installed; {install_command(EXTRAS[package])} brings it"
    if isinstance(error, OSError) and error.strerror is not None:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in NO_MEMORY)
    ):
        return one_line(f"the memory of this machine is not enough: {error}").rstrip(": ")
    if (file := getattr(error, "policy_file", None)) is not None:
        return "\n".join([one_line(str(error)), *_frames(error, file)])
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{mark.name}, line {mark.line + 1}: not YAML: {getattr(error, 'problem', None) or error}"
    if key := getattr(error, "full_key", None):
        if type(error).__name__ == "MissingMandatoryValue":
            return f"{key} is missing; it must be given: {key}=..."
        if type(error).__name__ == "ConfigAttributeError":
            node = key.rpartition(".")[0]
            return f"{key} is not there; " + (
                f"the file that describes {node} must say it" if node else "the command needs it"
            )
        if type(error).__name__ == "InterpolationKeyError":
            absent = str(error).split("'")[1]
            return (
                f"{key} is taken from {absent}, which is not there; "
                f"give it with +{absent}=..., or {key}=... itself"
            )
    from_config = type(error).__module__.startswith(("hydra.", "omegaconf."))
    if from_config or isinstance(error, (ValueError, OSError)):
        return one_line(str(error)) or type(error).__name__
    return None


def _frames(error: BaseException, file: str) -> list[str]:
    """Where in the file of its policy the cause of a `PolicyError` came from, outermost first. SimPy raises such an
    error a second time, with the first as its cause."""
    cause: BaseException | None = error
    while cause is not None and hasattr(cause, "policy_file"):
        cause = cause.__cause__
    frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
    return [
        f"  {file}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames if frame.filename == file
    ]


def one_line(text: str) -> str:
    """`text` with its line breaks as semicolons, without trailing full stops or blank lines."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    return "; ".join(line.rstrip(";") for line in lines if line)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers end a program; it is ended as by Ctrl-C."""


def stop_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM in whose wake `error` came, if one did: what they interrupt may fail over what it has done
    by half, as OmegaConf does."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    return behind


@contextmanager
def passed_over() -> Iterator[None]:
    """What a user can cause inside is left for the run to tell. A stop, and a mistake of ours, go on."""
    try:
        yield
    except Exception as error:
        if message(error) is None or stop_behind(error) is not None:
            raise


def debugging() -> bool:
    return os.environ.get("COSERVE_DEBUG") == "1"


def report(prog: str, error: BaseException, line: str | None) -> int:
    """Print `error` on stderr, as `line` where there is one, and return the exit code.

    That nobody reads our output any more is no error to tell: it is raised again, for `sim.cli` to end on.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    if (stop := stop_behind(error)) is not None:
        by_signal = isinstance(stop, Terminated)
        print(f"{prog}: {'terminated' if by_signal else 'interrupted'}", file=sys.stderr)
        return TERMINATED if by_signal else INTERRUPTED
    if line is None or debugging():
        traceback.print_exception(error)
    if line is None:
        return BUG
    print(f"{prog}: error: {line}", file=sys.stderr)
    return USER_ERROR
