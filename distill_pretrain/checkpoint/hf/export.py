"""A checkpoint of this project, or a model in training, as a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.hf.save import require_replaceable, save_hf_model
from distill_pretrain.checkpoint.identity import TrainedModel, trained_model
from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import canonical_json
from distill_pretrain.mcore.init.deep import residual_scaling
from distill_pretrain.mcore.model.layout import check_layout, scoring_layout
from distill_pretrain.processes.process import on_first_rank


def _finer(dtype: str, trained: TrainedModel) -> str:
    """The finer of two precisions: of the export and of the training."""
    return "fp32" if "fp32" in (dtype, trained.precision) else "bf16"


LAST, EMA = "last", "ema"
"""Weights of a checkpoint that are exported."""


def export_source(identity: dict[str, Any], step: int, weights: str = LAST) -> dict[str, Any]:
    """Return what tells an export from those of other runs, steps and averages."""
    average = {} if weights == LAST else {"weights": weights}
    return {"run": hashlib.sha256(canonical_json(identity)).hexdigest(), "step": step, **average}


def require_average(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a run kept no moving average of its weights."""
    optimizer = checkpoint.identity.get("optimizer")
    if not isinstance(optimizer, dict) or optimizer.get("ema_decay") is None:
        raise CheckpointError(
            "the run kept no moving average of its weights",
            where=checkpoint.folder,
            found="optimizer.ema_decay: null",
            remedy="export the last weights, the mean of checkpoints, or train with optimizer.ema_decay",
        )


def export_model(
    chunks: Sequence[torch.nn.Module],
    identity: dict[str, Any],
    step: int,
    folder: Path,
    *,
    dtype: str,
    tokenizer: Path | None,
    eod_id: int | None,
    bos_id: int | None,
    replaces_step: bool = False,
    weights: str = LAST,
) -> None:
    """Write, by `save_hf_model`, the model that a run's identity describes; every rank calls it."""
    trained = trained_model(identity, folder)
    save_hf_model(
        chunks,
        model=trained.model,
        vocab_size=trained.vocab_size,
        max_positions=trained.seq_len,
        folder=folder,
        dtype=dtype,
        tokenizer=tokenizer,
        eod_id=eod_id,
        bos_id=bos_id,
        source=export_source(identity, step, weights),
        replaces_step=replaces_step,
    )


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str,
    tensor: int = 1,
    pipeline: int = 1,
    tokenizer: Path | None,
    eod_id: int | None,
    weights: str = LAST,
    earlier: Sequence[Checkpoint] = (),
    bos_id: int | None,
) -> None:
    """Load a checkpoint under a layout and write it as a Hugging Face folder. Every rank calls it.

    Args:
        checkpoint: of a training run; checked in full before it is read.
        folder: to be made.
        dtype: "fp32" or "bf16", of the stored weights; fp32 takes the optimizer's fp32 weights of a bf16 run.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        tokenizer: see `save_hf_model`.
        eod_id: token that ends a document.
        weights: "last"; "ema", the moving average; or a name for the mean of this and `earlier`.
        earlier: checkpoints of the same run.
        bos_id: token that begins one; None where they begin with their text.

    Raises:
        CheckpointError: the checkpoint is damaged, or has no such weights, the folder is something else, or no class
            of transformers computes the model.
        LayoutError: the layout does not fit the model or the number of processes.

    Needs the default process group.
    """
    identity = checkpoint.identity
    trained = trained_model(identity, checkpoint.folder)
    model = trained.model
    parallel = scoring_layout(tensor, pipeline)
    check_layout(
        model,
        parallel,
        world_size=dist.get_world_size(),
        micro_batch_size=1,
        global_batch_size=dist.get_world_size(),
        seq_len=trained.seq_len,
    )
    if weights == EMA:
        require_average(checkpoint)
    source = export_source(identity, checkpoint.step, weights)
    on_first_rank(lambda: require_replaceable(folder, source))
    for each in (checkpoint, *earlier):
        each.verify()
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    # The seed decides nothing: the weights are loaded.
    with model_parallel(parallel, seed=0):
        from distill_pretrain.mcore.model.chunks import build_model_chunks
        from distill_pretrain.mcore.student.state import load_average, load_mean, load_weights

        plain = weights == LAST and residual_scaling(model).is_plain
        chunks = build_model_chunks(
            model,
            parallel,
            vocab_size=trained.vocab_size,
            seq_len=trained.seq_len,
            # Branches are scaled on the way out, and averages are fp32: what is scaled or averaged must not have been
            # rounded for this export before.
            precision=dtype if plain else "fp32" if weights != LAST else _finer(dtype, trained),
            seed=None,
        )
        if earlier:
            load_mean(chunks, [each.folder for each in (*earlier, checkpoint)])
        elif weights == EMA:
            load_average(chunks, checkpoint.folder)
        else:
            load_weights(chunks, checkpoint.folder, from_masters=dtype == "fp32")
        export_model(
            chunks,
            identity,
            checkpoint.step,
            folder,
            dtype=dtype,
            tokenizer=tokenizer,
            eod_id=eod_id,
            weights=weights,
            bos_id=bos_id,
        )
