"""One look for all figures: a colour, marker and dash per policy, and how a figure is saved.

Families of policies have colours of Okabe and Ito ("Color Universal Design", 2008), which stay apart for
colour-blind readers. Within a family, shades differ in lightness, which everyone sees, and in marker and dash, so
that a line never depends on colour alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from analysis.repeats import alike, shared_settings, short_settings
from analysis.runs import SCENE, Row, scene, text, unusual
from analysis.table import came_at, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#E6C229"
ORANGE, VERMILION, PURPLE, GREY, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#8C8C8C", "#222222"
KEPT, MISSED = BLUE, VERMILION

DPI = 100
WIDTH_INCHES = 12.0
"""1200 pixels."""
SETTINGS_LETTERS = 110
"""As many as a title has room for."""


Dash = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]
"""As matplotlib takes it: a sign, or an offset and lengths of strokes and gaps."""


class Look(NamedTuple):
    color: str
    marker: str
    dash: Dash


_FAMILIES: dict[str, tuple[str, ...]] = {
    "coserving": ("#0072B2", "#56B4E9", "#003F63"),
    "temporal": ("#E08A00", "#C44E00", "#E8C400", "#3F1D00", "#8A2500"),
    "spatial": ("#009E73", "#66C7AA", "#005C43"),
    "separate": ("#8F3F6E", "#CC79A7", "#5E2848", "#E6B3CF"),
}
_KNOWN = (
    "coserving",
    "coserving_static",
    "coserving_slack",
    "temporal_limited",
    "temporal_dynamic",
    "temporal_64",
    "temporal_128",
    "temporal_512",
    "temporal",
    "temporal_1",
    "spatial",
    "spatial_limited",
    "spatial_stream",
    "separate_25",
    "separate_50",
    "separate_75",
    "separate",
)
_OTHERS = ("#7733FF", "#66DD00", "#DD1144", "#776600", "#FF8877", "#9988FF")
"""Of policies of no family."""
_BOUNDS = {"inference_only": Look(GREY, "v", ":"), "finetune_only": Look(BLACK, "^", ":")}
MARKERS = ("o", "s", "D", "P", "X", "*", "<", ">", "p", "h")
_DASHES: tuple[Dash, ...] = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))


def look(policy: str) -> Look:
    """The same for a policy in every figure and run; depends on its name alone."""
    if policy in _BOUNDS:
        return _BOUNDS[policy]
    family = policy.split("_")[0]
    shades = _FAMILIES.get(family)
    if shades is None:
        pick = zlib.crc32(policy.encode())
        return Look(_OTHERS[pick % len(_OTHERS)], MARKERS[pick % 10], _DASHES[pick % 4])
    if policy in _KNOWN:
        place = [name for name in _KNOWN if name.split("_")[0] == family].index(policy)
    else:
        # Another variant of a family: any shade, by its name.
        place = 1 + zlib.crc32(policy.encode()) % (3 * len(shades))
    return Look(shades[place % len(shades)], MARKERS[place % 10], _DASHES[place % 4])


def looks(policies: Mapping[str, str]) -> dict[str, Look]:
    """Display name -> its policy's look, with the next colour that is left where policies of no family would have the
    same, and the next marker where two would look the same."""
    colors: dict[str, str] = {}
    for policy in dict.fromkeys(policies.values()):
        color = look(policy).color
        left = [other for other in _OTHERS if other not in colors.values()]
        colors[policy] = left[0] if color in _OTHERS and color not in left and left else color
    out: dict[str, Look] = {}
    for name, policy in policies.items():
        chosen = look(policy)._replace(color=colors[policy])
        for marker in MARKERS:
            if chosen not in out.values():
                break
            chosen = chosen._replace(marker=marker)
        out[name] = chosen
    return out


def scene_title(rows: Sequence[Row]) -> str:
    """Workload, model and devices, what else the rows share that is not as usual, and the rate where it is the same in
    all of them."""
    parts = [*scene(rows), *unusual(rows)]
    rates = came_at(rows)
    if len(rates) == 1:
        parts += [f"{asked:.4g} req/s{came and f' asked, {came}'}" for asked, came in rates.items()]
    return ", ".join(parts)


def settings_title(rows: Sequence[Row]) -> str:
    """A line below a title: the settings that all rows were run with; empty where none were given. Where they are too
    long, keys are cut to their last words, and those that do not fit are counted."""
    settings = shared_settings(rows)
    if len(", ".join(settings)) > SETTINGS_LETTERS:
        most = SETTINGS_LETTERS // min(2, len(settings))
        settings = [shorten(setting, most) for setting in short_settings(settings)]
    line, count = ", ".join(settings), len(settings)
    while len(line) > SETTINGS_LETTERS:
        count -= 1
        line = f"{', '.join(settings[:count])} and {len(settings) - count} more"
    return f"\n{line}" if settings else ""


def seeds_title(rows: Sequence[Row], drawn: str) -> str:
    """For a title: of how many seeds the means are, and what shows their range; empty without repeats."""
    counts = {len(group) for group in alike(rows)}
    if max(counts) == 1:
        return ""
    several = f"{max(counts)}" if len(counts) == 1 else f"up to {max(counts)}"
    return f", mean of {several} seeds ({drawn}: smallest to largest)"


def check_one_scene(rows: Sequence[Row]) -> None:
    """Raise ValueError unless there are rows and they share workload, model and device."""
    if not rows:
        raise ValueError("a figure needs at least one run")
    for key in SCENE:
        values = list(dict.fromkeys(text(row, key) for row in rows))
        if len(values) > 1:
            raise ValueError(f"a figure shows one {key}, the runs have {', '.join(values[:4])}")


def new_figure(height_inches: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure 1200 pixels wide that belongs to no window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def tidy(axes: Any, grid: str) -> None:
    """Thin grid across `grid` ("x", "y" or "both"), no frame on top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def token_ticks(axis: Any, most: float) -> None:
    """Tokens per second on an axis to `most`, as tables write numbers; 0 alone where there are none."""
    axis.set_major_formatter(thousands)
    if not most > 0:
        axis.set_ticks([0])


def thousands(value: float, _: object) -> str:
    """As the tables write numbers; what is small as short as it is."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def check_suffix(path: str | Path) -> None:
    """ValueError for a kind of file that no figure can be written as."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in kinds:
        raise ValueError(f"figure {path}: the suffix must be one of {', '.join(sorted(kinds))}")


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure, kind by suffix (png, pdf, svg); one clear line if that cannot be."""
    check_suffix(path)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise OSError(f"cannot write figure {path}: {error.strerror or error}") from error
    return path
