"""One thread for torch in every test and in every process that one starts, as in `make test`.

Where several threads of a process are the first to call one of MKL's vector functions, MKL 2024.2 (that of torch 2.13
on x86) may give one of them a kernel of half the bits, for that call. Once, a gradient in float64 was 2.9e-10 off: what
comes out when the first third of the exponentials under its log-sum-exp are of that kernel.
"""

from __future__ import annotations

import os

# Before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"
