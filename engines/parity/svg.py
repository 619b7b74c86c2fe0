"""A small line chart: its data and its coordinates. The template `templates/chart.svg.j2` draws it; no plotting library is
needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

COLORS = {"engine": "#c2410c", "noise": "#2563eb", "limit": "#6b7280"}
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve; values at or below zero, and NaN, are left out of a logarithmic plot."""

    label: str
    values: Sequence[float]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over their index, with a logarithmic y axis; ``marks`` are labelled vertical lines. Coordinates are SVG user
    units."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[tuple[int, str]] = ()
    width: int = 720
    height: int = 300
    left: int = 70
    top: int = 48

    @property
    def right(self) -> int:
        """x of the right end of the plot."""
        return self.width - 16

    @property
    def bottom(self) -> int:
        """y of the lower end of the plot."""
        return self.height - 46

    @cached_property
    def _decades(self) -> tuple[int, int]:
        """The powers of ten at the lower and the upper end of the y axis; the two differ."""
        shown = [value for line in self.lines for value in line.values if _drawable(value)]
        low = math.floor(math.log10(min(shown))) if shown else -1
        high = math.ceil(math.log10(max(shown))) if shown else 0
        return low, max(high, low + 1)

    @property
    def _count(self) -> int:
        return max((len(line.values) for line in self.lines), default=1)

    def _x(self, index: float) -> float:
        return round(self.left + (self.right - self.left) * index / max(1, self._count - 1), 1)

    def _y(self, value: float) -> float:
        low, high = self._decades
        return round(self.top + (self.bottom - self.top) * (high - math.log10(value)) / (high - low), 1)

    def powers(self) -> Iterator[tuple[float, str]]:
        """(y, label) of each line of the grid: at most about seven powers of ten."""
        low, high = self._decades
        for power in range(low, high + 1, max(1, (high - low) // 6)):
            yield self._y(10.0**power), f"1e{power}"

    def steps(self) -> Iterator[tuple[float, str]]:
        """(x, label) of each number below the x axis: at most twelve."""
        for step in range(0, self._count, max(1, math.ceil(self._count / 12))):
            yield self._x(step), str(step)

    def marked(self) -> Iterator[tuple[float, str]]:
        """(x, label) of each mark."""
        for index, label in self.marks:
            yield self._x(index), label

    def points(self, line: Line) -> list[Point]:
        """(x, y) of what can be drawn of a line."""
        return [(self._x(index), self._y(value)) for index, value in enumerate(line.values) if _drawable(value)]


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
