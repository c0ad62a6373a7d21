"""Training: the student of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import CheckpointError, ConfigError
from distill_pretrain.jobs.phases import Phase, phases_of
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.start import FROM_TEACHER, start_of
from distill_pretrain.teacher.loading import load_teacher

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.train.callbacks import Callback

_log = logging.getLogger(__name__)


def require_training(recipe: Recipe) -> None:
    """Raise ConfigError where sections that training needs are missing, or ask for what there is not."""
    from_teacher = recipe.train is not None and recipe.train.start_from == FROM_TEACHER
    needs_teacher = recipe.objective.target == "teacher" or from_teacher
    require(recipe, "train", "data", "model", "train", *(["teacher"] if needs_teacher else []))
    from distill_pretrain.mcore.model.layout import require_algorithm

    require_algorithm(recipe.optimizer)
    if recipe.objective.with_decay and recipe.optimizer.decay_style == "constant":
        raise ConfigError(
            "a setting goes with the decay of the rate, and the rate does not decay",
            where=", ".join(f"objective.{key}" for key in recipe.objective.with_decay),
            found="{stable, decayed}, and optimizer.decay_style constant",
            expected="optimizer.decay_style wsd, linear or cosine",
            remedy="set one, or write [step, value] points; in a list of phases, set it in the phase that decays",
        )


def train_model(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> bool:
    """Train, or go on training, the model of a recipe, through its phases where it has some, with all processes.

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
    if recipe.phases:
        return _train_phases(recipe, callbacks)
    return _train_one(recipe, callbacks, lambda: _save(recipe))


def _save(recipe: Recipe) -> None:
    assert recipe.train
    recipe.train.output_dir.mkdir(parents=True, exist_ok=True)
    dump_recipe(recipe, recipe.train.output_dir / "recipe.yaml")


def _train_phases(recipe: Recipe, callbacks: Sequence[Callback]) -> bool:
    """Train one phase after another, and tell whether it was asked to stop before the last step of the last."""
    from distill_pretrain.checkpoint.lineage import write_phases
    from distill_pretrain.processes.process import on_first_rank, process_group, released_groups

    assert recipe.train
    root, phases = recipe.train.output_dir, phases_of(recipe)
    for phase in phases:
        require_training(phase.recipe)

    def save(phase: Phase) -> None:
        _save(recipe)
        write_phases(root, [each.name for each in phases])
        _save(phase.recipe)

    with process_group():
        kept, removed = on_first_rank(lambda: _phases_behind(phases))
        for phase in phases:
            if phase.name in removed:
                continue
            _log.info(f"== phase {phase.name}")
            with released_groups():
                if _train_one(
                    phase.recipe, callbacks, partial(save, phase), is_behind=phase.name in kept
                ):
                    return True
    return False


def _phases_behind(phases: Sequence[Phase]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the phases behind which another has begun: those with checkpoints, and those whose checkpoints are gone.

    Neither are trained again.

    Raises:
        CheckpointError: a phase is to be longer or shorter than it was when the next one began.
    """
    from distill_pretrain.checkpoint.store import CheckpointStore

    newest = []
    for phase in phases:
        assert phase.recipe.train
        newest.append(CheckpointStore(phase.recipe.train.output_dir / "checkpoints").complete())
    begun = max((number for number, found in enumerate(newest) if found), default=0)
    for phase, found in zip(phases[:begun], newest, strict=False):
        assert phase.recipe.train
        last = f"step-{phase.recipe.train.steps:08d}"
        if found and found[-1].name != last:
            raise CheckpointError(
                "the next phase has begun, from another step than the last one of this phase",
                where=f"phase {phase.name}",
                found=found[-1].name,
                expected=f"{last}, of its train.steps",
                remedy="restore its train.steps, or set another train.output_dir",
            )
    behind = list(zip(phases[:begun], newest, strict=False))
    kept = frozenset(phase.name for phase, found in behind if found)
    return kept, frozenset(phase.name for phase, found in behind if not found)


def _train_one(
    recipe: Recipe,
    callbacks: Sequence[Callback],
    save_recipe: Callable[[], None],
    *,
    is_behind: bool = False,
) -> bool:
    """Train the model of a recipe without phases; see `train_model` and, for `is_behind`, `train_student`."""
    assert recipe.data and recipe.model and recipe.train
    from distill_pretrain.train.job import train_student

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
        is_behind=is_behind,
        callbacks=callbacks,
    )
