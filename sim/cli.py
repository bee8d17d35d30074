"""The `coserve` command: one table of sub-commands, each imported only when it is called.

`coserve --help` loads neither Hydra nor pandas. Adding a command is one line of COMMANDS; its function
takes the arguments after the command's name and returns the exit code. What needs torch has its help printed
from its config file, so that it can be read where torch is not installed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from sim.errors import BUG, USER_ERROR, Terminated, message, nearest, report

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, tuple[str, str]] = {
    "simulate": ("simulate one policy on one workload, or with -m a sweep", "sim.simulate:main"),
    "compare": ("simulate every policy on the same workload: a table and a figure", "sim.simulate:compare"),
    "frontier": ("finetuning against goodput for every policy, over rates", "sim.frontier:main"),
    "compile": (
        "plan a sample's memory: what is kept, what is recomputed",
        "sim.compile_program:main",
    ),
    "bench": ("serve and finetune for real, on the wall clock, and measure it", "engine.bench:main"),
    "reference": ("the engine against this machine's own limits and against PEFT", "engine.reference:main"),
    "finetune": ("finetune a LoRA adapter on a dataset: the job alone", "engine.training:main"),
    "generate": ("answer prompts from a file or from standard input", "engine.generate:main"),
    "serve": ("answer requests of the OpenAI API, and finetune beside them", "engine.serve:main"),
    "fetch": ("download a public request trace into the data folder", "sim.fetch:main"),
    "profile": ("measured profiles: collect, show, fit, check", "profiles.program:main"),
    "validate": ("a recorded engine run against the simulation of that engine", "profiles.validate:main"),
    "fidelity": (
        "runs of the engine against the simulation with a measured profile",
        "profiles.fidelity:main",
    ),
    "reproduce": ("simulate FlexLLM's evaluation, beside what was published", "analysis.reproduce:main"),
    "results": ("the page of what was measured on a GPU, beside the targets", "analysis.results_page:main"),
    "report": ("tables and figures of runs that are already on disk", "analysis.report:main"),
}
"""Name -> (help in one line, module:function)."""
NEED_TORCH = {
    "bench": "engine/configs/bench.yaml",
    "reference": "engine/configs/reference.yaml",
    "finetune": "engine/programs/finetune.yaml",
    "generate": "engine/programs/generate.yaml",
    "serve": "engine/configs/serve.yaml",
}
"""Name -> the config that its help is read from, in ROOT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; returns the exit code."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    if name == "--version":
        print(f"coserve {_version()}")
        return 0
    if name not in COMMANDS:
        known = f"{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}"
        print(f"coserve: error: no command named {name!r}{known}", file=sys.stderr)
        return USER_ERROR
    if name in NEED_TORCH and {"--help", "-h"} & set(arguments):
        from sim.usage import usage

        text = COMMANDS[name][0]
        print(usage(f"coserve {name}", f"{text[0].upper()}{text[1:]}.", ROOT / NEED_TORCH[name]))
        return 0
    return _run(f"coserve {name}", COMMANDS[name][1], arguments[1:])


def _run(prog: str, target: str, arguments: Sequence[str]) -> int:
    module, _, function = target.partition(":")
    try:
        with _terminable():
            with _stopped_later():
                command: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
            return command(arguments)
    except KeyboardInterrupt as stop:
        return report(prog, stop, None)
    except Exception as error:
        return report(prog, error, message(error))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM inside is as Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stopped_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM inside come at the end: an import may swallow them, and leave half of itself behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: coserve COMMAND ...",
            "",
            "LLM inference and LoRA finetuning on the same GPUs: what would happen, and what does.",
            "",
            *lines,
            "",
            "coserve COMMAND --help tells more; coserve --version prints the version.",
        ]
    )


def _version() -> str:
    from importlib.metadata import version

    return version("coserve")


if __name__ == "__main__":
    sys.exit(main())
