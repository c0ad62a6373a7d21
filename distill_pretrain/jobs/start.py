"""Weights that a student starts from, as a recipe names them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.teacher.loading import (
    model_width,
    require_own_tokenizer,
    require_plausible_width,
)

if TYPE_CHECKING:
    from distill_pretrain.checkpoint.start import Start, StartingWeights
    from distill_pretrain.data.sources import SequenceData

FROM_TEACHER = "teacher"
"""The value of train.start_from that means teacher.path; a folder of that name is ./teacher."""

_log = logging.getLogger(__name__)


def start_folder(recipe: Recipe) -> Path | None:
    """Return where the student's initial weights are; None where they are drawn."""
    assert recipe.train
    if recipe.train.continue_from is not None:
        return Path(recipe.train.continue_from)
    if recipe.train.start_from == FROM_TEACHER:
        assert recipe.teacher
        return recipe.teacher.path
    return None if recipe.train.start_from is None else Path(recipe.train.start_from)


def start_of(recipe: Recipe) -> Start | None:
    """Return what a training job needs to know of train.start_from; nothing is opened yet."""
    folder = start_folder(recipe)
    if folder is None:
        return None
    from distill_pretrain.checkpoint.start import Start

    assert recipe.train
    optimizer = None
    if recipe.train.continue_from is not None:
        optimizer = "fresh" if recipe.train.fresh_optimizer else "kept"
    return Start(
        folder=folder,
        open=lambda sequences: open_start(recipe, sequences),
        optimizer=optimizer,
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe the phase before it is compared with, by keys of a run's identity."""
    from distill_pretrain.checkpoint.identity import described

    assert recipe.data and recipe.model and recipe.train
    return {
        "model": described("model", recipe.model),
        "optimizer": described("optimizer", recipe.optimizer),
        "precision": recipe.train.precision,
        "distributed_optimizer": recipe.parallel.distributed_optimizer,
        "seq_len": recipe.data.seq_len,
        "vocab_size": recipe.data.vocab_size,
    }


def open_start(recipe: Recipe, sequences: SequenceData) -> StartingWeights:
    """Open the weights that the student of a recipe starts from, reading records and headers alone.

    Args:
        recipe: with data, model and train.
        sequences: its first corpus.

    Raises:
        TokenizerMismatch: another tokenizer or vocabulary than the corpus's.
        CheckpointError: no weights, damaged ones, or of another architecture.
    """
    from distill_pretrain.checkpoint.start import KEY, open_weights

    folder = start_folder(recipe)
    assert recipe.data and recipe.model and recipe.train and folder
    if recipe.train.continue_from is not None:
        from distill_pretrain.checkpoint.phase import open_phase

        return open_phase(
            folder,
            {**settings_of(recipe), "vocab_size": sequences.vocab_size},
            keeps_optimizer=not recipe.train.fresh_optimizer,
            tokenizer_digests=sequences.tokenizer_digests,
        )
    require_own_tokenizer(folder, recipe.data.tokens, key=KEY)
    require_plausible_width(folder, sequences.vocab_size, key=KEY)
    weights = open_weights(
        folder,
        model=recipe.model,
        vocab_size=sequences.vocab_size,
        seq_len=sequences.plan.seq_len,
        tokenizer_digests=sequences.tokenizer_digests,
    )
    width = model_width(folder)
    if width > sequences.vocab_size:
        _log.info(
            f"rows {sequences.vocab_size} to {width - 1} of the source's embedding are padding: "
            "no ids of the corpus, left out"
        )
    return weights
