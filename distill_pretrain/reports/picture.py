"""The pictures of a report: loss curves and reliability."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import MissingDependency
from distill_pretrain.reports.curves import TrainingCurve

# Okabe & Ito: told apart by colour-blind readers and in grey print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_INK = "#333333"
HELD_OUT = "held_out_ce"
"""Column of a run's log: cross-entropy with held-out text, at the steps at which it was taken."""

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raises MissingDependency when no picture could be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("matplotlib", extra="eval", needed_for="the report's pictures")


def smooth(values: npt.NDArray[np.float64], half_width: int) -> npt.NDArray[np.float64]:
    """Average over up to 2 * half_width + 1 centred values, over fewer at the ends; NaN is left out.

    Args:
        values: float64[n].
        half_width: neighbours on each side.

    Returns:
        float64[n]; NaN where no value is near.
    """
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    # At the steep start the window shrinks on both sides, so the mean does not lag; at the flat end only ahead.
    behind = np.minimum(half_width, at)
    first, last = at - behind, at + np.minimum(behind, len(values) - 1 - at) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        result: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (
            counts[last] - counts[first]
        )
    return result


def draw_curves(curves: Mapping[str, TrainingCurve], *, held_out: Mapping[str, float]) -> bytes:
    """Draw training cross-entropy against step, one line per run, and held-out CE: while it trained, and at its end.

    Args:
        curves: name -> log of the run.
        held_out: name -> held-out CE, nats per token; drawn for the names in `curves`.

    Returns:
        The bytes of a PNG.
    """
    figure, axes = _new_figure(9.0, 5.2)
    from matplotlib.ticker import EngFormatter

    seen: list[npt.NDArray[np.float64]] = []
    ends: list[float] = []
    for number, (name, curve) in enumerate(curves.items()):
        colour, style = _look(number)
        steps, raw = curve["step"], curve["ce"]
        bold = smooth(raw, len(raw) // 40)
        axes.plot(steps, raw, color=colour, linewidth=0.7, alpha=0.28, zorder=2)
        axes.plot(steps, bold, style, color=colour, linewidth=2.0, label=name, zorder=3)
        seen.append(bold)
        ends += [float(value) for value in raw[-1:]]
        if _was_scored(curve):
            scored = ~np.isnan(curve[HELD_OUT])
            of_run, values = steps[scored], curve[HELD_OUT][scored]
            axes.plot(of_run, values, "o:", color=colour, mec="white", ms=5, lw=1.0, zorder=4)
            ends.append(float(values[-1]))
        if name in held_out:
            axes.plot(
                steps[-1:],
                [held_out[name]],
                "D",
                color=colour,
                mec="white",
                ms=8,
                zorder=4,
                clip_on=False,
            )
            ends.append(held_out[name])
    bounds = _limits(seen, ends)
    if bounds is not None:
        axes.set_ylim(*bounds)
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if any(map(_was_scored, curves.values())):
        label = "held-out CE, while training"
        axes.plot([], [], "o:", color=_INK, mec="white", ms=5, lw=1.0, label=label)
    if set(held_out) & set(curves):
        axes.plot(
            [], [], "D", color=_INK, mec="white", ms=8, linestyle="none", label="held-out CE, final"
        )
    _finish(axes, "optimizer step", "cross-entropy, training text (nats per token)")
    return _png(figure)


def _was_scored(curve: TrainingCurve) -> bool:
    """Whether the run was evaluated on held-out text while it trained."""
    return HELD_OUT in curve.columns


def draw_reliability(scores: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw the accuracy of the likeliest token against its probability, and positions per bin below.

    Args:
        scores: name -> `ModelScores.as_dict()`; a model without "reliability" is left out.

    Returns:
        The bytes of a PNG.
    """
    figure, (above, below) = _new_figure(7.0, 6.4, rows=(3, 1))
    above.plot([0, 1], [0, 1], color="#999999", linewidth=1.0, zorder=1)
    draw_diagram(above, below, scores)
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    below.set_xlim(0, 1)
    _finish(above, "", "share of them that are right")
    _finish(below, "probability of the likeliest token", "share of positions")
    return _png(figure)


def draw_diagram(above: Axes, below: Axes, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw lines of accuracy against confidence over the bins in use, and steps of each bin's share of positions."""
    for number, (name, score) in enumerate(scores.items()):
        diagram = score["reliability"]
        if diagram is None:
            continue
        colour, style = _look(number)
        used = [place for place, count in enumerate(diagram["positions"]) if count]
        above.plot(
            [diagram["confidence"][place] for place in used],
            [diagram["accuracy"][place] for place in used],
            style,
            marker="o",
            ms=4,
            color=colour,
            linewidth=1.6,
            label=f"{name} (ECE {score['ece']:.1%})",
        )
        total = sum(diagram["positions"])
        below.stairs(
            [count / total for count in diagram["positions"]],
            diagram["bins"],
            color=colour,
            linestyle=style,
            linewidth=1.4,
        )


def _look(number: int) -> tuple[str, str]:
    """Colour and line style of the n-th model."""
    return _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]


def _new_figure(width: float, height: float, rows: tuple[int, ...] = (1,)) -> tuple[Figure, Any]:
    """A figure in inches, and its axes: one, or one per row of the given relative heights."""
    require_matplotlib()
    # The object interface needs no display and leaves the caller's pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(rows), height_ratios=rows)


def _finish(axes: Axes, x: str, y: str) -> None:
    """Axis labels, grid and, where something is named, a legend."""
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _limits(curves: list[npt.NDArray[np.float64]], ends: list[float]) -> tuple[float, float] | None:
    """A y range that shows how the runs differ: the first steep drop from log V runs out of the top."""
    late = [curve[len(curve) // 10 :] for curve in curves]
    shown = np.concatenate([*late, np.array(ends)])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return None
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.1 * (abs(high) or 1.0)
    return (low - margin, high + margin) if math.isfinite(margin) else None
