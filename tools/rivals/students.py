"""The students of the recipe's comparison, for the tables: those of a rival's targets learnt through our own loss.

Which is fair where the loss of a target is equal, and `bench_rivals.py` says how far they differ: a ghost token is
Megatron-LM's, a division by the kept mass is DistillKit's. MaxText's loss, a softmax over the kept ids on both sides,
is none of ours: no student stands for it.
"""

from __future__ import annotations

from typing import Any

from distill_pretrain.jobs.comparison.plan import ComparisonPlan
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.reports.comparison.results import Comparison, Mean

FIELDS = ("kl", "ce", "ece")
STANDS_FOR = {
    "topk-128-ghost": "Megatron-LM 128",
    "topp-95-ghost": "Megatron-LM top-p 0.95",
    "topk-50": "DistillKit 50",
}
"""Cell to the layout whose targets, but for the rounding of stored values, and loss it has."""


def students(recipe: Recipe) -> dict[str, Any] | None:
    """Held-out figures of every cell; None where the comparison has not been run to its end."""
    plan = ComparisonPlan.of(recipe)
    if not all(path.is_file() for path in plan.figures.values()):
        return None
    comparison = Comparison.load(plan.specs, plan.figures)
    assert recipe.train and recipe.data
    return {
        "steps": recipe.train.steps,
        "tokens": recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len,
        "seeds": list(plan.compare.seeds),
        "teacher": {field: comparison.teacher.get(field) for field in FIELDS},
        "cells": {
            cell.name: {
                "stands_for": STANDS_FOR.get(cell.name),
                "bytes_per_token": cell.bytes_per_token,
                **{field: _as_json(cell.mean(field)) for field in FIELDS},
            }
            for cell in comparison.cells
        },
    }


def _as_json(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"mean": mean.value, "spread": mean.spread}
