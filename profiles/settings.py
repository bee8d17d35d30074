"""key=value settings of commands that are not Hydra's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sim.errors import nearest


def settings_of(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Positional arguments and key=value settings; a key may be written with leading dashes. A known `group.`
    takes every key that begins with it."""
    names, settings = [], {}
    for argument in arguments:
        key, equals, value = argument.lstrip("-").partition("=")
        if not equals or Path(argument).exists():
            names.append(argument)
            continue
        key = key.replace("-", "_")
        if key not in known and f"{key.partition('.')[0]}." not in known:
            keys = [name for name in known if not name.endswith(".")]
            raise ValueError(f"no setting named {key!r}{nearest(key, keys)}; known: {', '.join(keys)}")
        settings[key] = value
    return names, settings


def whole_number(settings: Mapping[str, str], key: str, default: int) -> int:
    """A setting of at least 1."""
    value = settings.get(key, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    return int(value)
