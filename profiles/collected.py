"""The file of a profile that is being collected: whole after every point, and gone on with by the next call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profiles.schema import COLUMNS, MORE_COLUMNS, Floats, Profile, Provenance, read_profile, write_profile
from sim.core.rows import WORK_COLUMNS

OF = ("device", "hardware", "model")
"""What a profile is of: no other is put in its place."""
CONDITIONS = ("sources", "versions", "dtype", "limits", "job", "launch", "adapters")
"""What else all rows of a profile have in common."""
SAME, TOO_LARGE, DISTURBED, BROKEN = "same", "too_large", "disturbed", "broken"
LEFT_OUT = {
    SAME: "of the same work as another",
    TOO_LARGE: "too large for the memory",
    DISTURBED: "in contradiction to others each time",
    BROKEN: "broken off",
}
"""Why a point of the design has no row."""


class ProfileFile:
    """The rows so far, and the file that always holds them."""

    def __init__(self, path: Path, about: dict[str, Any], provenance: Provenance) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.passed = 0
        """Points of the design that need no more time: timed, or left out."""
        self.left_out = dict.fromkeys(LEFT_OUT, 0)
        """Why -> how many of them have no row."""
        self._about = about
        self._provenance = provenance

    def begin(self) -> None:
        """Check that the file, if there is one, may be replaced. ValueError if it is of something else."""
        if self.path.exists():
            self._of(read_profile(self.path))

    def resume(self, open_kv: bool) -> int:
        """Take over the rows of the file if there is one; ValueError if it is of something else.

        Returns the K/V room to use: with `open_kv`, where it depends on the free memory, that of the file.
        """
        own_kv: int = self._about["limits"]["kv_tokens"]
        if not self.path.exists():
            return own_kv
        profile = read_profile(self.path)
        found = self._of(profile)
        if open_kv:
            self._about["limits"]["kv_tokens"] = found["limits"]["kv_tokens"]
        self._compare(found, CONDITIONS, "restart=true begins anew, out=FILE keeps both")
        self.passed = found["passed"]
        self.left_out |= found.get("left_out", {})
        columns = profile.columns
        self.rows = [
            {name: float(values[n]) for name, values in columns.items()} for n in range(len(profile.seconds))
        ]
        return int(self._about["limits"]["kv_tokens"])

    def _of(self, profile: Profile) -> dict[str, Any]:
        """How the file was collected. ValueError unless on this machine and of this model."""
        if profile.collected is None:
            raise ValueError(f"{self.path} was not collected with this program; out=FILE keeps it")
        self._compare(profile.collected, OF, "out=FILE keeps both")
        return profile.collected

    def _compare(self, found: Mapping[str, Any], keys: Sequence[str], way_out: str) -> None:
        for key in keys:
            if found.get(key) == self._about[key]:
                continue
            if key == "sources":
                difference = "before code that is timed was changed"
            else:
                theirs, ours = _differing(found.get(key), self._about[key])
                difference = f"with {key} {_short(theirs)}, this is {_short(ours)}"
            raise ValueError(f"{self.path} was collected {difference}; {way_out}")

    def add(self, row: dict[str, float]) -> None:
        """A row, unless its work is there already."""
        if any(all(row[name] == old[name] for name in WORK_COLUMNS) for old in self.rows):
            self.left_out[SAME] += 1
        else:
            self.rows.append(row)

    def columns(self) -> dict[str, Floats]:
        names = (*COLUMNS, *MORE_COLUMNS)
        return {name: np.array([row[name] for row in self.rows], dtype=np.float64) for name in names}

    def write(self) -> None:
        """Put the file in place; none without a row."""
        if not self.rows:
            return
        about = {**self._about, "passed": self.passed, "left_out": self.left_out}
        write_profile(self.path, self.columns(), self._provenance, about)


def points_line(collected: Mapping[str, Any], rows: int, planned: int) -> str:
    """What became of the design's points, over all calls that made the file."""
    done, left_out = collected["passed"], collected.get("left_out", {})
    reasons = [f"{count} {LEFT_OUT[why]}" for why, count in left_out.items() if count]
    # Files of before say how many points were passed and not why some have no row.
    unsaid = done - rows - sum(left_out.values())
    reasons += [f"{unsaid} for reasons that the file does not say"] if unsaid else []
    line = f"points: {done} of {max(done, planned)} of the design, {rows} measured"
    line += f"; left out {', '.join(reasons)}" if reasons else ""
    return line + ("; the same command goes on" if done < planned else "")


def _differing(a: object, b: object) -> tuple[object, object]:
    """Both without the keys in which they agree."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a, b
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return {key: a.get(key) for key in keys}, {key: b.get(key) for key in keys}


def _short(value: object) -> str:
    text = (
        ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)
    )
    return text if len(text) < 90 else text[:87] + "..."
