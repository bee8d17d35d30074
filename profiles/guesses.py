"""How much the errors of a device held out rest on what `profiles.held_out` guesses.

    python -m profiles.guesses DATA_FOLDER [--draws 20]

Each draw multiplies every guess by a factor of its own, log-normal with a spread of 1.5, and predicts both devices
again. What has a source stays. Minutes: a draw is two fits of every family.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from profiles.curves import FAMILIES, FILES, errors_of, quantiles, rows_of
from profiles.held_out import GUESSED, WRITTEN_OF, Written, held_out, sources_in
from sim.cost.efficiency import SHARES
from sim.errors import message, report

SPREAD = float(np.log(1.5))
OPERATORS = ("gemm", "context attention", "generation attention", "nccl", "all-reduce")


def guessed_otherwise(random: np.random.Generator) -> Written:
    """WRITTEN_OF with other guesses; a share stays at most 1, a power between a sum, 1, and a maximum."""
    factors = dict(zip(GUESSED, np.exp(random.normal(0.0, SPREAD, len(GUESSED))).tolist(), strict=True))
    return {
        generation: {name: _within(name, value * factors.get(name, 1.0)) for name, value in written.items()}
        for generation, written in WRITTEN_OF.items()
    }


def _within(name: str, value: float) -> float:
    if name.endswith("_smoothness"):
        return max(1.0, value)
    return min(1.0, value) if name in SHARES else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m profiles.guesses", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER")
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args(argv)
    try:
        if arguments.draws < 1:
            raise ValueError(f"--draws must be at least 1, got {arguments.draws}")
        sources = sources_in(arguments.folder)
    except (ValueError, OSError) as error:
        return report(parser.prog, error, message(error))
    families = [family for family in FAMILIES if family.name in OPERATORS]
    print(f"{'device':<10} {'operator':<22} {'least':>14} {'middle':>14} {'most':>14}  (median / p90)")
    for name in FILES:
        device, measured = sources[name].device, sources[name].measured
        found = []
        for seed in range(arguments.draws):
            written = guessed_otherwise(np.random.default_rng(seed))
            constants = held_out(name, sources, families, written)
            found.append([quantiles(errors_of(rows_of(f, measured), device, constants)) for f in families])
        for family, own in zip(families, np.swapaxes(100 * np.array(found), 0, 1), strict=True):
            cells = [f"{a:.1f} / {b:.1f} %" for a, b in (own.min(0), np.median(own, 0), own.max(0))]
            print(f"{name:<10} {family.name:<22} {' '.join(f'{cell:>14}' for cell in cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
