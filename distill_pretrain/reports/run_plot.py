"""Curves of a run as SVG that stands in an HTML page: no packages, no scripts, sharp at any size.

Shapes: n steps; long runs are drawn from at most `MOST_POINTS` groups of neighbouring steps.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_pretrain.reports.picture import smooth

Values = npt.NDArray[np.float64]

MOST_POINTS = 600
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito: told apart by colour-blind readers."""
WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 34


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A step at which something happened.

    Attributes:
        step: where.
        text: what, shown when the pointer rests on it.
        kind: CSS class of its line.
    """

    step: float
    text: str
    kind: str


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the logarithms, to base 10, of 1, 2 and 5 times powers of ten.

    Where the powers alone are enough, the others are left out.
    """
    decades = range(math.floor(low), math.ceil(high) + 1)
    firsts = (1,) if high - low > 3 else (1, 2, 5)
    places = [decade + math.log10(first) for decade in decades for first in firsts]
    return [place for place in places if low <= place <= high]


def tick_label(value: float) -> str:
    """Write a value beside an axis, such as 25k, 1.5M, 0.002 or 3e-05."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (abs(value) >= scale and letter != "k"):
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def limits(series: Sequence[Values], *, from_zero: bool) -> tuple[float, float]:
    """Return the y range: all of the late part; the first tenth, a steep drop from log V, may run out of the top."""
    late = np.concatenate([values[len(values) // 10 :] for values in series] or [np.zeros(0)])
    shown = late[np.isfinite(late)]
    if not len(shown):
        shown = np.concatenate([values[np.isfinite(values)] for values in series])
    if not len(shown):
        return 0.0, 1.0
    # A few outliers, such as the first step's compilation, must not flatten the rest.
    low, high = float(np.quantile(shown, 0.002)), float(np.quantile(shown, 0.998))
    low = min(0.0, low) if from_zero else low
    margin = 0.06 * (high - low) or 0.1 * (abs(high) or 1.0)
    return (low if from_zero else low - margin), high + margin


def groups(steps: Values, values: Values) -> tuple[Values, Values, Values, Values]:
    """Return the middles of at most MOST_POINTS groups of known neighbours, and each one's least, mean and greatest."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(values):
        return steps, values, values, values
    starts = np.unique(np.linspace(0, len(values), MOST_POINTS, endpoint=False).astype(int))
    counts = np.diff([*starts, len(values)])
    return (
        np.add.reduceat(steps, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / counts,
        np.maximum.reduceat(values, starts),
    )


def draw(
    steps: Values,
    series: Mapping[str, Values],
    *,
    y_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    log_scale: bool = False,
    smoothed: bool = True,
) -> str:
    """Draw the lines as an SVG element: faint as logged, bold averaged over neighbouring steps.

    Args:
        steps: float64[n], ascending.
        series: name -> float64[n], NaN where unknown.
        y_label: what is drawn, with its unit.
        marks: vertical lines.
        from_zero: the y axis begins at 0.
        log_scale: of the y axis; values that are not positive are left out.
        smoothed: draw the bold line.
    """
    if log_scale:
        with np.errstate(invalid="ignore", divide="ignore"):
            series = {name: np.log10(values) for name, values in series.items()}
    bold = {name: smooth(values, len(values) // 40) for name, values in series.items()}
    shown = list(bold.values()) if smoothed and not log_scale else list(series.values())
    low, high = limits(shown, from_zero=from_zero and not log_scale)
    x_low, x_high = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def x(value: Values | float) -> Values:
        width = WIDTH - _LEFT - _RIGHT
        return _LEFT + (np.asarray(value) - x_low) / (x_high - x_low) * width

    def y(value: Values | float) -> Values:
        share = (np.clip(np.asarray(value), low - (high - low), high + (high - low)) - low) / (
            high - low
        )
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">',
        f'<clipPath id="plot"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
    ]
    for tick in log_ticks(low, high) if log_scale else ticks(low, high):
        text = tick_label(float(f"{10**tick:.3g}") if log_scale else tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick in ticks(x_low, x_high, 8):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    parts.append(
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">optimizer step</text>'
    )
    parts.append('<g clip-path="url(#plot)">')
    for mark in marks:
        parts.append(
            f'<line class="{mark.kind}" x1="{x(mark.step):.1f}" x2="{x(mark.step):.1f}" y1="{_TOP}" '
            f'y2="{HEIGHT - _BOTTOM}"><title>{html.escape(mark.text)}</title></line>'
        )
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        middle, least, mean, most = groups(steps, values)
        outline = [*zip(x(middle), y(most), strict=True)]
        outline += reversed([*zip(x(middle), y(least), strict=True)])
        if smoothed:
            parts.append(
                f'<polygon class="raw" fill="{colour}" stroke="{colour}" points="{_points(outline)}"/>'
            )
            middle, _, mean, _ = groups(steps, bold[name])
        line = _points([*zip(x(middle), y(mean), strict=True)])
        parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
    parts.append("</g></svg>")
    return "".join(parts)


def legend(names: Sequence[str]) -> str:
    """Write the coloured names, in the order of `draw`."""
    return "".join(
        f'<span class="key"><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
