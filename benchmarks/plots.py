# SPDX-License-Identifier: Apache-2.0
"""Plots by matplotlib as SVG text: the same data gives the same bytes on every machine.

A plot has a title that states the finding, a sentence for readers who cannot see it, and one colour for each
contestant, the same in every plot of docs/.
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

# One colour for each contestant (Okabe and Ito's palette, which colour-blind readers can tell apart).
COLOURS = {
    "INT8": "#0072b2",
    "INT8, stock config": "#56b4e9",
    "INT8, oneDNN": "#56b4e9",
    "INT8, stock vLLM": "#cc79a7",
    "INT8, expert by expert": "#56b4e9",
    "INT8, fused_experts_cpu": "#cc79a7",
    "INT8, compressed-tensors": "#009e73",
    "FP8": "#e69f00",
    "BF16": "#d55e00",
    "limit": "#333333",
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


def _to_svg(figure: Figure, title: str, description: str) -> str:
    """The figure's SVG with `title` and `description` for screen readers.

    Coordinates are rounded to a hundredth of a point: their last digits are those of a processor's logarithm. Raises
    ValueError where text ends outside.
    """
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    if min(drawn.min) < 0 or any(drawn.max > figure.get_size_inches()):
        raise ValueError(f"{title}: text ends outside the picture")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), text.getvalue())
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
