"""The report's pictures: their data and their coordinates, in SVG user units. `templates/pictures.svg.j2` draws them; no plotting
library is needed. What tells two curves apart is never colour alone: an area, a dash pattern, a marker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

MOST_POINTS = 640  # of a line: more than there are pixels says nothing more
MOST_DECADES = 9  # below the largest value: what is smaller lies on the axis
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve. ``kind`` decides how it is drawn: "engine", "noise" (an area below it), "limit", or "series0" to "series7".

    Infinity and NaN cannot be drawn: the line has a gap there, and a cross at the upper end.
    """

    label: str
    values: Sequence[float]
    kind: str


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle and its x axis, which has ``count`` places."""

    title: str
    about: str
    width: int = 720
    height: int = 250
    left: int = 62
    top: int = 34

    @property
    def right(self) -> int:
        """x of the right end of the plot."""
        return self.width - 14

    @property
    def bottom(self) -> int:
        """y of the lower end of the plot."""
        return self.height - 42

    @property
    def count(self) -> int:
        """Places on the x axis."""
        raise NotImplementedError

    def x(self, index: float) -> float:
        """x of a place; the only one of a plot is in its middle."""
        if self.count < 2:
            return round((self.left + self.right) / 2, 1)
        return round(self.left + (self.right - self.left) * index / (self.count - 1), 1)

    def steps(self) -> Iterator[tuple[float, str]]:
        """(x, label) of each number below the x axis: at most about a dozen, and round ones."""
        for place in range(0, self.count, _round_step(self.count / 10)):
            yield self.x(place), str(place)


@dataclass(frozen=True)
class Chart(Frame):
    """Lines over their index with a logarithmic y axis. Zeros lie on the axis. ``marks``: vertical lines with a label.
    ``ticks``: what stands below the x axis, where that is not the number of the place."""

    lines: Sequence[Line] = ()
    marks: Sequence[tuple[float, str]] = ()
    ticks: Sequence[tuple[float, str]] = ()
    x_label: str = "position"
    y_label: str = ""

    @property
    def count(self) -> int:
        """Places on the x axis: values of the longest line."""
        return max((len(line.values) for line in self.lines), default=1)

    def steps(self) -> Iterator[tuple[float, str]]:
        """(x, label) of what stands below the x axis."""
        if not self.ticks:
            yield from super().steps()
        for place, label in self.ticks:
            yield self.x(place), label

    @cached_property
    def decades(self) -> tuple[int, int]:
        """The powers of ten at the lower and the upper end of the y axis; the two differ."""
        shown = [value for line in self.lines for value in line.values if math.isfinite(value) and value > 0]
        if not shown:
            return -1, 0
        high = math.ceil(math.log10(max(shown)))
        low = max(math.floor(math.log10(min(shown))), high - MOST_DECADES)
        return low, max(high, low + 1)

    def y(self, value: float) -> float:
        """y of a value; what is below the axis lies on it."""
        low, high = self.decades
        power = min(max(math.log10(value), low), high) if value > 0 else low
        return round(self.top + (self.bottom - self.top) * (high - power) / (high - low), 1)

    def powers(self) -> Iterator[tuple[float, str]]:
        """(y, label) of each line of the grid: at most about seven powers of ten."""
        low, high = self.decades
        for power in range(low, high + 1, max(1, math.ceil((high - low) / 6))):
            yield self.y(10.0**power), f"1e{power}"

    def marked(self) -> Iterator[tuple[float, str]]:
        """(x, label) of each mark."""
        for index, label in self.marks:
            yield self.x(index), label

    def runs(self, line: Line) -> Iterator[list[Point]]:
        """The points of a line, in pieces between what cannot be drawn."""
        kept = _thinned(line.values, highest=line.kind == "noise")
        for finite, piece in groupby(kept, key=lambda item: math.isfinite(item[1])):
            if finite:
                yield [(self.x(index), self.y(value)) for index, value in piece]

    def lost(self, line: Line) -> list[float]:
        """x of what cannot be drawn: NaN and infinity."""
        return sorted({self.x(index) for index, value in enumerate(line.values) if not math.isfinite(value)})

    def marker(self, line: Line) -> bool:
        """Whether each point gets a marker: where there are few, or where the dash pattern alone would not tell."""
        return line.kind != "limit" and (len(line.values) < 32 or line.kind.startswith("series")) and len(line.values) < 140


@dataclass(frozen=True)
class Row:
    """One sequence of a strip: a letter per position ("=", "?", "~" or "x"), and where its decode begins."""

    label: str
    cells: str
    prompt_length: int


@dataclass(frozen=True)
class Strip(Frame):
    """Rows of positions. "=": the same first choice; "?": the same, where either could be right; "~": another, where either
    could be right; "x": another, where it is wrong."""

    rows: Sequence[Row] = ()
    left: int = 96
    row_height: int = 26

    @property
    def count(self) -> int:
        """Positions of the longest row, and one for the end of the last."""
        return max((len(row.cells) for row in self.rows), default=1) + 1

    @property
    def bottom(self) -> int:
        """y below the last row."""
        return self.top + self.row_height * len(self.rows)

    def y(self, number: int) -> int:
        """The upper end of a row."""
        return self.top + self.row_height * number + 4

    def runs(self, row: Row) -> Iterator[tuple[float, float, str]]:
        """(x, width, letter) of each stretch of equal letters."""
        place = 0
        for letter, cells in groupby(row.cells):
            length = len(list(cells))
            yield self.x(place), round(self.x(place + length) - self.x(place), 1), letter
            place += length


@dataclass(frozen=True)
class Whiskers(Frame):
    """A bar from the lowest to the highest value at each place, a dot at the mean; a linear axis."""

    low: Sequence[float] = ()
    mean: Sequence[float] = ()
    high: Sequence[float] = ()
    x_label: str = "layer"
    width: int = 350
    height: int = 190

    @property
    def count(self) -> int:
        """Places on the x axis."""
        return max(1, len(self.mean))

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The values at the lower and the upper end of the y axis, which holds zero where that costs little."""
        shown = [value for value in (*self.low, *self.high) if math.isfinite(value)]
        low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
        if 0 < low < high / 2:
            low = 0.0
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        return (low if low == 0 else low - room), high + room

    def x(self, index: float) -> float:
        """x of a place: none lies on the frame."""
        return round(self.left + (self.right - self.left) * (index + 0.5) / self.count, 1)

    def y(self, value: float) -> float:
        """y of a value."""
        low, high = self.ends
        inside = min(max(value, low), high) if math.isfinite(value) else high
        return round(self.top + (self.bottom - self.top) * (high - inside) / (high - low), 1)

    def powers(self) -> Iterator[tuple[float, str]]:
        """(y, label) of each line of the grid: round numbers."""
        low, high = self.ends
        step = _round_value((high - low) / 4)
        for number in range(math.ceil(low / step), math.floor(high / step) + 1):
            yield self.y(number * step), f"{number * step:.6g}"

    def bars(self) -> Iterator[tuple[float, float, float, float]]:
        """(x, y of the highest, y of the mean, y of the lowest) of each place."""
        for place, (low, mean, high) in enumerate(zip(self.low, self.mean, self.high, strict=True)):
            yield self.x(place), self.y(high), self.y(mean), self.y(low)


def _round_step(least: float) -> int:
    return max(1, math.ceil(_round_value(max(1.0, least))))


def _round_value(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _thinned(values: Sequence[float], *, highest: bool) -> list[tuple[int, float]]:
    """(index, value) of at most about `MOST_POINTS`: of each stretch the lowest and the highest, or the highest alone. What
    cannot be drawn stays as it is."""
    points = list(enumerate(values))
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS if highest else MOST_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        lost = [point for point in piece if not math.isfinite(point[1])]
        drawn = [point for point in piece if math.isfinite(point[1])]
        ends = {max(drawn, key=_value), *(() if highest else (min(drawn, key=_value),))} if drawn else set()
        kept += sorted({*lost[:1], *ends})
    return kept


def _value(point: tuple[int, float]) -> float:
    return point[1]
