"""Facts of devices: no unit mistaken, no real device refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from profiles.named import device_named
from sim.core.specs import MAGNITUDES

ROOT = Path(__file__).parents[2]
DEVICES = sorted(
    path for group in ("configs", "engine/configs") for path in (ROOT / group).glob("device/*.yaml")
)


@pytest.mark.parametrize("path", DEVICES, ids=lambda path: path.stem)
def test_a_device_a_hundred_times_smaller_or_larger_is_one_and_in_other_units_none(path: Path) -> None:
    device = device_named(str(path))
    for key, magnitude in MAGNITUDES.items():
        value = getattr(device, key)
        if not value:
            continue
        for factor in (0.01, 100.0):
            assert getattr(replace(device, **{key: value * factor}), key) == value * factor
        # Datasheets: TFLOP/s, GB/s, GB, MHz, and MiB of cache.
        scale = 1e12 if "flops" in key else 2**20 if key == "l2_bytes" else 1e6 if key == "clock_hz" else 1e9
        with pytest.raises(ValueError, match=f"^device.{key} must be .*; .*{magnitude.unit} are "):
            replace(device, **{key: value / scale})
