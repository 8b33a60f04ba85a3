# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""One HTML page without anything from elsewhere: what was verified, where, and a plot of the error by layer."""

import math
from html import escape

from vllm_quark.verify.measure import LIMIT, RIGHT, STOPS, Row

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
td, th { border-bottom: 1px solid #d0d7de; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; } .good { color: #1a7f37; } .bad { color: #cf222e; }
td { overflow-wrap: anywhere; } td:nth-child(-n+3) { white-space: nowrap; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: #57606a; }
"""
# Of Okabe and Ito, told apart by colour-blind people, too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
WIDTH, HEIGHT, LEFT, RIGHT_EDGE, TOP, BOTTOM = 1000, 380, 70, 20, 40, 60
# Errors beyond these are drawn at the edge.
LEAST, MOST = 1e-5, 10.0


def make_page(title: str, machine: dict[str, str], notes: list[str], rows: list[Row]) -> str:
    """The page of a report. title: the checkpoint; machine: names and values; notes: sentences."""
    bad = sum(not row.is_good for row in rows)
    verdict = f"{bad} of {len(rows)} layers are off" if bad else f"all {len(rows)} layers are right"
    facts = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in machine.items())
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    head = "".join(
        f"<th>{name}</th>"
        for name in ("layer", "kind", "shape", "scheme", "kernel", "error", "worst token", "result", "s")
    )
    body = "".join(map(_make_row, rows))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>vllm-quark verify: {escape(title)}</h1>"
        f'<p class="verdict {"bad" if bad else "good"}">{verdict}</p><table>{facts}</table>{paragraphs}'
        f"{draw_errors(rows)}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></body></html>\n"
    )


def show_number(value: float | None) -> str:
    """An error as a percentage; "" where there is none."""
    return "" if value is None else f"{100 * value:.3g} %" if math.isfinite(value) else "no number"


def _make_row(row: Row) -> str:
    words = [row.layer, row.kind, row.shape, row.scheme, row.kernel]
    cells = "".join(f"<td>{escape(word)}</td>" for word in words)
    cells += "".join(f'<td class="number">{show_number(value)}</td>' for value in (row.error, row.worst))
    result = escape(row.status) + (f"<br>{escape(row.detail)}" if row.detail else "")
    style = "" if row.status == RIGHT else ' class="good"' if row.is_good else ' class="bad"'
    return f'<tr>{cells}<td{style}>{result}</td><td class="number">{row.seconds:.1f}</td></tr>'


def draw_errors(rows: list[Row]) -> str:
    """An SVG of each layer's error, on a logarithmic axis, in the model's order; the limit is a dashed line."""
    width, height = WIDTH - LEFT - RIGHT_EDGE, HEIGHT - TOP - BOTTOM
    errors = [r.error for r in rows if r.error is not None and math.isfinite(r.error) and r.error > 0]
    least = 10 ** math.floor(math.log10(min([LIMIT / 10, *(max(e, LEAST) for e in errors)])))
    most = 10 ** math.ceil(math.log10(max([LIMIT * 10, *(min(e, MOST) for e in errors)])))

    def x_of(index: int) -> float:
        return LEFT + width * (index + 0.5) / max(1, len(rows))

    def y_of(error: float) -> float:
        share = math.log10(min(max(error, least), most) / least) / math.log10(most / least)
        return TOP + height * (1 - share)

    kinds = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(dict.fromkeys(row.kind for row in rows))}
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="error by layer">']
    decade = least
    while decade <= most * 1.001:
        y = y_of(decade)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e8eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * decade:g} %</text>')
        decade *= 10
    y = y_of(LIMIT)
    parts.append(
        f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#cf222e" stroke-dasharray="6 4"/>'
    )
    parts.append(f'<text x="{LEFT + width}" y="{y - 5:.1f}" text-anchor="end">limit</text>')
    for i, row in enumerate(rows):
        title = f"<title>{escape(row.layer)}: {show_number(row.error) or row.status}</title>"
        x, colour = x_of(i), kinds[row.kind]
        if row.status == STOPS or row.error is None or not math.isfinite(row.error):
            parts.append(
                f'<path d="M{x - 5:.1f} {TOP - 5}l10 10m0 -10l-10 10" stroke="#cf222e" stroke-width="2.5">'
                f"{title}</path>"
            )
        else:
            edge = "none" if row.is_good else "#cf222e"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y_of(row.error):.1f}" r="5" fill="{colour}" stroke="{edge}" '
                f'stroke-width="2.5">{title}</circle>'
            )
    for i in {0, len(rows) // 2, len(rows) - 1} if rows else ():
        anchor = "start" if i == 0 else "end" if i == len(rows) - 1 else "middle"
        parts.append(
            f'<text x="{x_of(i):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{escape(rows[i].layer)}</text>'
        )
    legend_x = LEFT
    for kind, colour in kinds.items():
        parts.append(
            f'<circle cx="{legend_x + 5}" cy="{HEIGHT - 16}" r="5" fill="{colour}"/>'
            f'<text x="{legend_x + 15}" y="{HEIGHT - 12}">{escape(kind)}</text>'
        )
        legend_x += 40 + 8 * len(kind)
    parts.append(f'<text x="{LEFT}" y="18">error over the norm of the output; × : vLLM stopped, or no number</text>')
    return "".join(parts) + "</svg>"
