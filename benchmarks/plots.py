# SPDX-License-Identifier: Apache-2.0
"""Plots by matplotlib as SVG text: the same data gives the same bytes on every machine.

A plot has a title that states the finding, a sentence for readers who cannot see it, and one colour for each
contestant and each outcome, the same in every plot of docs/. No two contestants share a colour.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# One colour for each contestant (Okabe and Ito's palette and four of Tol's, which colour-blind readers can tell apart).
COLOURS = {
    "INT8": "#0072b2",
    "INT8, stock vLLM": "#cc79a7",
    "INT8, stock config": "#882255",
    "INT8, int32 sums": "#332288",
    "INT8, int32 sums, products overlap": "#117733",
    "INT8, oneDNN": "#56b4e9",
    "INT8, expert by expert": "#aa9933",
    "INT8, fused_experts_cpu": "#44aa99",
    "INT8, compressed-tensors": "#009e73",
    "FP8": "#e69f00",
    "BF16": "#d55e00",
    "reference": "#666666",
    "limit": "#333333",
}
# One colour for each way in which a run or a patch can end; a state that is not here is drawn as an empty cell.
OUTCOMES = {
    "right": "#1f7a8c",
    "per token": "#a3d5dd",
    "right in part": "#e3c16f",
    "refused": "#c9c9c9",
    "stops": "#8a8a8a",
    "wrong": "#b2182b",
    "garbage": "#b2182b",  # docs/matrix.md's word for wrong
    "dies": "#111111",
    "applies": "#5e4fa2",
    "upstream": "#c5bfe0",
}
TOKENS = (1, 8, 64, 512, 4096)
INK, GRID = "#222222", "#dddddd"
INCH = 96  # pixels of an SVG; a point is a 72nd of it
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vllm-quark",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Line:
    """One contestant's points, x to y. A wide line is meant to be seen below a narrow one that covers it."""

    name: str
    points: Mapping[float, float]
    width: float = 2.0
    dashed: bool = False


@dataclass(frozen=True)
class Bars:
    """One panel: a heading, and of each contestant its middle, lowest and highest value."""

    heading: str
    values: Mapping[str, tuple[float, float, float]]


def _round(value: float) -> str:
    """Three digits, thousands with commas."""
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _wrap_title(title: str, width: float) -> list[str]:
    return textwrap.wrap(title, int((width - 32) / 9.4))


def _new_figure(title: str, width: float, height: float) -> tuple[Figure, float]:
    """A figure of `width` by `height` pixels with its title, and the share of its height that is below the title."""
    figure = Figure((width / INCH, height / INCH))
    lines = _wrap_title(title, width)
    figure.text(16 / width, 1 - 12 / height, "\n".join(lines), va="top", size=11, weight="bold", linespacing=1.35)
    return figure, 1 - (20 + 20 * len(lines)) / height


def _round_coordinate(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _to_svg(figure: Figure, title: str, description: str) -> str:
    """The figure's SVG with `title` and `description` for screen readers.

    Coordinates are rounded to a hundredth of a point: their last digits are those of a processor's logarithm. Text is
    not rounded. Raises ValueError where text ends outside.
    """
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    if min(drawn.min) < -0.001 or any(drawn.max > figure.get_size_inches() + 0.001):
        raise ValueError(f"{title}: text ends outside the picture")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _round_coordinate, tag[0]), text.getvalue())
    svg = re.sub(r"[ \t]+$", "", svg[svg.index("<svg ") :], flags=re.M)
    head, _, body = svg.partition(">")
    head = re.sub(r'="([\d.]+)pt"', lambda m: f'="{float(m[1]) * INCH / 72:.0f}"', head)  # GitHub's pixels
    return (
        f'{head} role="img" aria-labelledby="title description">\n <title id="title">{escape(title)}</title>\n'
        f' <desc id="description">{escape(description)}</desc>{body}'
    )


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Names at the right of `axes`, in the order of the lines' ends, no two on each other."""
    to_share = axes.transScale + axes.transLimits
    ends = sorted(((to_share.transform(list(line.points.items())[-1])[1], line.name) for line in lines), reverse=True)
    step, place = 15 / INCH * axes.figure.dpi / axes.bbox.height, 2.0
    for end, name in ends:
        place = min(end, place - step)
        axes.text(1.02, place, name, color=COLOURS[name], transform=axes.transAxes, va="center")


def draw_lines(title: str, description: str, lines: Sequence[Line], y_label: str, x_label: str = "tokens") -> str:
    """Contestants over token counts, both axes logarithmic; the last line lies on top.

    y_label: what is measured, with its unit.
    """
    width, height = 760, 440
    with matplotlib.rc_context(STYLE):
        figure, top = _new_figure(title, width, height)
        axes = figure.add_axes((70 / width, 56 / height, (width - 270) / width, top - 60 / height))
        for line in lines:
            kind = {"linestyle": "--"} if line.dashed else {"marker": "o", "markersize": line.width * 0.75 + 1.5}
            xs, ys = list(line.points), list(line.points.values())
            axes.plot(xs, ys, color=COLOURS[line.name], linewidth=line.width * 0.75, clip_on=False, **kind)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        low, high = (limit(x for line in lines for x in line.points) for limit in (min, max))
        axes.set_xlim(low, high)
        axes.set_xticks([tick for tick in TOKENS if low <= tick <= high], minor=False)
        axes.xaxis.set(major_formatter=FuncFormatter(lambda x, _: f"{x:g}"), minor_locator=NullLocator())
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=FuncFormatter(lambda y, _: f"{y:g}" if y < 1000 else f"{y:,.0f}"),
            minor_formatter=NullFormatter(),
        )
        axes.grid()
        _label_ends(axes, lines)
        return _to_svg(figure, title, description)


def draw_bars(title: str, description: str, panels: Sequence[Bars]) -> str:
    """Panels beside each other, each with its own scale from 0; whiskers show the lowest and highest run."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    width, height, gap = 760, 340, 18
    each = (width - 32 - gap * (len(panels) - 1)) / len(panels)
    with matplotlib.rc_context(STYLE):
        figure, top = _new_figure(title, width, height)
        handles = [matplotlib.patches.Patch(color=COLOURS[name], label=name) for name in names]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(6 / width, top), ncols=4, frameon=False)
        top -= (30 + 16 * ((len(names) - 1) // 4)) / height
        headings = [textwrap.wrap(panel.heading, int(each / 6.2)) for panel in panels]
        top -= (20 + 16 * max(map(len, headings))) / height
        for i, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
            axes = figure.add_axes(((16 + i * (each + gap)) / width, 16 / height, each / width, top - 16 / height))
            for place, name in enumerate(names):
                if name not in panel.values:
                    continue
                middle, low, high = panel.values[name]
                axes.bar(place, middle, 0.9, color=COLOURS[name])
                if high > low:
                    axes.vlines(place, low, high, color=INK, linewidth=0.8)
                size = 6.5 if each / len(names) < 42 else 8
                axes.annotate(_round(middle), (place, high), (0, 3), textcoords="offset points", ha="center", size=size)
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.set_ylim(0, max(high for _, _, high in panel.values.values()))
            axes.set_axis_off()
            axes.axhline(0, color=INK, linewidth=1.5)
            axes.text(0, 1 + 26 / (height * (top - 16 / height)), "\n".join(heading), transform=axes.transAxes)
        return _to_svg(figure, title, description)


def _new_canvas(figure: Figure, width: int, height: int) -> Axes:
    """Axes over the whole of `figure`, in pixels from its upper left corner."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def _draw_key(axes: Axes, outcomes: Sequence[str], y: float, empty: str = "") -> None:
    """Squares with the names of `outcomes`, and of an empty cell, in one line at `y`."""
    x = 16.0
    for name in [*outcomes, empty] if empty else outcomes:
        axes.add_patch(_box(x, y - 6, 12, 12, OUTCOMES.get(name)))
        axes.text(x + 18, y, name, va="center_baseline")
        x += 42 + 7 * len(name)


def _box(x: float, y: float, width: float, height: float, colour: str | None) -> matplotlib.patches.Rectangle:
    """A filled rectangle, or only its outline where `colour` is None."""
    if colour:
        return matplotlib.patches.Rectangle((x, y), width, height, color=colour, linewidth=0)
    shape = (x + 0.5, y + 0.5), width - 1, height - 1
    return matplotlib.patches.Rectangle(*shape, facecolor="none", edgecolor=GRID, linewidth=0.75)


def draw_shares(
    title: str, description: str, groups: Mapping[str, Mapping[str, Mapping[str, int]]], label_width: int = 110
) -> str:
    """Bars of the same length, each split by how its cases ended; the counts stand in the parts or behind the bar.

    groups: heading, then a bar's name, then the number of cases of each outcome.
    """
    bars = [counts for group in groups.values() for counts in group.values()]
    outcomes = [name for name in OUTCOMES if any(counts.get(name) for counts in bars)]
    headings = [heading for heading in groups if heading]
    width, step = 760, 26
    top = 20 + 20 * len(_wrap_title(title, width))
    height = top + 44 + step * len(bars) + 30 * len(headings)
    left, whole = 16 + label_width, width - 16 - label_width - 110
    with matplotlib.rc_context(STYLE):
        figure, _ = _new_figure(title, width, height)
        axes = _new_canvas(figure, width, height)
        _draw_key(axes, outcomes, top + 14)
        y = top + 36.0
        for heading, group in groups.items():
            if heading:
                axes.text(16, y + 14, heading, va="center_baseline", weight="bold")
                y += 30
            for name, counts in group.items():
                axes.text(left - 8, y + 10, name, ha="right", va="center_baseline")
                x, total, behind = float(left), sum(counts.values()), []
                for outcome in outcomes:
                    if not (count := counts.get(outcome, 0)):
                        continue
                    wide = whole * count / total
                    axes.add_patch(_box(x, y, wide, 20, OUTCOMES[outcome]))
                    if wide < 8 * len(str(count)) + 4:
                        behind.append(f"{count} {outcome}")
                    else:
                        ink = INK if outcome in ("per token", "refused") else "#ffffff"
                        axes.text(x + wide / 2, y + 10, count, color=ink, ha="center", va="center_baseline")
                    x += wide
                axes.text(x + 6, y + 10, ", ".join(behind), va="center_baseline", size=8)
                y += step
        return _to_svg(figure, title, description)


def draw_grid(
    title: str, description: str, columns: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[str]]], empty: str
) -> str:
    """A box for each column of each row, in the colour of its state.

    groups: heading, then a row's name, then its state in each column; `empty` is the state without a colour.
    """
    rows = [states for group in groups.values() for states in group.values()]
    places: dict[str, list[tuple[float, float]]] = {}
    outcomes = [name for name in OUTCOMES if any(name in states for states in rows)]
    width, step = 760, 18
    label_width = 24 + 5.6 * max(len(name) for group in groups.values() for name in group)
    cell = (width - 32 - label_width) / len(columns)
    top = 20 + 20 * len(_wrap_title(title, width))
    height = top + 84 + step * len(rows) + 26 * sum(bool(heading) for heading in groups)
    with matplotlib.rc_context(STYLE):
        figure, _ = _new_figure(title, width, height)
        axes = _new_canvas(figure, width, height)
        _draw_key(axes, outcomes, top + 14, empty)
        left = 16 + label_width
        for i, name in enumerate(columns):
            axes.text(left + (i + 0.5) * cell, top + 64, name, rotation=90, ha="center", va="bottom", size=8)
        y = top + 68.0
        for heading, group in groups.items():
            if heading:
                axes.text(16, y + 14, heading, va="center_baseline", weight="bold")
                y += 26
            for name, states in group.items():
                axes.text(left - 8, y + step / 2, name, ha="right", va="center_baseline", size=8)
                for i, state in enumerate(states):
                    places.setdefault(state, []).append((left + (i + 0.5) * cell, y + step / 2))
                y += step
        x, y = (cell - 3) / 2, (step - 3) / 2
        box = [(-x, -y), (x, -y), (x, y), (-x, y), (-x, -y)]
        for state, centres in places.items():  # markers: SVG has each shape once
            fill, edge = (OUTCOMES[state],) * 2 if state in OUTCOMES else ("none", GRID)
            size = 2 * max(x, y) * 72 / INCH
            axes.plot(*zip(*centres, strict=True), linestyle="none", marker=box, markersize=size, mfc=fill, mec=edge)
        return _to_svg(figure, title, description)


def draw_table(
    title: str, description: str, columns: Sequence[tuple[str, int]], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """A table as a terminal shows it. columns: heading and width in characters; rows: colour and cells."""
    starts = [20.0]
    for _, wide in columns:
        starts.append(starts[-1] + 8.2 * wide + 12)
    width = starts.pop() + 8
    height = 64 + 24 * len(rows) + 20 * len(_wrap_title(title, width))
    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure, top = _new_figure(title, width, height)
        lines = [("#666666", [name for name, _ in columns], "DejaVu Sans")]
        lines += [(colour, cells, "DejaVu Sans Mono") for colour, cells in rows]
        for i, (colour, cells, family) in enumerate(lines):
            y = top - (10 + 24 * i + 8 * (i > 0)) / height
            for x, cell in zip(starts, cells, strict=True):
                shown = cell.replace("$", r"\$").replace(" ", "\u00a0")  # SVG joins spaces
                figure.text(x / width, y, shown, color=colour, family=family)
        rule = [20 / width, 1 - 20 / width], [top - 20 / height] * 2
        figure.add_artist(matplotlib.lines.Line2D(*rule, color=GRID, linewidth=1))
        return _to_svg(figure, title, description)
