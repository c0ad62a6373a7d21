"""Weights that a student starts from, as a recipe names them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

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

    return Start(folder=folder, open=lambda sequences: open_start(recipe, sequences))


def open_start(recipe: Recipe, sequences: SequenceData) -> StartingWeights:
    """Open the weights of train.start_from for the student of a recipe, reading records and headers alone.

    Args:
        recipe: with data, model and train.
        sequences: its first corpus.

    Raises:
        TokenizerMismatch: another tokenizer or vocabulary than the corpus's.
        CheckpointError: no weights, damaged ones, or of another architecture.
    """
    from distill_pretrain.checkpoint.start import KEY, open_weights

    folder = start_folder(recipe)
    assert recipe.data and recipe.model and folder
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
