"""Arguments of commands that are not Hydra's."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

from sim.errors import USER_ERROR


class Parser(ArgumentParser):
    """Refuses in one line; the page of usage is what `--help` prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message}\n")


def number(text: str) -> float:
    """For `type=`; of a ValueError argparse would say the name of the function alone."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number, got {text}") from None


def whole_number(text: str) -> int:
    """For `type=`: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)
