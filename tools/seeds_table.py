#!/usr/bin/env python3
"""A table of held-out figures over seeds: python tools/seeds_table.py EVAL.json [--against CELL].

EVAL.json is what `distill-pretrain eval` writes; its models are called "CELL, seed N". Deviations are those of a sample
(n - 1); a difference is taken seed by seed, so that what a seed does to both cells drops out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill_pretrain.reports.comparison.results import Mean
from distill_pretrain.reports.results import EvalResults

Figures = dict[str, dict[str, dict[str, float]]]
"""Figure -> cell -> seed -> nats per token."""


def read(path: Path) -> Figures:
    """Read the figures `ce` and, where there is a teacher, `kl` of every cell and seed."""
    found: Figures = {}
    for name, scores in EvalResults.load(path).scores.items():
        cell, separator, seed = name.rpartition(", seed ")
        for figure in ("ce", "kl"):
            if separator and scores[figure] is not None:
                found.setdefault(figure, {}).setdefault(cell, {})[seed] = scores[figure]
    return found


def spread(values: Sequence[float], sign: str = "") -> str:
    """Write the mean of values and their deviation, where there are several."""
    mean = Mean.of(values)
    text = f"{mean.value:{sign}.4f}"
    return text if mean.spread is None else f"{text} ± {mean.spread:.4f}"


def table(figures: Figures, against: str | None) -> Iterator[str]:
    """Make the lines of a table in markdown: a row for each cell."""
    names = {"ce": "held-out CE", "kl": "KL from the teacher"}
    columns = [names[figure] for figure in figures]
    if against is not None:
        columns += [f"{names[figure]} less that of {against}" for figure in figures]
    yield f"| student | seeds | {' | '.join(columns)} |"
    yield "|:--|--:" + "|--:" * len(columns) + "|"
    for cell, seeds in next(iter(figures.values())).items():
        row = [spread([*of[cell].values()]) for of in figures.values()]
        if against is not None:
            row += [
                spread([of[cell][seed] - of[against][seed] for seed in of[cell]], "+")
                for of in figures.values()
            ]
        yield f"| {cell} | {len(seeds)} | {' | '.join(row)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--against", help="a cell whose figures are subtracted, seed by seed")
    arguments = parser.parse_args()
    print("\n".join(table(read(arguments.eval), arguments.against)))


if __name__ == "__main__":
    main()
