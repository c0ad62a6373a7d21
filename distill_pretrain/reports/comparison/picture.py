"""Held-out loss against what a target set costs: one line per sampler, CE and FullKD as levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from distill_pretrain.reports.comparison.results import CellResults, Comparison, Mean
from distill_pretrain.reports.picture import _INK, _finish, _look, _new_figure, _png


def families(comparison: Comparison) -> dict[str, list[CellResults]]:
    """Return legend text -> plain cells on several sizes of one kind of target, then the single ones."""
    kinds = dict.fromkeys(
        (cell.spec.sampler, cell.spec.residual) for cell in comparison.cells if cell.spec.sampler
    )
    found = {}
    for sampler, residual in kinds:
        assert sampler is not None
        name = sampler if residual in (None, "renormalise") else f"{sampler}, {residual}"
        found[name] = comparison.family(sampler, residual)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def draw_losses(
    comparison: Comparison,
    *,
    field: str,
    y_label: str,
    cost: Callable[[CellResults], float | None],
    x_label: str,
) -> bytes:
    """Draw a figure of held-out text against a cost of the targets, error bars one spread over seeds.

    Args:
        comparison: cells.
        field: of the held-out figures.
        y_label: its name and unit.
        cost: of a cell; None leaves it out.
        x_label: its name and unit.

    Returns:
        The bytes of a PNG.
    """
    figure, axes = _new_figure(8.0, 5.2)
    axes.set_xscale("log")
    for number, (name, cells) in enumerate(families(comparison).items()):
        points = [(cost(cell), cell.mean(field)) for cell in cells]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if known:
            colour, style = _look(number)
            axes.errorbar(
                [x for x, _ in known],
                [y.value for _, y in known],
                yerr=[y.spread or 0.0 for _, y in known],
                linestyle=style,
                marker="o",
                ms=5,
                capsize=3,
                color=colour,
                linewidth=1.6,
                label=name,
            )
    for level, style in ((comparison.text_only, "--"), (comparison.full, "-")):
        mean = None if level is None else level.mean(field)
        if level is not None and mean is not None:
            _level(axes, level.name, mean, style)
    _finish(axes, x_label, y_label)
    return _png(figure)


def reliability_choice(comparison: Comparison) -> Mapping[str, Mapping[str, object]]:
    """Choose first-seed figures of the cells whose calibration tells most: CE, small Top-K, samples, FullKD."""
    heads, seed = comparison.family("topk", "renormalise"), next(iter(comparison.evaluations))
    middle: Sequence[CellResults] = comparison.family("systematic")
    middle = middle[(len(middle) - 1) // 2 :][:1]
    chosen = [comparison.text_only, *heads[:1], *middle, comparison.full]
    return {
        cell.name: cell.scores[seed]
        for cell in chosen
        if cell is not None and cell.scores[seed].get("reliability") is not None
    }


def _level(axes: object, name: str, mean: Mean, style: str) -> None:
    axes.axhline(mean.value, color=_INK, linestyle=style, linewidth=1.2, label=name)  # type: ignore[attr-defined]
    if mean.spread:
        low, high = mean.value - mean.spread, mean.value + mean.spread
        axes.axhspan(low, high, color=_INK, alpha=0.10, linewidth=0)  # type: ignore[attr-defined]
