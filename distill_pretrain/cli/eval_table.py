"""The tables that `distill-pretrain eval` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_pretrain.jobs.console import say

if TYPE_CHECKING:
    from distill_pretrain.reports.results import EvalResults


def print_table(results: EvalResults) -> None:
    """Print the scores, gradients and tasks that were asked for."""
    table = [[name, *_row(score)] for name, score in results.scores.items()]
    columns = [
        "held-out CE",
        "perplexity",
        "ECE",
        "KL(teacher||model)",
        "top-1 agreement",
        "acceptance",
    ]
    if any(score["kl_cache"] is not None for score in results.scores.values()):
        columns.append("KL(cache||model)")
    _say_table(["model", *columns], table)
    if results.out_of_domain is not None:
        rows = [[name, *_row(score)] for name, score in results.out_of_domain["scores"].items()]
        _say_table(["out of domain", *columns[:6]], rows)
    if results.copying is not None:
        rows = [[name, *_copies(found)] for name, found in results.copying["models"].items()]
        header = ["copying", "CE, first time", "CE, repeated", "repeated minus first", "accuracy"]
        _say_table(header, rows)
    if results.gradients is not None:
        rows = [
            [
                name,
                f"{row['num_positions']:,}",
                _cell(row["angle_degrees"], ".1f"),
                _cell(row["norm_ratio"], ".3f"),
            ]
            for name, found in results.gradients["caches"].items()
            for row in found
        ]
        _say_table(["gradient against FullKD", "positions", "angle (degrees)", "norm ratio"], rows)
    if results.tasks is not None:
        rows = [
            [name, task, metric, f"{value:.4f}"]
            for name, found in results.tasks["models"].items()
            for task, metrics in found.items()
            for metric, value in metrics.items()
        ]
        _say_table(["model", "task", "metric", "value"], rows)


def _row(score: dict[str, Any]) -> list[str]:
    return [
        _cell(score["ce"], ".4f"),
        _cell(score["perplexity"], ".3f"),
        _cell(score["ece"], ".2%"),
        _cell(score["kl"], ".4f"),
        _cell(score["top1_agreement"], ".1%"),
        _cell(score["acceptance"], ".1%"),
        _cell(score["kl_cache"], ".4f"),
    ]


def _copies(found: dict[str, Any]) -> list[str]:
    return [
        _cell(found["first"], ".4f"),
        _cell(found["repeated"], ".4f"),
        _cell(found["repeated"] - found["first"], "+.4f"),
        _cell(found["accuracy"], ".1%"),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _say_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns of equal width, the first to the left; cells beyond the header are left out."""
    cells = [header, *(row[: len(header)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True)]
        say("  ".join([f"{row[0]:<{widths[0]}}", *padded]))
