"""A small SVG line chart: enough for a self-contained report, with no plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 48, 46
COLORS = {"engine": "#c2410c", "noise": "#2563eb", "limit": "#6b7280"}


@dataclass(frozen=True)
class Line:
    """One curve; values at or below zero, and NaN, are left out of a logarithmic plot."""

    label: str
    values: Sequence[float]
    color: str
    dashed: bool = False


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], marks: Sequence[tuple[int, str]] = ()) -> str:
    """An ``<svg>`` element with a logarithmic y axis; x is the index. ``marks`` are labelled vertical lines."""
    shown = [v for line in lines for v in line.values if math.isfinite(v) and v > 0]
    low = math.floor(math.log10(min(shown))) if shown else -1
    high = math.ceil(math.log10(max(shown))) if shown else 0
    high = max(high, low + 1)
    count = max((len(line.values) for line in lines), default=1)

    def x(index: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (index / max(1, count - 1))

    def y(value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - math.log10(value)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<text x="{_LEFT}" y="16" class="title">{html.escape(title)}</text>',
    ]
    every = max(1, (high - low) // 6)
    for power in range(low, high + 1, every):
        at = y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for step in range(0, count, max(1, math.ceil(count / 12))):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{step}</text>')
    for index, label in marks:
        at = x(index)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="mark"/>')
        parts.append(f'<text x="{at + 4:.1f}" y="{_TOP + 10}">{html.escape(label)}</text>')
    for line in lines:
        points = [(x(i), y(v)) for i, v in enumerate(line.values) if math.isfinite(v) and v > 0]
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>')
        if len(points) < 24:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{line.color}"/>' for px, py in points]
    for number, line in enumerate(lines):
        at = _LEFT + 110 * number
        parts.append(f'<rect x="{at}" y="26" width="12" height="8" fill="{line.color}"/>')
        parts.append(f'<text x="{at + 16}" y="34">{html.escape(line.label)}</text>')
    parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
        f"{html.escape(y_label)}</text></svg>"
    )
    return "".join(parts)
