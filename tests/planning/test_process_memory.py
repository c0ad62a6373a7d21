"""Resident memory of a process as planned, against what docs/results/memory measured on the quickstart's student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.config import load_recipe
from distill_pretrain.jobs.plan.corpus import Corpus
from distill_pretrain.jobs.plan.student import student_job
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.memory import cpu_process_bytes, fullest_rank

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "docs/results/memory/quickstart.json").read_text())


@pytest.mark.parametrize("run", MEASURED["students"], ids=lambda run: f"tensor {run['tensor']}")
def test_the_quickstarts_process_is_within_15_percent(run):
    recipe = load_recipe(
        Recipe,
        ROOT / "launch/recipes/quickstart/student_kd.yaml",
        [f"parallel.tensor={run['tensor']}"],
    )
    corpus = Corpus(vocab_size=MEASURED["vocab_size"], seq_len=128, num_sequences=6144)
    job = student_job(recipe, corpus, world_size=run["tensor"], on_gpu=False)
    foreseen = cpu_process_bytes(fullest_rank(job), PlanConfig().process_base_gb * 1e9)
    assert foreseen == pytest.approx(run["rss_peak_gb"] * 1e9, rel=0.15)
