# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG text: the same data gives the same bytes on every machine.

A plot has a title that states the finding, a sentence for readers who cannot see it, and one colour for each
contestant, the same in every plot of docs/.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

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
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"
INK, GRID = "#222222", "#dddddd"


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


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _shown(value: float) -> str:
    """Three digits, thousands with commas."""
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _text(
    x: float, y: float, words: str, size: int = 12, anchor: str = "start", fill: str = INK, more: str = ""
) -> str:
    return (
        f'<text x="{_number(x)}" y="{_number(y)}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{more}>'
        f"{escape(words)}</text>"
    )


def _wrap(words: str, width: int) -> list[str]:
    """`words` in lines of at most `width` characters."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _page(width: int, height: int, title: str, description: str, body: Iterable[str]) -> str:
    """A whole SVG, white below everything, so that it can be read on a dark page as well."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-labelledby="title description" {FONT}>',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _heading(title: str, width: int) -> tuple[list[str], float]:
    """The title's lines, and where the plot below may begin."""
    lines = _wrap(title, int((width - 32) / 10.2))
    body = [_text(16, 26 + 20 * i, line, 15, more=' font-weight="bold"') for i, line in enumerate(lines)]
    return body, 26 + 20 * len(lines)


def draw_lines(title: str, description: str, lines: Sequence[Line], y_label: str, x_label: str = "tokens") -> str:
    """Contestants over token counts, both axes logarithmic; the last line lies on top.

    y_label: what is measured, with its unit.
    """
    width, height, left, right, bottom = 760, 440, 70, 200, 56
    body, top = _heading(title, width)
    top += 14
    xs = [x for line in lines for x in line.points]
    ys = [y for line in lines for y in line.points.values()]
    x_low, x_high = math.log(min(xs)), math.log(max(xs))
    y_low, y_high = math.log(min(ys) / 1.15), math.log(max(ys) * 1.15)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / (x_high - x_low)
        up = (math.log(y) - y_low) / (y_high - y_low)
        return left + across * (width - left - right), height - bottom - up * (height - bottom - top)

    edge = width - right
    for power in range(math.floor(y_low / math.log(10)), math.ceil(y_high / math.log(10)) + 1):
        for digit in (1, 2, 5):
            tick = digit * 10.0**power
            if y_low <= math.log(tick) <= y_high:
                y = at(min(xs), tick)[1]
                body.append(f'<path d="M{left} {_number(y)}H{edge}" stroke="{GRID}"/>')
                body.append(_text(left - 8, y + 4, f"{tick:g}" if tick < 1000 else f"{tick:,.0f}", anchor="end"))
    for tick in TOKENS:
        if min(xs) <= tick <= max(xs):
            x = at(tick, min(ys))[0]
            body.append(f'<path d="M{_number(x)} {_number(top)}V{height - bottom}" stroke="{GRID}"/>')
            body.append(_text(x, height - bottom + 18, str(tick), anchor="middle"))
    body.append(f'<path d="M{left} {_number(top)}V{height - bottom}H{edge}" stroke="{INK}" fill="none"/>')
    body.append(_text((left + edge) / 2, height - 14, x_label, anchor="middle"))
    y = (top + height - bottom) / 2
    body.append(_text(18, y, y_label, anchor="middle", more=f' transform="rotate(-90 18 {_number(y)})"'))
    for line in lines:
        path = "M" + "L".join(f"{_number(a)} {_number(b)}" for a, b in (at(x, y) for x, y in line.points.items()))
        dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
        body.append(
            f'<path d="{path}" fill="none" stroke="{COLOURS[line.name]}" stroke-width="{line.width:g}"{dashes} '
            'stroke-linejoin="round"/>'
        )
        if not line.dashed:
            for x, y in line.points.items():
                a, b = at(x, y)
                body.append(
                    f'<circle cx="{_number(a)}" cy="{_number(b)}" r="{line.width / 2 + 1:g}" '
                    f'fill="{COLOURS[line.name]}"/>'
                )
    # names at the right, in the order of the lines' ends, no two on each other
    ends = sorted((at(*list(line.points.items())[-1])[1], line.name) for line in lines)
    place = 0.0
    for end, name in ends:
        place = max(end + 4, place + 16)
        body.append(_text(edge + 10, place, name, fill=COLOURS[name]))
    return _page(width, height, title, description, body)


def draw_bars(title: str, description: str, panels: Sequence[Bars]) -> str:
    """Panels beside each other, each with its own scale from 0; whiskers show the lowest and highest run."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    width, gap, room = 760, 18, 190
    each = (width - 2 * 16 - gap * (len(panels) - 1)) / len(panels)
    body, top = _heading(title, width)
    x = 16.0
    for name in names:
        if x + 32 + 7 * len(name) > width:
            x, top = 16.0, top + 20
        body.append(f'<rect x="{_number(x)}" y="{_number(top)}" width="12" height="12" fill="{COLOURS[name]}"/>')
        body.append(_text(x + 18, top + 11, name))
        x += 32 + 7.4 * len(name)
    top += 32
    rows = max(len(_wrap(panel.heading, int(each / 6.6))) for panel in panels)
    floor = top + 15 * rows + 22 + room
    for i, panel in enumerate(panels):
        left = 16 + i * (each + gap)
        for n, row in enumerate(_wrap(panel.heading, int(each / 6.6))):
            body.append(_text(left, top + 10 + 15 * n, row))
        most = max(high for _, _, high in panel.values.values())
        step = each / len(names)
        for n, name in enumerate(names):
            if name not in panel.values:
                continue
            middle, low, high = panel.values[name]
            a, tall = left + n * step, middle / most * room
            body.append(
                f'<rect x="{_number(a + 2)}" y="{_number(floor - tall)}" width="{_number(step - 4)}" '
                f'height="{_number(tall)}" fill="{COLOURS[name]}"/>'
            )
            x, upper, lower = a + step / 2, floor - high / most * room, floor - low / most * room
            if high > low:
                body.append(f'<path d="M{_number(x)} {_number(upper)}V{_number(lower)}" stroke="{INK}"/>')
            body.append(_text(x, upper - 5, _shown(middle), 9 if step < 42 else 11, "middle"))
        body.append(f'<path d="M{_number(left)} {_number(floor)}H{_number(left + each)}" stroke="{INK}"/>')
    return _page(width, math.ceil(floor + 16), title, description, body)


def draw_table(
    title: str, description: str, columns: Sequence[tuple[str, int]], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """A table as a terminal shows it. columns: heading and width in characters; rows: colour and cells."""
    place, starts = 20.0, []
    for _, wide in columns:
        starts.append(place)
        place += 8.2 * wide + 12
    width = math.ceil(place + 8)
    body, top = _heading(title, width)
    top += 16

    def put(cells: Sequence[str], y: float, colour: str, more: str) -> None:
        body.extend(_text(x, y, cell, 13, fill=colour, more=more) for x, cell in zip(starts, cells, strict=True))

    put([name for name, _ in columns], top, "#666666", "")
    body.append(f'<path d="M20 {_number(top + 8)}H{width - 20}" stroke="{GRID}"/>')
    mono = " font-family='DejaVu Sans Mono, Menlo, monospace' xml:space='preserve'"
    for i, (colour, cells) in enumerate(rows):
        put(cells, top + 30 + 24 * i, colour, mono)
    return _page(width, math.ceil(top + 30 + 24 * len(rows)), title, description, body)
