"""Charts of a benchmark as inline SVG: they follow the colours of the page, stay sharp, and need no drawing library.

Every text passes through `markupsafe`, so that labels cannot become markup. A chart is 320 units wide, about as many
pixels on a phone; shapes tell models, simple baselines and the noise floor apart where colours do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from invirtuo.reports.tables import number

__all__ = ["Dot", "Interval", "Spread", "forest", "quality_by_cost", "scatter", "spreads"]

WIDTH = 320
NAMES = 118  # units for the names of the rows
ROW = 17
MAX_TITLES = 300  # dots with a name to hover over; more would make the page heavy
AROUND = ((11, -1), (-11, -1), (0, -12), (0, 12), (11, -11), (-11, 11), (21, -1))  # of a dot: where its number may be


@dataclass(frozen=True)
class Spread:
    """A row of :func:`spreads`: all values of one model."""

    name: str
    kind: str
    values: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A row of :func:`forest`: a difference with its interval."""

    name: str
    value: float
    low: float
    high: float
    direction: str | None = "higher"  # which side of 0 is the better one, "lower" or "higher"

    @property
    def verdict(self) -> str:
        """Whether the interval leaves 0 out, and on which side: "better", "worse" or "open"."""
        if not np.isfinite(self.low + self.high) or self.low <= 0 <= self.high or self.direction is None:
            return "open"
        return "better" if (self.high < 0) == (self.direction == "lower") else "worse"


@dataclass(frozen=True)
class Dot:
    """A numbered dot of :func:`quality_by_cost`."""

    number: int
    name: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class _Scale:
    """Values -> units between two edges, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low = np.log10(low)
            high = np.log10(high)
            value = np.log10(value)
        share = (value - low) / (high - low)
        return round(float(self.start + share * (self.end - self.start)), 1)

    def ticks(self, n: int = 4) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, n)


def spreads(rows: Sequence[Spread], low: float, high: float, *, reference: float | None, axis: str) -> Markup:
    """Mean of each row as a mark, the middle half of its values as a bar, 10 to 90 % as a line.

    Parameters
    ----------
    rows
        From top to bottom.
    low, high
        Ends of the axis.
    reference
        Where a dashed line stands, for example what a guess reaches.
    axis
        What the axis shows.
    """
    scale = _Scale(low, high, NAMES, WIDTH - 10)
    bottom = 6 + ROW * len(rows)
    elements = _vertical_grid(scale, 2, bottom, axis)
    if reference is not None:
        elements.append(_line(scale(reference), 2, scale(reference), bottom, "reference"))
    for i, row in enumerate(rows):
        y = 4 + ROW * (i + 0.5)
        elements.append(_row_name(row.name, y))
        values = row.values[np.isfinite(row.values)]
        if not len(values):
            elements.append(_text(NAMES + 4, y + 4, "no value", "tick"))
            continue
        # a line, a bar over its middle, a mark at the mean
        percentiles = np.clip(np.percentile(values, [10, 25, 75, 90]), low, high)
        p10, p25, p75, p90 = (scale(percentile) for percentile in percentiles)
        elements.append(_line(p10, y, p90, y, "whisker"))
        elements.append(_tag("rect", x=p25, y=y - 4, width=max(p75 - p25, 0.5), height=8, class_="middle"))
        mean = float(values.mean())
        x = scale(np.clip(mean, low, high))
        elements.append(_mark(x, y, row.kind, f"{row.name}: mean {number(mean)}"))
    spoken = _spoken((row.name, np.nanmean(row.values)) for row in rows)
    return _svg(bottom + 30, elements, f"{axis}: {spoken}")


def forest(rows: Sequence[Interval], *, axis: str, lower_is_better: bool | None) -> Markup:
    """Differences with intervals around zero; filled where the interval leaves zero out.

    Parameters
    ----------
    rows
        From top to bottom.
    axis
        What the axis shows.
    lower_is_better
        Which side of zero is the better one; None: not known.
    """
    values = np.array([[row.value, row.low, row.high] for row in rows], dtype=float)
    finite = values[np.isfinite(values)]
    scale = _padded(min([*finite, 0.0]), max([*finite, 0.0]), NAMES, WIDTH - 10)
    top = 16
    bottom = top + 6 + ROW * len(rows)
    elements = _vertical_grid(scale, top, bottom, axis)
    elements.append(_line(scale(0), top, scale(0), bottom, "zero"))

    # which side is better
    if lower_is_better is not None:
        x, anchor, text = (NAMES, "start", "← better") if lower_is_better else (WIDTH - 10, "end", "better →")
        elements.append(_text(x, 11, text, "side", anchor))

    # a dot on its interval; words where there is no value
    for i, row in enumerate(rows):
        y = top + 2 + ROW * (i + 0.5)
        elements.append(_row_name(row.name, y))
        if np.isfinite(row.low + row.high):
            elements.append(_line(scale(row.low), y, scale(row.high), y, f"interval {row.verdict}"))
        if np.isfinite(row.value):
            title = f"{row.name}: {number(row.value)} [{number(row.low)}, {number(row.high)}]"
            dot = _tag("title", title)
            elements.append(_tag("circle", dot, cx=scale(row.value), cy=y, r=4.2, class_=f"difference {row.verdict}"))
        else:
            elements.append(_text(NAMES + 4, y + 4, "no value", "tick"))
    spoken = _spoken((row.name, row.value) for row in rows)
    return _svg(bottom + 30, elements, f"{axis}: {spoken}")


def scatter(x: np.ndarray, y: np.ndarray, names: Sequence[str], *, x_axis: str, y_axis: str) -> Markup:
    """One dot per condition and the diagonal, on equal axes.

    Parameters
    ----------
    x, y
        (n,), finite.
    names
        (n,), shown when a pointer rests on a dot, up to 300.
    x_axis, y_axis
        What the axes show.
    """
    both = np.concatenate([x, y])
    across = _padded(float(both.min()), float(both.max()), 44, WIDTH - 12)
    up = _Scale(across.low, across.high, 258, 20)
    elements = _vertical_grid(across, 20, 258, x_axis) + _horizontal_grid(up, y_axis)
    elements.append(_line(across.start, up.start, across.end, up.end, "reference"))
    # many dots are one path; few have a title each
    if len(x) > MAX_TITLES:
        path = "".join(f"M{across(a)} {up(b)}h0" for a, b in zip(x, y, strict=True))
        elements.append(_tag("path", d=path, class_="dots"))
    else:
        for a, b, name in zip(x, y, names, strict=True):
            title = _tag("title", f"{name}: {number(a)}, {number(b)}")
            elements.append(_tag("circle", title, cx=across(a), cy=up(b), r=3, class_="dot"))
    return _svg(288, elements, f"{y_axis} against {x_axis}, {len(x)} conditions")


def quality_by_cost(dots: Sequence[Dot], *, floor: float | None, x_axis: str, y_axis: str) -> Markup:
    """Numbered dots, a metric over seconds on a logarithmic axis; the noise floor as a dashed line.

    Parameters
    ----------
    dots
        Finite, x above 0.
    floor
        Value of the noise floor, if known.
    x_axis, y_axis
        What the axes show.
    """
    xs = [dot.x for dot in dots]
    ys = [dot.y for dot in dots]
    if floor is not None:
        ys.append(floor)
    across = _Scale(min(xs) / 1.6, max(xs) * 1.6, 44, WIDTH - 12, log=True)
    up = _padded(min(ys), max(ys), 238, 22)
    elements = _vertical_grid(across, 20, 240, x_axis) + _horizontal_grid(up, y_axis)
    if floor is not None:
        elements.append(_line(44, up(floor), WIDTH - 12, up(floor), "reference"))
        elements.append(_text(WIDTH - 14, up(floor) - 4, "noise floor", "tick", "end"))

    # a number beside each dot, away from dots and numbers that are there
    taken = [(across(dot.x), up(dot.y)) for dot in dots]
    for dot in dots:
        x = across(dot.x)
        y = up(dot.y)
        title = f"{dot.name}: {number(dot.x)} s, {number(dot.y)}"
        elements.append(_mark(x, y, dot.kind, title))
        spot = _free_spot(x, y, taken)
        taken.append(spot)
        elements.append(_text(spot[0], spot[1] + 4, str(dot.number), "label", "middle"))
    spoken = _spoken((dot.name, dot.y) for dot in dots)
    return _svg(270, elements, f"{y_axis} over {x_axis}: {spoken}")


def _free_spot(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Position of a number beside a dot, as far from everything else as can be had."""
    spots = [(x + dx, y + dy) for dx, dy in AROUND]
    inside = [spot for spot in spots if _is_inside(*spot)]
    spots = inside or spots
    others = [spot for spot in taken if spot != (x, y)]
    room = []
    for a, b in spots:
        distances = [np.hypot(a - c, 1.3 * (b - d)) for c, d in others]
        room.append(min([*distances, 14.0]))  # more room than this is as good
    return spots[int(np.argmax(room))]


def _is_inside(x: float, y: float) -> bool:
    """Whether a number there lies between the axes."""
    return 50 < x < WIDTH - 6 and 24 < y < 236


def _vertical_grid(scale: _Scale, top: float, bottom: float, axis: str) -> list[Markup]:
    """Lines and numbers at the ticks of the horizontal axis, and its name below."""
    elements = []
    for tick in scale.ticks():
        elements.append(_line(scale(tick), top, scale(tick), bottom, "grid"))
        elements.append(_text(scale(tick), bottom + 12, f"{tick:g}", "tick", "middle"))
    middle = (scale.start + scale.end) / 2
    elements.append(_text(middle, bottom + 26, _short(axis, 2 * (WIDTH - middle)), "axis", "middle"))
    return elements


def _horizontal_grid(scale: _Scale, axis: str) -> list[Markup]:
    """Lines and numbers at the ticks of the vertical axis, and its name above."""
    elements = []
    for tick in scale.ticks():
        elements.append(_line(44, scale(tick), WIDTH - 12, scale(tick), "grid"))
        elements.append(_text(40, scale(tick) + 4, f"{tick:g}", "tick", "end"))
    elements.append(_text(2, 12, f"↑ {_short(axis, 310)}", "axis"))
    return elements


def _padded(low: float, high: float, start: float, end: float) -> _Scale:
    """Leave a little room at both ends; a single value gets a range around it."""
    room = 0.06 * (high - low) or 0.1 * abs(low) or 1.0
    return _Scale(low - room, high + room, start, end)


def _ticks(low: float, high: float, n: int) -> list[float]:
    """Round numbers between two ends."""
    raw = (high - low) / n
    power = 10.0 ** np.floor(np.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(np.log(s / raw)))
    first = np.ceil(low / step - 1e-9)
    last = np.floor(high / step + 1e-9)
    return [float(f"{i * step:.6g}") + 0.0 for i in np.arange(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with their doubles and fives where there are few."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        candidates = [float(factor * 10.0**power) for power in powers for factor in factors]
        found = [tick for tick in candidates if low <= tick <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 5)] if found else [low, high]


def _mark(x: float, y: float, kind: str, title: str) -> Markup:
    """Disc for a model, square for a simple baseline, diamond for the noise floor."""
    inner = _tag("title", title)
    if kind == "model":
        return _tag("circle", inner, cx=x, cy=y, r=4.4, class_="mark model")
    shape = f"M{x - 4} {y - 4}h8v8h-8z" if kind == "baseline" else f"M{x} {y - 5.4}l5.4 5.4l-5.4 5.4l-5.4 -5.4z"
    return _tag("path", inner, d=shape, class_=f"mark {kind}")


def _row_name(name: str, y: float) -> Markup:
    """Name at the left of a row, shortened to fit, in full on hover."""
    return _tag("text", _tag("title", name) + _short(name, NAMES - 8), x=NAMES - 8, y=y + 4, class_="name end")


def _short(text: str, room: float) -> str:
    """Cut a text that would be wider than the room; letters of the small font are 6.3 units wide or less."""
    fits = int(room / 6.3)
    return text if len(text) <= fits else text[: max(fits - 1, 1)] + "…"


def _spoken(values: Iterable[tuple[str, float]]) -> str:
    """What a reader who cannot see the chart hears."""
    return ", ".join(f"{name} {number(float(value))}" for name, value in values)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _text(x: float, y: float, text: str, class_: str, anchor: str = "start") -> Markup:
    return _tag("text", text, x=x, y=y, class_=f"{class_} {anchor}")


def _svg(height: float, elements: Sequence[Markup], label: str) -> Markup:
    return _tag("svg", Markup("").join(elements), viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def _tag(name: str, inner: str = "", **attributes: str | float) -> Markup:
    """One element; the inner text is escaped unless it is markup already."""
    written = Markup("")
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")  # class_ and aria_label in Python are class and aria-label in SVG
        value = f"{value:g}" if isinstance(value, float) else value
        written += Markup(' {}="{}"').format(key, value)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, escape(inner))
