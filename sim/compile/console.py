"""Where tables are printed: the terminal as wide as it is, a file or pipe as wide as COLUMNS says or as needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140


def wide_console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)
