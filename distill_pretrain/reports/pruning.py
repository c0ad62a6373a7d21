"""The report of `prune`: what was cut, what it costs before any training, and the scores in a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_pretrain.pruning.pruner import PrunedModel
from distill_pretrain.pruning.scores import Scores
from distill_pretrain.pruning.shapes import Shape
from distill_pretrain.reports.picture import _COLOURS, _finish, _new_figure, _png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What a job of `prune` has found.

    Attributes:
        source: what was pruned, in words.
        shape: of the source.
        parameters: of the source.
        loss: of the source, on the same text.
        text: which text that is, in words.
        scores: of the source.
        loss_without: losses of the source without some layers, where they were measured, on a part of the scored text.
        models: by target.
    """

    source: str
    shape: Shape
    parameters: int
    loss: float
    text: str
    scores: Scores
    loss_without: Mapping[tuple[int, ...], float]
    models: Mapping[str, PrunedModel]


def scores_file(report: PruneReport) -> dict[str, Any]:
    """Return all scores, JSON-able."""
    without = [
        {"layers": list(layers), "loss": loss} for layers, loss in report.loss_without.items()
    ]
    return {**report.scores.as_dict(), "loss_without": without}


def pruning_report(report: PruneReport, *, has_picture: bool) -> str:
    """Write Markdown: a table of the models, the layers removed, and the candidates of searches."""
    lines = [
        f"# Pruned from {report.source}",
        "",
        f"Cross-entropy in nats per token, {report.text}, before any training; models may rank otherwise after it.",
        "",
        "| model | shape | parameters | of the source | cross-entropy |",
        "|---|---|--:|--:|--:|",
        f"| source | {report.shape.text()} | {report.parameters:,} | 100% | {report.loss:.3f} |",
    ]
    for name, model in report.models.items():
        share = model.parameters / report.parameters
        lines.append(
            f"| {name} | {model.shape.text()} | {model.parameters:,} | {share:.1%} | {model.loss:.3f} |"
        )
    lines += ["", "Layers removed (from 0):", ""]
    for name, model in report.models.items():
        gone = sorted(set(range(report.shape.num_layers)) - set(model.kept.layers))
        lines.append(f"- {name}: {', '.join(map(str, gone)) or 'none'}")
    for name, model in report.models.items():
        if model.search is not None:
            lines += ["", f"Candidates for {name}, on the sample that was scored:", ""]
            lines += ["| shape | cross-entropy |", "|---|--:|"]
            lines += [
                f"| {shape.text()} | {loss:.3f} |" for shape, loss in model.search.losses.items()
            ]
    if has_picture:
        lines += ["", "![scores](scores.png)"]
    return "\n".join(lines) + "\n"


def draw_scores(report: PruneReport) -> bytes:
    """Draw the block influence of every layer with what each model removes, and how the scores of widths fall off.

    Returns:
        The bytes of a PNG.
    """
    figure, (above, between, below) = _new_figure(
        9.0, 8.6, rows=(4, 1 + len(report.models) // 3, 4)
    )
    figure.suptitle(f"Scores of {report.source}", fontsize=12)
    _draw_layers(above, report.scores)
    _draw_removed(between, report)
    _draw_widths(below, report.scores)
    return _png(figure)


def _draw_layers(axes: Axes, scores: Scores) -> None:
    influence = [scores.block_influence(layer) for layer in range(scores.num_layers)]
    axes.bar(range(scores.num_layers), influence, color=_COLOURS[0], zorder=2)
    axes.set_yscale("log")
    _layers_axis(axes, scores.num_layers)
    axes.set_title("How much does a layer turn the residual stream?", loc="left", fontsize=10)
    _finish(axes, "", "block influence (1 - cosine)")


def _draw_removed(axes: Axes, report: PruneReport) -> None:
    names = list(report.models)
    for row, model in enumerate(report.models.values()):
        gone = sorted(set(range(report.scores.num_layers)) - set(model.kept.layers))
        axes.plot(gone, [row] * len(gone), "x", color=_COLOURS[(row + 1) % len(_COLOURS)])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _layers_axis(axes, report.scores.num_layers)
    axes.set_title("Which layers does a model lack?", loc="left", fontsize=10)
    _finish(axes, "layer", "")


def _layers_axis(axes: Axes, num_layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_widths(axes: Axes, scores: Scores) -> None:
    for number, (name, values) in enumerate(
        (("hidden", scores.hidden[None]), ("ffn", scores.ffn), ("heads", scores.heads))
    ):
        found = np.sort(values.numpy(), axis=1)[:, ::-1]
        share = np.cumsum(found, axis=1) / found.sum(axis=1, keepdims=True)
        kept = np.arange(1, found.shape[1] + 1) / found.shape[1]
        axes.plot(kept, share.mean(axis=0), color=_COLOURS[number], linewidth=2.0, label=name)
    axes.plot([0, 1], [0, 1], "--", color="#999999", linewidth=1.0, label="all alike")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_title("What do the best channels and heads make up?", loc="left", fontsize=10)
    _finish(axes, "share kept, the best first", "share of the scores (mean of layers)")
