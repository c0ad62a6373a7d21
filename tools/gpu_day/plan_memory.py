"""What `plan` says that the student of $WORK/student.yaml takes of the GPU's memory, for comparison with the peak."""

from __future__ import annotations

import os
from pathlib import Path

from figures import record

from distill_pretrain.config import load_recipe
from distill_pretrain.jobs.plan.corpus import corpus_of
from distill_pretrain.jobs.plan.student import memory_figures, student_job
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.planning.memory import fullest_rank


def main() -> None:
    recipe = load_recipe(Recipe, Path(os.environ["WORK"]) / "student.yaml", [])
    job = student_job(recipe, corpus_of(recipe), world_size=1)
    for figure in memory_figures(job, fullest_rank(job)):
        if isinstance(figure.value, int | float):
            record("plan", part=figure.name, gb=round(figure.value / 1e9, 3))


if __name__ == "__main__":
    main()
