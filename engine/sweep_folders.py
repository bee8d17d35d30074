"""Runs of a sweep that write to a folder by its name: each must have one of its own, or the last one's is all that
stays."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException


def shared_folder(
    argv: Sequence[str], key: str, default: str | None = None, groups: Collection[str] = ()
) -> str | None:
    """What is to be given where several runs of a sweep would have one folder under `key`; None where none would.

    `default` is the folder if none is given, None where it must be; keys that are `groups` have no text of their own.
    """
    try:
        read = OverridesParser.create().parse_overrides([arg for arg in argv if re.match(r"[^-]+=", arg)])
    except OverrideParseException:
        return None  # Hydra tells what is wrong
    given = {one.key_or_group: one for one in read}
    swept = [name for name, one in given.items() if one.is_sweep_override()]
    if key in swept or (key not in given and default is None):
        return None
    folder = str(given[key].value()) if key in given else default
    assert folder is not None
    if "${hydra" in folder or all(re.search(rf"\$\{{{re.escape(name)}\b", folder) for name in swept):
        return None
    own = "${hydra:job.num}" if set(groups) & set(swept) else "-".join(f"${{{name}}}" for name in swept)
    return f"the runs of a sweep need folders of their own, such as '{key}={folder}/{own}'"
