"""The roofline against every row of the public kernel files, and shapes and devices that it did not see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiles import layers
from profiles.check import check_file
from profiles.curves import (
    FAMILIES,
    cross_validated,
    errors_of,
    fitted,
    operators_in,
    quantiles,
    rows_of,
    told,
)
from profiles.gemm_tables import held_out
from profiles.measured import Measured
from profiles.named import device_named
from profiles.predict import predicted_s, relative_errors
from sim.cost.efficiency import Efficiency
from sim.cost.gemm_table import gemm_tables

PREFIX = {"a100_80gb": "a100_sxm", "h200": "h200_sxm"}
FAMILY = {family.name: family for family in FAMILIES}
# Median and p90. A launch outside a graph is whatever the host is.
BOUNDS = {
    "gemm": (0.08, 0.20),
    "context attention": (0.08, 0.20),
    "generation attention": (0.08, 0.20),
    "nccl": (0.08, 0.20),
    "all-reduce": (0.08, 0.25),
}
CASES = [(device, family) for device in PREFIX for family in BOUNDS]


@pytest.fixture(scope="module")
def measured(data: Path) -> dict[str, list[Measured]]:
    return {device: operators_in(data / "kernels", prefix) for device, prefix in PREFIX.items()}


@pytest.mark.parametrize(("device", "family"), CASES)
def test_the_device_files_constants_reach_the_bounds(
    measured: dict[str, list[Measured]], device: str, family: str
) -> None:
    spec = device_named(device)
    own = rows_of(FAMILY[family], measured[device])
    errors = np.concatenate([relative_errors(m, predicted_s(m, spec)) for m in own])
    median, p90 = quantiles(errors)
    assert median <= BOUNDS[family][0] and p90 <= BOUNDS[family][1]


@pytest.mark.parametrize(("device", "family"), CASES)
def test_shapes_that_were_left_out_are_predicted_as_well(
    measured: dict[str, list[Measured]], device: str, family: str
) -> None:
    spec = device_named(device)
    own = rows_of(FAMILY[family], measured[device])
    median, p90 = quantiles(cross_validated(FAMILY[family], own, spec, Efficiency.of(spec)))
    assert median <= BOUNDS[family][0] and p90 <= BOUNDS[family][1]


@pytest.mark.parametrize("device", PREFIX)
def test_a_fit_from_the_shipped_constants_stays_there(
    measured: dict[str, list[Measured]], device: str
) -> None:
    """What is shipped is what the program fits."""
    spec = device_named(device)
    start = Efficiency.of(spec)
    again = fitted(measured[device], spec, start)
    for name in FAMILY["gemm"].constants[:5]:
        assert getattr(again, name) == pytest.approx(getattr(start, name), rel=0.03), name


@pytest.mark.parametrize("device", PREFIX)
def test_gemm_corrections_hold_between_their_nodes(measured: dict[str, list[Measured]], device: str) -> None:
    (own,) = rows_of(FAMILY["gemm"], measured[device])
    spec = device_named(device)
    errors = relative_errors(own, predicted_s(own, spec, gemm="table"))
    median, p90 = quantiles(errors)
    assert median < 0.03 and p90 < 0.13
    curve, _ = quantiles(relative_errors(own, predicted_s(own, spec, gemm="curve")))
    left_out, left_out_p90 = quantiles(held_out(own, spec))
    assert left_out < 0.75 * curve and left_out_p90 < 0.15


def test_shipped_corrections_say_where_they_come_from() -> None:
    assert {device for table in gemm_tables() for device in table.devices} == set(PREFIX)
    for table in gemm_tables():
        assert table.licence and table.date and "held out" in table.error
        assert "aiconfigurator" in table.source


@pytest.mark.parametrize("device", layers.FILES)
def test_layers_of_an_engine_are_met(data: Path, device: str) -> None:
    """Products are fitted to the A100's file; of the H100's, nothing but its short kernels is."""
    lines = check_file(data / "kernel-profiles" / layers.FILES[device], device_named(device), None, 1)
    errors = {line.name: line.median for line in lines}
    assert errors["whole layer"] < 0.05
    for name in ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"):
        assert errors[name] < 0.10


def test_layers_are_met_by_constants_that_have_not_seen_them(data: Path) -> None:
    """Another device and model: all constants from the A100. Other degrees of tensor parallelism: the rest."""
    lines = {line.device: line.errors for line in layers.layer_table(data / "kernel-profiles")}
    assert lines["h100"]["device held out"][0] < 0.05
    assert lines["a100_80gb"]["device held out"][0] < 0.11
    assert max(lines[device]["degrees held out"][0] for device in lines) < 0.05


@pytest.mark.parametrize(("device", "other"), [("a100_80gb", "h200"), ("h200", "a100_80gb")])
def test_products_and_collectives_of_another_architecture_are_predicted(
    measured: dict[str, list[Measured]], device: str, other: str
) -> None:
    """GEMM and decodes by the datasheet; collectives only when the device's own latency is given."""
    spec = device_named(device)
    generation = Efficiency.of(spec).attention_generation
    borrowed = replace(Efficiency.of(device_named(other)), attention_generation=generation)
    given = told(borrowed, Efficiency.of(spec))
    for family, constants, bound in (
        ("gemm", borrowed, 0.11),
        ("generation attention", borrowed, 0.10),
        ("nccl", given, 0.11),
    ):
        own = rows_of(FAMILY[family], measured[device])
        assert quantiles(errors_of(own, spec, constants))[0] < bound, family
