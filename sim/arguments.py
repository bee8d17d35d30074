"""Arguments of commands that are not Hydra's."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from sim.errors import USER_ERROR


class Parser(ArgumentParser):
    """Refuses in one line; the page of usage is what `--help` prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message}\n")
