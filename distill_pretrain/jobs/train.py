"""Training: the student of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.start import FROM_TEACHER, start_of
from distill_pretrain.teacher.loading import load_teacher

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.train.callbacks import Callback


def require_training(recipe: Recipe) -> None:
    """Raise ConfigError where sections that training needs are missing."""
    from_teacher = recipe.train is not None and recipe.train.start_from == FROM_TEACHER
    needs_teacher = recipe.objective.target == "teacher" or from_teacher
    require(recipe, "train", "data", "model", "train", *(["teacher"] if needs_teacher else []))


def train_model(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> bool:
    """Train, or go on training, the model of a recipe, with all processes of the job.

    Args:
        recipe: with the sections data, model and train; teacher, where objective.target says so.
        callbacks: of the user; see `train.callbacks`.

    Returns:
        Whether it was asked to stop before the last step.

    Raises:
        ConfigError: the recipe cannot be trained from.
        DistillPretrainError: corpus, cache, teacher, layout or checkpoints do not fit.
    """
    require_training(recipe)
    assert recipe.data and recipe.model and recipe.train
    from distill_pretrain.train.job import train_student

    output_dir = recipe.train.output_dir

    def save_recipe() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, output_dir / "recipe.yaml")

    def open_teacher(sequences: SequenceData) -> LogitsEngine:
        assert recipe.teacher and recipe.data
        return load_teacher(recipe.teacher, sequences, recipe.data.tokens)

    return train_student(
        data=recipe.data,
        model=recipe.model,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        objective=recipe.objective,
        train=recipe.train,
        save_recipe=save_recipe,
        open_teacher=open_teacher if recipe.objective.target == "teacher" else None,
        start=start_of(recipe),
        callbacks=callbacks,
    )
