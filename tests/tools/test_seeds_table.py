"""The table of figures over seeds, against figures by hand; the recipes whose students it compares."""

from __future__ import annotations

from typing import Any

import pytest

from distill_pretrain.config import load_recipe
from distill_pretrain.eval.metrics import ModelScores
from distill_pretrain.jobs.phases import phases_of
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.reports.results import EvalResults
from tests.support.distributed import REPOSITORY
from tools import seeds_table

RECIPES = REPOSITORY / "launch/recipes/progressive"


def test_means_deviations_and_differences_are_taken_over_seeds(tmp_path):
    scores: dict[str, dict[str, Any]] = {}
    for cell, values in {"kd": (3.0, 3.2), "pro_kd": (2.9, 3.4)}.items():
        for seed, ce in enumerate(values, start=1):
            empty = dict.fromkeys(ModelScores.__dataclass_fields__)
            del empty["sums"]
            required = {"perplexity": 1.0, "num_positions": 4, "top1_accuracy": 0.5}
            scores[f"{cell}, seed {seed}"] = {**empty, **required, "ce": ce, "kl": ce - 2.5}
    scores["teacher"] = {**scores["kd, seed 1"], "kl": None}
    path = tmp_path / "eval.json"
    EvalResults(inputs={}, scores=scores, paired={}, software={}, date="").save(path)
    lines = list(seeds_table.table(seeds_table.read(path), "kd"))
    assert lines[2:] == [
        "| kd | 2 | 3.1000 ± 0.1414 | 0.6000 ± 0.1414 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 |",
        "| pro_kd | 2 | 3.1500 ± 0.3536 | 0.6500 ± 0.3536 | +0.0500 ± 0.2121 | +0.0500 ± 0.2121 |",
    ]


@pytest.mark.parametrize("name", ["pro_kd", "annealing_kd"])
def test_the_phases_of_a_progressive_student_have_its_plain_ones_rate_in_every_step(name):
    plain = load_recipe(Recipe, RECIPES / "student.yaml")
    phases = phases_of(load_recipe(Recipe, RECIPES / f"{name}.yaml"))
    assert plain.train
    rates = []
    for phase in phases:
        assert phase.recipe.train
        steps, optimizer = phase.recipe.train.steps, phase.recipe.optimizer
        assert (optimizer.lr, optimizer.min_lr) == (plain.optimizer.lr, plain.optimizer.min_lr)
        rates += [
            min(step / (optimizer.warmup_steps or 1), 1) * optimizer.decay_left(step, steps=steps)
            for step in range(1, steps + 1)
        ]
    expected = [
        min(step / plain.optimizer.warmup_steps, 1)
        * plain.optimizer.decay_left(step, steps=plain.train.steps)
        for step in range(1, plain.train.steps + 1)
    ]
    assert rates == pytest.approx(expected)
    assert (plain.model, plain.train.seed) == (
        phases[-1].recipe.model,
        phases[-1].recipe.train.seed if phases[-1].recipe.train else None,
    )
    targets = [
        (p.recipe.objective.temperature, p.recipe.objective.peak_kd_weight, p.recipe.data.cache)
        for p in phases
        if p.recipe.data
    ]
    assert len(set(targets)) == len(phases)
