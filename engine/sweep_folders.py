"""Runs of a sweep that write to a folder by its name: each must have one of its own, or the last one's is all that
stays."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

EACH = re.compile(r"\$\{hydra[:.]job\.(num|id|override_dirname)\}")
"""What Hydra calls each run of a sweep by; all else that it knows is the same for all of them."""


def shared_folder(
    argv: Sequence[str], key: str, default: str | None = None, groups: Collection[str] = ()
) -> str | None:
    """What is to be given where several runs of a sweep would have one folder under `key`; None where none would.

    `default` is the folder if none is given, None where it must be; keys that are `groups` have no text of their own.
    """
    try:
        read = OverridesParser.create().parse_overrides([arg for arg in argv if re.match(r"[^-][^=]*=", arg)])
        given = {one.key_or_group: one for one in read}
        folders = _values(given[key]) if key in given else [default]
    except HydraException:
        return None  # Hydra tells what is wrong
    swept = [name for name, one in given.items() if one.is_sweep_override() and name != key]
    own = "${hydra:job.num}" if set(groups) & set(swept) else "-".join(f"${{{name}}}" for name in swept)
    apart = [
        folder
        if folder is None or EACH.search(folder) or all(_names(folder, name) for name in swept)
        else f"{folder}/{own}"
        for folder in folders
    ]
    if apart == folders:
        return None
    return f"the runs of a sweep need folders of their own, such as '{key}={','.join(map(str, apart))}'"


def _values(override: Override) -> list[str | None]:
    """What a sweep takes in turn, or the one value."""
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [None if value is None else str(getattr(value, "text", value)) for value in values]


def _names(folder: str, key: str) -> bool:
    """Whether the folder's name has the value of the key in it, or one below it."""
    return re.search(rf"\$\{{{re.escape(key)}\b", folder) is not None
