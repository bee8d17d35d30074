"""Random streams: one generator per purpose, all from the run's seed.

Generators keyed by name instead of drawn from one another, so that asking one of them for more (other
lengths, more adapters) moves nothing in the others.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np

from sim.workload.checks import check_whole


def stream(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The generator of `purpose` (and of its `index`-th user: a client, a pipeline)."""
    check_whole("seed", seed, at_least=0)
    key = (crc32(purpose.encode()), *index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
