"""Recipe section `compare`, and the cells and target sets it has when the recipe lists none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section
from distill_pretrain.sampling.kinds import TRUNCATED

RESIDUAL_FIXES = ("drop", "label", "ghost", "uniform")
"""What to do with the missing mass, other than the paper's Top-K, which renormalises."""
DEFAULT_TOPK = (3, 12, 50)
DEFAULT_DRAWS = (5, 12, 50)

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_FROM_TARGETS = {"ce_weight": 0.0, "kd_weight": 1.0}


class CellConfig(Section):
    """One kind of student: the targets it learns from, and its loss."""

    set: str | None = None
    """Name of the target set in capture.sets; null for cells that need no cache."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section `objective` in which this cell differs from the recipe's."""


class CompareConfig(Section):
    """Students that differ in their targets alone, trained from several seeds and held against each other."""

    output_dir: Path
    """Folder of the comparison: cells/CELL/seed-N (runs), eval/seed-N.json, report/report.md."""
    title: str = "Comparison of distillation targets"
    """Heading of the report."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """train.seed of the students: initial weights and order of sequences, shared by all cells."""
    cells: dict[str, CellConfig] | None = None
    """Name to {set, objective}; null: CE, FullKD, one cell per capture set, and the residual fixes."""
    fixes_at: str | None = None
    """Top-K set on which the residual fixes of the default cells are tried; null takes the middle one."""
    only: tuple[str, ...] = ()
    """Cells that this job trains (also --cells); empty: all. The report always covers every cell."""
    teacher: dict[str, dict[str, Any]] | None = None
    """Sections (data, model, parallel, optimizer, objective, train) in which the training of the teacher
    differs from the students'; it is trained into teacher.path. null: teacher.path exists already."""
    eval: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section `eval`, but models and output."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 1 << 63:
            raise ValueError(
                f"found: {list(seeds)}; expected: different numbers from 0 to 2^63 - 1"
            )
        return seeds

    @field_validator("cells")
    @classmethod
    def _names_are_folders(
        cls, cells: dict[str, CellConfig] | None
    ) -> dict[str, CellConfig] | None:
        bad = [name for name in cells or () if not _FOLDER_NAME.fullmatch(name)]
        if bad or cells == {}:
            raise ValueError(
                f"found: {', '.join(bad) or 'no cell'}; expected: names of letters, digits and . _ + - "
                "(each becomes a folder)"
            )
        return cells

    @model_validator(mode="after")
    def _sections_of_eval(self) -> CompareConfig:
        taken = sorted({"models", "output"} & set(self.eval))
        if taken:
            raise ValueError(f"compare.eval may not set {', '.join(taken)}: the comparison does")
        return self


def default_sets(
    topk: Sequence[int] = DEFAULT_TOPK, draws: Sequence[int] = DEFAULT_DRAWS
) -> dict[str, dict[str, Any]]:
    """Return the target sets for `capture.sets`: the k likeliest ids, and N draws of both unbiased samplers."""
    sizes = {"topk": topk, "multinomial": draws, "systematic": draws}
    return {
        f"{sampler}-{size}": {"sampler": sampler, "num_draws": size}
        for sampler, its_sizes in sizes.items()
        for size in its_sizes
    }


def default_cells(
    samplers: Mapping[str, str], *, fixes_at: str | None = None
) -> dict[str, CellConfig]:
    """Return CE, FullKD, one cell per target set (truncated ones renormalised), and the residual fixes on one of them.

    Args:
        samplers: name of every target set to its sampler, in the order of the recipe.
        fixes_at: truncated set to try the fixes on; None takes the middle Top-K set.

    Returns:
        Name to cell.
    """
    cells = {
        "ce": CellConfig(objective={"ce_weight": 1.0, "kd_weight": 0.0}),
        "full-kd": CellConfig(objective={**_FROM_TARGETS, "target": "teacher"}),
    }
    heads = [name for name, sampler in samplers.items() if sampler == "topk"]
    if fixes_at is None and heads:
        fixes_at = heads[(len(heads) - 1) // 2]
    for name, sampler in samplers.items():
        kept_mass = {"residual": "renormalise"} if sampler in TRUNCATED else {}
        cells[name] = CellConfig(set=name, objective={**_FROM_TARGETS, **kept_mass})
        if name == fixes_at and sampler in TRUNCATED:
            for residual in RESIDUAL_FIXES:
                cells[f"{name}-{residual}"] = CellConfig(
                    set=name, objective={**_FROM_TARGETS, "residual": residual}
                )
    return cells
