"""What holds for every test.

One thread for torch, in it and in every process that it starts, as in `make test`: where several threads of a process
are the first to call one of MKL's vector functions, MKL 2024.2 (that of torch 2.13 on x86) may give one of them a
kernel of half the bits, for that call. Once, a gradient in float64 was 2.9e-10 off: what comes out when the first third
of the exponentials under its log-sum-exp are of that kernel.

Properties are tried on the same examples every time, however long one takes.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

# Before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

# Tests on a GPU have no properties, and need not bring it.
if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("same")
