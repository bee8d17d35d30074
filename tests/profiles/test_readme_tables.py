"""Errors in the tables of `profiles/README.md` are those that the code computes: what is in sample, and layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles import layers
from profiles.check import check_file
from profiles.curves import FAMILIES, FILES, Line, errors_of, fit_family, operators_in, quantiles, rows_of
from profiles.named import device_named, model_named
from sim.cost.efficiency import Efficiency

README = Path(__file__).parents[2] / "profiles" / "README.md"
DEVICES = {"A100": "a100_80gb", "H100": "h100", "H200": "h200"}
OPERATORS = {
    "GEMM, curve": "gemm",
    "NCCL, 4 collectives": "nccl",
    "one-kernel all-reduce": "all-reduce",
    "the same in a graph": "all-reduce vllm_graph",
    "products": "product",
    "prefill without context": "context attention",
    "prefill after a context": "context attention after a context",
    "decodes": "generation attention",
}
"""What the tables call an operator -> what the code does, where that is another."""
FAMILY = {family.name: family for family in FAMILIES}

pytestmark = pytest.mark.filterwarnings("ignore:.*in sample", "ignore:.*an extrapolation")


def table(head: str) -> dict[str, list[str]]:
    """Cells of the lines under `head`, by their first ones: device and operator, or one of both."""
    lines = README.read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith(head))) + 2
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            return found
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = 2 if cells[0] in DEVICES else 1
        found[" ".join(cells[:names])] = cells[names:]
    raise AssertionError("a table at the end of the file")


def assert_is(cell: str, found: tuple[float, float], what: str) -> None:
    """The cell is `found` in per cent, rounded; a hundredth for another machine's arithmetic."""
    told = [float(part) for part in cell.split(" / ")]
    assert told == pytest.approx([100 * part for part in found], abs=0.06), what


@pytest.mark.parametrize("card", ["A100", "H200"])
def test_kernels_in_sample(data: Path, card: str) -> None:
    name = DEVICES[card]
    device, measured = device_named(name), operators_in((data / FILES[name]).parent, Path(FILES[name]).name)
    start = Efficiency.of(device)
    lines = {what: cells for what, cells in table("| device | operator | rows |").items() if card in what}
    for what, (count, in_sample, *_) in lines.items():
        operator = what.removeprefix(f"{card} ")
        if operator == "GEMM, curve and corrections":
            (gemm,) = (data / "kernels").glob(f"{Path(FILES[name]).name}_gemm*.csv")
            (line,) = check_file(gemm, device, None, 1)
            assert_is(in_sample, (line.median, line.p90), what)
            continue
        known = OPERATORS.get(operator, operator)
        own = rows_of(FAMILY["all-reduce" if "all-reduce" in known else known], measured)
        fitted = fit_family(FAMILY[known.partition(" vllm")[0]], own, device, start)
        part = [m for m in own if m.operator.startswith(known)]
        assert_is(in_sample, quantiles(errors_of(part, device, fitted)), what)
        assert int(count.replace(",", "")) == sum(len(m.seconds) for m in part), what


@pytest.fixture(scope="module")
def layer_lines(data: Path) -> dict[tuple[str, str], Line]:
    return {(line.device, line.operator): line for line in layers.layer_table(data / "kernel-profiles")}


def test_whole_layers(layer_lines: dict[tuple[str, str], Line]) -> None:
    for what, cells in table("| file | as shipped |").items():
        (card,) = [name for name in DEVICES if name in what]
        line = layer_lines[DEVICES[card], "whole layer"]
        for cell, (how, found) in zip(cells, line.errors.items(), strict=True):
            assert_is(cell, found, f"{what}: {how}")


def test_operators_of_layers(layer_lines: dict[tuple[str, str], Line]) -> None:
    for what, cells in table("| operator | A100 as shipped |").items():
        lines = [layer_lines[name, OPERATORS.get(what, what)] for name in layers.FILES]
        found = [(line.device, *item) for line in lines for item in line.errors.items()]
        for cell, (card, how, errors) in zip(cells, found, strict=True):
            assert_is(cell, errors, f"{what} of {card}: {how}")


def test_an_ada_card_in_sample(data: Path) -> None:
    card, model = device_named("rtx_4090"), model_named("llama_3_1_8b")
    folder = data / "vllm-runs" / "kernel-profile-RTX4090"
    files = [folder / "attention.csv", folder / "dense.csv"]
    found = {line.name: line for path in files for line in check_file(path, card, model, 1)}
    for what, (count, _, in_sample) in table("| operator | rows | datasheet alone").items():
        line = found[OPERATORS.get(what, what)]
        assert_is(in_sample, (line.median, line.p90), what)
        assert int(count.replace(",", "")) == line.rows, what
