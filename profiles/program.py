"""Measured profiles: what is shipped, how they are fitted, and how far predictions are from them.

    coserve profile collect [device=NAME model=NAME] [seconds=360] [out=FILE] [restart=true]
    coserve profile show [NAME|FILE]
    coserve profile fit FILE [device=NAME model=NAME tp=N]
    coserve profile check FILE device=NAME [model=NAME] [tp=N] [gemm=layer|table|curve] [cost=roofline|table]
                          [unit=ms|us|s] [bound_median=8] [bound_p90=20] [device.NUMBER=VALUE ...]
    coserve profile curves DATA_FOLDER

`collect` times the engine of this machine and needs a GPU for models of any size; `collect --help` lists its keys.
DATA_FOLDER holds the public measurements; its `kernels` may be named as well. Settings are key=value, as in
`coserve simulate`. NAME of a device or model may be a YAML file of the form of `configs/device` or
`configs/model`. A device may be changed, or without a NAME be described, by numbers of its datasheet:
device.peak_flops, device.memory_bandwidth_bytes_s and device.sms, and if need be device.vector_flops,
device.link_bandwidth_bytes_s or an efficiency (`sim.cost.efficiency`), e.g. device.attention_generation=3 for
Hopper. Exit code 2 with one line for a broken file or setting, 1 when a bound is exceeded.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from profiles import fit as fitting
from profiles.card import named_beside
from profiles.check import COSTS, CheckLine, above, check_file
from profiles.curves import FILES, Line, fitted, shared, table
from profiles.held_out import held_out, sources_in
from profiles.layers import layer_table
from profiles.measured import UNITS, has_operators, read_measured
from profiles.named import device_described, device_named, known_name, model_named
from profiles.rows import Measured, read_frame
from profiles.schema import PATHS, Profile, find_profile, is_profile, profile_names, read_profile
from profiles.settings import settings_of, whole_number
from sim.core.specs import LoraSpec
from sim.cost.context import CostContext
from sim.cost.efficiency import Efficiency
from sim.cost.gemm_table import GEMMS, gemm_tables
from sim.errors import USER_ERROR, message, nearest, one_line, report
from sim.usage import usage

ABOVE_BOUND = 1
KERNELS = "kernels"
"""In DATA_FOLDER: `curves` takes either."""
COLLECT = "Time the engine of this machine on a designed grid of work, and write a profile."
COLLECT_CONFIG = Path(__file__).resolve().parent.parent / "engine" / "configs" / "profile.yaml"
"""What is told of `collect` without loading torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(one_usage())
        return 0 if arguments else USER_ERROR
    programs = {"collect": _collect, "show": _show, "fit": _fit, "check": _check, "curves": _curves}
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in programs:
            raise ValueError(
                f"no program named {name!r}{nearest(name, programs)}; known: {', '.join(programs)}"
            )
        if {"--help", "-h"} & set(rest):
            print(
                usage("coserve profile collect", COLLECT, COLLECT_CONFIG)
                if name == "collect"
                else f"usage: {inspect.getdoc(programs[name])}"
            )
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code = programs[name](rest)
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            print(f"note: {text}", file=sys.stderr)
        return code
    except (ValueError, OSError, ArithmeticError) as error:
        return report("coserve profile", error, message(error) or one_line(str(error)))


def one_usage() -> str:
    assert __doc__ is not None
    return __doc__.strip()


def _number(settings: dict[str, str], key: str) -> float | None:
    if key not in settings:
        return None
    try:
        value = float(settings[key])
    except ValueError:
        raise ValueError(f"{key} must be a number of at least 0, got {settings[key]!r}") from None
    if not value >= 0:
        raise ValueError(f"{key} must be a number of at least 0, got {settings[key]!r}")
    return value


def _choice(settings: dict[str, str], key: str, known: Sequence[str]) -> str:
    value = settings.get(key, known[0])
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}")
    return value


def _one_file(names: Sequence[str], program: str) -> Path:
    if len(names) != 1:
        raise ValueError(f"{program} takes one FILE, got {len(names)}")
    return Path(names[0])


def _check(arguments: Sequence[str]) -> int:
    """coserve profile check FILE device=NAME [model=NAME] [tp=N] [gemm=layer|table|curve]
        [cost=roofline|table] [unit=ms|us|s] [bound_median=8] [bound_p90=20] [device.NUMBER=VALUE ...]

    Compare measured rows, of operators or of whole iterations, with what the cost model predicts for them: median,
    90th percentile, worst and mean error of each operator in per cent. `unit` is that of times in FILE whose
    columns do not say it. Exit code 1 when a bound, in per cent, is exceeded. What device.NUMBER may be, and
    what NAME, is said by `coserve profile --help`.
    """
    known = ("device", "device.", "model", "tp", "cost", "gemm", "unit", "bound_median", "bound_p90")
    names, settings = settings_of(arguments, known)
    path = _one_file(names, "check")
    numbers = {k.removeprefix("device."): v for k, v in settings.items() if k.startswith("device.")}
    if "device" not in settings and not numbers:
        raise ValueError("check needs device=NAME, see configs/device, or a device's numbers")
    device = device_described(settings.get("device"), numbers)
    of_model, of_tp = named_beside(path)
    name = settings.get("model", of_model)
    model = model_named(name) if name is not None else None
    tp = whole_number(settings, "tp", of_tp or (model.tp if model is not None else 1))
    if of_tp not in (None, tp):
        raise ValueError(f"{path}: measured on one of {of_tp} devices; leave out tp={tp}, or ask for that")
    if model is not None and of_model is not None and known_name("model", of_model, [model.name]) is None:
        warnings.warn(f"{path}: measured for {of_model}, judged by the shapes of {model.name}", stacklevel=2)
    bounds = _number(settings, "bound_median"), _number(settings, "bound_p90")
    cost = _choice(settings, "cost", COSTS)
    gemm = _choice(settings, "gemm", GEMMS) if "gemm" in settings else None
    unit = _choice(settings, "unit", tuple(UNITS)) if "unit" in settings else None
    changed = bool(numbers) and "device" in settings
    lines = check_file(path, device, model, tp, cost, gemm, changed=changed, unit=unit)
    print(f"{path}: {device.name}, {cost}" + (f", gemm={gemm}" if gemm is not None else ""))
    _print_lines(lines)
    found = above(lines, *bounds)
    for text in found:
        print(f"above the bound: {text}", file=sys.stderr)
    return ABOVE_BOUND if found else 0


def _print_lines(lines: Sequence[CheckLine]) -> None:
    width = max(len(line.name) for line in lines)
    print(f"{'operator':<{width}} {'rows':>7} {'median':>8} {'p90':>8} {'worst':>8} {'bias':>8}  worst row")
    for e in lines:
        numbers = " ".join(f"{100 * value:6.1f} %" for value in (e.median, e.p90, e.worst))
        print(f"{e.name:<{width}} {e.rows:>7} {numbers} {100 * e.bias:+6.1f} %  {e.worst_row}")


def _collect(arguments: Sequence[str]) -> int:
    from profiles.collect import main as collect

    return collect(arguments)


def _fit(arguments: Sequence[str]) -> int:
    """coserve profile fit FILE|NAME [device=NAME model=NAME tp=N]

    Fit a profile of whole iterations as cost=table does, and print how well it fits (5-fold cross-validated), what
    range was measured and what was not. Kinds of work without rows are derived from the roofline for the
    device and the model that the file names, or that are given.
    """
    names, settings = settings_of(arguments, ("device", "model", "tp"))
    path = _one_file(names, "fit")
    if path.exists() and has_operators(list(read_frame(path).columns)):
        raise ValueError(f"{path}: has operators; allowed: rows of whole iterations (check takes operators)")
    profile = read_profile(find_profile(str(path)))
    context = _context(profile, settings)
    describe(profile, context)
    return 0


def describe(profile: Profile, context: CostContext | None = None) -> None:
    """Print how well a table fits a profile, and where it ends."""
    done = fitting.fit(profile, context)
    print(f"{profile.file}: {len(profile.seconds)} rows")
    print(f"{'regime':<32} {'rows':>6} {'median':>8} {'p90':>8} {'worst':>8}  (5-fold cross-validated)")
    for e in fitting.cross_validated(profile):
        numbers = " ".join(f"{100 * value:6.1f} %" for value in (e.median, e.p90, e.worst))
        print(f"{e.regime:<32} {e.rows:>6} {numbers}  row {e.worst_row}")
    for name, (least, most) in done.table.ranges.items():
        if most > 0:
            print(f"measured {name}: {least:g} to {most:g}; beyond it extrapolates")
    missing = [kind for kind, name in fitting.KINDS.items() if not profile.columns[name].any()]
    if done.derived:
        print(f"not measured: {', '.join(done.derived)}; derived from the roofline times {done.factor:.2f}")
    elif missing:
        print(
            f"not measured: {', '.join(missing)}; costs nothing without device= and model= to derive it for"
        )


def _context(profile: Profile, settings: dict[str, str]) -> CostContext | None:
    of = profile.provenance
    device = settings.get("device", of.device if of is not None else None)
    model = settings.get("model", of.model if of is not None else None)
    if device is None or model is None:
        if "tp" in settings or device != model:
            raise ValueError("fit needs both device=NAME and model=NAME, or neither")
        return None
    shape = model_named(model)
    tp = whole_number(settings, "tp", of.tp if of is not None else shape.tp)
    shape.check_tp(tp)
    return CostContext(device=device_named(device), model=shape, tp=tp, lora=LoraSpec(), seed=0)


def _show(arguments: Sequence[str]) -> int:
    """coserve profile show [FILE|NAME]

    What a profile or a file of measured operators holds: rows, where they come from, the range of each column.
    Without a name, what is shipped.
    """
    names, _ = settings_of(arguments, ())
    if not names:
        _show_all()
        return 0
    path = _one_file(names, "show")
    if path.exists() and not is_profile(list(read_frame(path).columns)):
        of_model, of_tp = named_beside(path)
        model = None if of_model is None else model_named(of_model)
        for measured in read_measured(path, model, of_tp or 1):
            _show_measured(measured)
        return 0
    profile = read_profile(find_profile(str(path)))
    print(f"{profile.file}: {len(profile.seconds)} rows of whole iterations")
    for key, value in asdict(profile.provenance).items() if profile.provenance is not None else ():
        print(f"{key:<10} {value}")
    for key, about in _flat(profile.collected or {}):
        print(f"{key:<{max(10, len(key))}} {about}")
    for name, values in profile.columns.items():
        print(f"{name:<24} {np.nanmin(values):>14g} .. {np.nanmax(values):g}")
    return 0


def _flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of nested mappings, lists with commas."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list | tuple)
            yield (
                f"{prefix}{key}",
                ", ".join(map(str, value)) if listed else "-" if value is None else str(value),
            )


def _show_all() -> None:
    for name in profile_names():
        of = read_profile(find_profile(name)).provenance
        print(
            f"{name:<32} whole iterations; "
            + (f"{of.source}, {of.date}, {of.licence}" if of is not None else "")
        )
    for item in gemm_tables():
        print(f"{item.name:<32} {item.shape_text()}; for {', '.join(item.devices)}")
        print(f"{'':<32} {item.source}, {item.date}, {item.licence}")
        print(f"{'':<32} {item.error}")
    if not profile_names():
        print(f"no profile of whole iterations is shipped; with one of your own: {PATHS}")


def _show_measured(measured: Measured) -> None:
    print(f"{measured.operator}: {len(measured.seconds)} rows")
    for name, values in measured.columns.items():
        print(f"  {name:<10} {values.min():>12g} .. {values.max():g}")
    print(f"  {'seconds':<10} {measured.seconds.min():>12.3g} .. {measured.seconds.max():.3g}")


def _curves(arguments: Sequence[str]) -> int:
    """coserve profile curves DATA_FOLDER

    Errors of the roofline on the public kernel measurements in DATA_FOLDER, operators and whole layers, median and
    90th percentile in per cent: with constants fitted on the same rows, on other shapes, on other devices, and
    on all devices at once.
    """
    names, _ = settings_of(arguments, ())
    folder = _one_file(names, "curves")
    if folder.resolve().name == KERNELS and not (folder / KERNELS).is_dir():
        folder = folder.resolve().parent
    sources = sources_in(folder)
    devices = [(sources[name].device, sources[name].measured) for name in FILES]
    own = [(device, fitted(rows, device, Efficiency.of(device)), rows) for device, rows in devices]
    for (device, rows), one_set in zip(devices, shared(own), strict=True):
        other = held_out(device.name, sources)
        _print_errors(list(table(device, rows, Efficiency.of(device), other, one_set)))
    _print_errors(layer_table(folder / "kernel-profiles"))
    return 0


def _print_errors(lines: Sequence[Line]) -> None:
    if not lines:
        return
    heads = " ".join(f"{name:>22}" for name in lines[0].errors)
    print(f"{'device':<10} {'operator':<22} {'rows':>6} {heads}  (median / p90)")
    for line in lines:
        cells = " ".join(f"{f'{100 * a:.1f} / {100 * b:.1f} %':>22}" for a, b in line.errors.values())
        print(f"{line.device:<10} {line.operator:<22} {line.rows:>6} {cells}")


if __name__ == "__main__":
    sys.exit(main())
