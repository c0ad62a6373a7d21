"""The picture of `inspect --signal`: variance, token correlation and gradients against depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from distill_pretrain.mcore.init.theory import Signal
from distill_pretrain.reports.picture import _COLOURS, _finish, _new_figure, _png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_signal(measured: Signal, predicted: Signal, *, title: str) -> bytes:
    """Draw four panels over the layers; measured solid, predicted for fresh weights dashed.

    Args:
        measured: of a model.
        predicted: of the same model before training.
        title: of the whole picture.

    Returns:
        The bytes of a PNG.
    """
    figure, axes = _new_figure(9.0, 11.5, rows=(1, 1, 1, 1))
    figure.suptitle(f"Signal and gradients through {title}", fontsize=13)
    panels: tuple[tuple[str, str, npt.NDArray[np.float64], npt.NDArray[np.float64]], ...] = (
        (
            "Forward: how large is the signal? Flat is good; where it has grown, a later layer adds next to nothing",
            "variance of a coordinate",
            measured.variance,
            predicted.variance,
        ),
        (
            "Forward: how alike are two tokens? Low is good; at 1 all positions carry the same and words are lost",
            "correlation",
            measured.correlation,
            predicted.correlation,
        ),
        (
            "Backward: how much of the loss's gradient comes down? Flat is good: it neither vanishes nor explodes",
            "root mean square",
            measured.gradient**0.5,
            predicted.gradient**0.5,
        ),
        (
            "Learning: how large is the gradient of a layer's weights? Flat is good: all layers learn alike",
            "norm",
            measured.weight_gradient,
            predicted.weight_gradient,
        ),
    )
    last = len(measured.variance) - 1
    for number, (panel, (question, unit, seen, expected)) in enumerate(
        zip(axes, panels, strict=True)
    ):
        layers = np.arange(last + 1 - len(seen), last + 1)
        colour = _COLOURS[number]
        panel.plot(layers, seen, color=colour, linewidth=2.0, label="measured")
        panel.plot(
            layers, expected, "--", color="black", linewidth=1.3, label="predicted, fresh weights"
        )
        panel.set_title(question, loc="left", fontsize=10)
        panel.set_xlim(0, last)
        if number == 1:
            panel.set_ylim(min(0.0, float(seen.min())), 1)
        else:
            _log_scale(panel, np.concatenate([seen, expected]))
        _finish(panel, "layer (0: embedding)" if number == 3 else "", unit)
    return _png(figure)


def _log_scale(panel: Axes, values: npt.NDArray[np.float64]) -> None:
    """Scale an axis by logarithms, over a factor of four at least, so that a flat line looks flat."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.set_yscale("log")
    low, high = float(values.min()), float(values.max())
    middle = (low * high) ** 0.5
    low, high = min(low / 1.2, middle / 4), max(high * 1.2, middle * 4)
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
