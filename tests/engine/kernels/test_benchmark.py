"""What can be said of the kernels' benchmark without a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.benchmarks.kernels import cases, copies

LARGEST_CACHE_BYTES = 126 * 2**20
"""L2 of a B200; an H200 has 60 MB."""


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="two cases are held against Liger's"
)
def test_no_case_is_timed_on_inputs_that_the_cache_holds() -> None:
    found = list(cases())
    assert len(found) > 20
    for case in found:
        assert copies(case) * case.bytes_moved > 2 * LARGEST_CACHE_BYTES, case.name
