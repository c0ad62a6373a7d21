"""Exporting: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.errors import ConfigError, DistillPretrainError, TokenizerMismatch
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe

if TYPE_CHECKING:
    from distill_pretrain.checkpoint.record import Checkpoint

_log = logging.getLogger(__name__)


def export(
    checkpoint_or_run: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    weights: str = "last",
    mean_of: int = 1,
) -> None:
    """Write a trained model as a Hugging Face folder, with all processes of the job.

    Args:
        checkpoint_or_run: a checkpoint folder, or a run folder, whose newest checkpoint is meant.
        folder: to be written, whole or not at all.
        dtype: "fp32" or "bf16"; None takes the precision of the training run.
        tokenizer: a Hugging Face folder, a sentencepiece model, or "none"; None takes the one of the run's tokens.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        weights: "last", or "ema", the moving average that the run kept (optimizer.ema_decay).
        mean_of: of the last weights of so many newest checkpoints of a run, the mean.

    Raises:
        CheckpointError: damaged, none there, fewer than `mean_of`, or without a moving average.
        ConfigError: both averages at once.
        TokenizerMismatch: the tokenizer is not the model's.
    """
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint, find_checkpoints

    if mean_of > 1 and weights != "last":
        raise ConfigError(
            "a mean of checkpoints is one of last weights",
            where=f"--mean-of {mean_of}",
            found=f"--weights {weights}",
            remedy="leave one of the two out",
        )
    earlier: list[Checkpoint] = []
    if mean_of > 1:
        weights = f"mean of {mean_of} checkpoints"
        *earlier, checkpoint = find_checkpoints(checkpoint_or_run, mean_of)
    else:
        checkpoint = find_checkpoint(checkpoint_or_run)
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    dtype = dtype or trained.precision
    path, eod_id, bos_id = tokenizer_of_run(checkpoint, required=tokenizer is None)
    if tokenizer == "none":
        path = None
    elif tokenizer is not None:
        path, eod_id, bos_id = _named_tokenizer(Path(tokenizer), trained.vocab_size)
    from distill_pretrain.checkpoint.hf.export import export_checkpoint
    from distill_pretrain.checkpoint.ownership import job_owning
    from distill_pretrain.files.ownership import owner_beside
    from distill_pretrain.processes.process import process_group, set_cpu_threads

    set_cpu_threads(0)
    owner = owner_beside(folder)
    remedy = "wait for it, or name another folder"
    with process_group(), job_owning(owner, what=folder, remedy=remedy):
        export_checkpoint(
            checkpoint,
            folder,
            dtype=dtype,
            tensor=tensor,
            pipeline=pipeline,
            tokenizer=path,
            eod_id=eod_id,
            weights=weights,
            earlier=earlier,
            bos_id=bos_id,
        )
    which = "" if weights == "last" else f" ({weights})"
    say(f"step {checkpoint.step} of {checkpoint_or_run}{which} is in {folder}, weights in {dtype}")


def _named_tokenizer(path: Path, vocab_size: int) -> tuple[Path, int, int | None]:
    """Load the tokenizer of --tokenizer; its path, the id that ends documents and the one that begins texts, if any.

    Raises:
        ConfigError: there is none.
        TokenizerMismatch: it has ids that the model does not.
    """
    from distill_pretrain.corpus.tokenizers import load_tokenizer

    found = load_tokenizer("hf" if path.is_dir() else "sentencepiece", path, bos="auto")
    if found.vocab_size > vocab_size:
        raise TokenizerMismatch(
            "the tokenizer has ids that the model does not",
            where=f"--tokenizer {path}",
            found=f"{found.vocab_size:,} ids",
            expected=f"at most {vocab_size:,}, the model's vocabulary",
            remedy="name the tokenizer of the model's corpus, or --tokenizer none",
        )
    return path, found.eod_id, found.bos_id


def tokenizer_of_run(
    checkpoint: Checkpoint, *, required: bool
) -> tuple[Path | None, int | None, int | None]:
    """Find the tokenizer of the tokens that a run was trained on, and the ids that end and begin their documents.

    None stands for what is not known, and for documents that begin with their text.

    Args:
        checkpoint: in its run folder, or copied elsewhere.
        required: raise where the tokens have been made again with another tokenizer, rather than leave it out.

    Raises:
        TokenizerMismatch: the tokens are no longer those of the run.
    """
    from distill_pretrain.config import load_recipe
    from distill_pretrain.corpus.tokens_record import TokensRecord

    path = checkpoint.folder.parent.parent / "recipe.yaml"
    try:
        data = load_recipe(Recipe, path).data if path.is_file() else None
        record = None if data is None else TokensRecord.beside(data.tokens)
    except DistillPretrainError as error:
        _log.warning(f"no tokenizer: {error}")
        return None, None, None
    if data is None or record is None:
        if required:
            _log.warning(
                "no tokenizer: the run's tokens have no tokens.json; name one with --tokenizer"
            )
        return None, None, None
    expected, found = checkpoint.identity.get("tokenizer_sha256"), record.tokenizer_digests
    if expected is not None and expected not in found:
        if not required:
            return None, None, None
        raise TokenizerMismatch(
            "the tokens of the run were made again with another tokenizer",
            where=data.tokens.parent,
            found=f"tokenizer {found[0][:12]}",
            expected=f"{expected[:12]}, recorded in the checkpoint",
            remedy="name the right one with --tokenizer, or --tokenizer none",
        )
    return data.tokens.parent / record.tokenizer["file"], record.eod_id, record.bos_id
