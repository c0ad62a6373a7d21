"""Jobs as functions: what the verbs of the command line do, from a recipe's file or from its sections.

Under torchrun every process calls the same function. What a job has to change in the process it leaves again, so that a
notebook or another trainer can go on; megatron-core, once imported, stays.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill_pretrain.api.checks import section
from distill_pretrain.config import load_recipe
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe

if TYPE_CHECKING:
    from distill_pretrain.cache.manifest import Manifest
    from distill_pretrain.reports.pruning import PruneReport
    from distill_pretrain.reports.results import EvalResults
    from distill_pretrain.train.callbacks import Callback

RecipeLike = Recipe | Mapping[str, Any] | str | Path
"""A recipe, its sections by name (as mappings or as typed sections), or the path of its file."""


def capture_cache(recipe: RecipeLike, overrides: Sequence[str] = ()) -> dict[Path, Manifest]:
    """Run a teacher over a corpus and store its targets, as `distill-pretrain capture` does; resumable.

    Args:
        recipe: with the sections data, teacher and capture.
        overrides: `section.key=value` on top of a recipe's file.

    Returns:
        The manifests of the caches that this process finished, by folder.

    Raises:
        ConfigError: the recipe cannot be captured from; lists every problem.
        DistillPretrainError: corpus, teacher or caches do not fit, or cannot be read or written.
    """
    from distill_pretrain.jobs.capture import capture_caches

    with _left_as_it_was():
        return capture_caches(as_recipe(recipe, overrides))


def train_student(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, callbacks: Sequence[Callback] = ()
) -> bool:
    """Train, or go on training, a model with megatron-core, as `distill-pretrain train` does.

    Args:
        recipe: with the sections data, model and train; teacher, where objective.target says so.
        overrides: `section.key=value` on top of a recipe's file.
        callbacks: told of every step; the same ones on every rank.

    Returns:
        Whether it reached its last step; False where a signal asked it to stop, after it has saved.

    Raises:
        ConfigError: the recipe cannot be trained from; lists every problem.
        DistillPretrainError: corpus, cache, teacher, layout or checkpoints do not fit.
    """
    from distill_pretrain.jobs.train import train_model

    with _left_as_it_was():
        return not train_model(as_recipe(recipe, overrides), callbacks)


def evaluate_models(recipe: RecipeLike, overrides: Sequence[str] = ()) -> EvalResults:
    """Score models on held-out text, as `distill-pretrain eval` does, and write eval.output.

    Args:
        recipe: with the sections data and eval; teacher, if there is one.
        overrides: `section.key=value` on top of a recipe's file.

    Returns:
        The figures, on every process.

    Raises:
        ConfigError: settings that cannot be used; lists every problem.
        DistillPretrainError: corpus, models, teacher or cache do not fit.
    """
    from distill_pretrain.jobs import evaluate

    with _left_as_it_was():
        return evaluate.evaluate_models(as_recipe(recipe, overrides))


def export_model(
    checkpoint_or_run: str | Path,
    folder: str | Path,
    *,
    dtype: Literal["fp32", "bf16"] | None = None,
    tokenizer: str | Path | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    weights: Literal["last", "ema"] = "last",
    mean_of: int = 1,
) -> None:
    """Write a trained model as a Hugging Face folder, as `distill-pretrain export` does.

    Args:
        checkpoint_or_run: a checkpoint folder, or a run folder, whose newest checkpoint is meant.
        folder: to be written, whole or not at all.
        dtype: of the weights; None takes the precision of the training run.
        tokenizer: a Hugging Face folder, a sentencepiece model, or "none"; None takes the one of the run's tokens.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        weights: the last ones, or their moving average, which the run must have kept (optimizer.ema_decay).
        mean_of: of the last weights of so many newest checkpoints of a run, the mean.

    Raises:
        CheckpointError: damaged, none there, fewer than `mean_of`, or without a moving average.
        ConfigError: both averages at once.
        TokenizerMismatch: the tokenizer is not the model's.
    """
    from distill_pretrain.jobs.export import export

    with _left_as_it_was():
        export(
            Path(checkpoint_or_run),
            Path(folder),
            dtype=dtype,
            tokenizer=tokenizer,
            tensor=tensor,
            pipeline=pipeline,
            weights=weights,
            mean_of=mean_of,
        )


def prune_model(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, to_parameters: Sequence[str] = ()
) -> PruneReport:
    """Make smaller models of a trained one, as `distill-pretrain prune` does, and write prune.output_dir.

    Args:
        recipe: with the sections data and prune.
        overrides: `section.key=value` on top of a recipe's file.
        to_parameters: further targets: numbers of parameters, such as "70M", to search shapes for.

    Returns:
        The scores, and what every target has become.

    Raises:
        ConfigError: settings that cannot be used, or targets that no pruning reaches.
        DistillPretrainError: the source is damaged or does not fit the corpus, or a folder is something else.
    """
    from distill_pretrain.jobs.prune import prune

    with _left_as_it_was():
        return prune(as_recipe(recipe, overrides), to_parameters=to_parameters)


def as_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that is meant.

    Raises:
        ConfigError: lists every problem; or overrides are given where there is no file to override.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(Recipe, Path(recipe), overrides)
    if overrides:
        raise ConfigError(
            "overrides are for the recipe of a file",
            where="overrides",
            found=", ".join(overrides),
            remedy="set the values in the sections",
        )
    return recipe if isinstance(recipe, Recipe) else section(Recipe, recipe)


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Undo at the end what a job changes in its process: torch where there is no GPU, warnings, threads, variables."""
    import torch

    from distill_pretrain.mcore.runtime.cpu_compat import disabled_at_the_end

    threads, environment = torch.get_num_threads(), set(os.environ)
    try:
        with warnings.catch_warnings(), disabled_at_the_end():
            yield
    finally:
        torch.set_num_threads(threads)
        for name in set(os.environ) - environment:
            del os.environ[name]
