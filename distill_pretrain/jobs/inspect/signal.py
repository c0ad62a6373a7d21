"""What `distill-pretrain inspect --signal` says: the signal in a recipe's model, measured and predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.config import require
from distill_pretrain.errors import ConfigError, LayoutError, TokenizerMismatch
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.checkpoint.record import Checkpoint
    from distill_pretrain.contracts import TokenBatch
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.mcore.init.theory import Signal
    from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig

MOST_TOKENS = 1024
MOST_ROWS = 16
SEED = 1234


def show_signal(
    recipe: Recipe,
    *,
    num_sequences: int,
    positions: int,
    path: Path | None = None,
    picture: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure the signal in a recipe's model, predict it, and print both.

    Args:
        recipe: with the sections data and model.
        num_sequences: of the batch.
        positions: of a sequence, at most data.seq_len.
        path: run or checkpoint folder of a trained model; None for fresh weights.
        picture: PNG file.
        output: JSON file.

    Raises:
        ConfigError: options, a recipe or a layout that cannot be used.
        CheckpointError: damaged, or not this model's.
    """
    require(recipe, "inspect --signal", "data", *([] if path else ["model"]))
    assert recipe.data
    positions = min(positions, recipe.data.seq_len)
    _check(num_sequences, positions)
    if picture:
        from distill_pretrain.reports.picture import require_matplotlib

        require_matplotlib()
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.files.atomic import publish_bytes
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.mcore.init.theory import predict
    from distill_pretrain.processes.process import process_group, set_cpu_threads

    for file in filter(None, (picture, output)):
        require_writable(file)
    checkpoint = find_checkpoint(path) if path else None
    model = (
        trained_model(checkpoint.identity, checkpoint.folder).model if checkpoint else recipe.model
    )
    assert model is not None
    parallel = _layout(recipe, model, num_sequences, positions)
    set_cpu_threads(recipe.train.threads if recipe.train else 0)
    with process_group():
        # The theory is of attention over whole sequences.
        sequences = open_sequences(recipe.data.model_copy(update={"documents": "joined"}))
        batch = _batch(sequences, num_sequences, positions)
        seed = recipe.train.seed if recipe.train else SEED
        measured = _measure(model, parallel, sequences, batch, seed, checkpoint)
    if launch_rank() != 0:
        return
    predicted = predict(
        model,
        batch.tokens.cpu().numpy(),
        batch.labels.cpu().numpy(),
        vocab_size=sequences.vocab_size,
    )
    weights = (
        f"checkpoint of step {checkpoint.step:,}" if checkpoint else f"fresh weights, seed {seed}"
    )
    say(
        f"{model.num_layers} layers of width {model.hidden_size}, {model.arch}, init {model.init}, "
        f"{model.norm_placement}-norm; {weights}; {num_sequences} sequences of {positions} tokens"
    )
    _print(measured, predicted)
    title = (
        f"{model.num_layers} layers of width {model.hidden_size}, init: {model.init} ({weights})"
    )
    if picture:
        from distill_pretrain.reports.signal_picture import draw_signal

        publish_bytes(picture, draw_signal(measured, predicted, title=title))
        say(f"picture: {picture}")
    if output:
        report = {
            "model": model.model_dump(mode="json"),
            "weights": weights,
            "tokens": sequences.index.fingerprint.as_dict(),
            "sequences": num_sequences,
            "positions": positions,
            "measured": _lists(measured),
            "predicted": _lists(predicted),
        }
        publish_bytes(output, (json.dumps(report, indent=1) + "\n").encode())


def _check(num_sequences: int, positions: int) -> None:
    for option, value, least in (("--batch", num_sequences, 1), ("--positions", positions, 2)):
        if value < least:
            raise ConfigError(
                "an option cannot be used",
                where=option,
                found=value,
                expected=f"{least} or more",
                remedy="correct it",
            )
    if num_sequences * positions > MOST_TOKENS:
        raise ConfigError(
            "too many tokens for the prediction",
            where="--batch, --positions",
            found=f"{num_sequences} x {positions} tokens",
            expected=f"at most {MOST_TOKENS}",
            remedy="lower one of them",
        )


def _layout(recipe: Recipe, model: ModelConfig, batch: int, positions: int) -> ParallelConfig:
    """The recipe's tensor x pipeline layout; what else it says changes how a step is run, not what it computes."""
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.model.layout import check_layout

    parallel = ParallelConfig(
        tensor=recipe.parallel.tensor,
        pipeline=recipe.parallel.pipeline,
        first_stage_layers=recipe.parallel.first_stage_layers,
        last_stage_layers=recipe.parallel.last_stage_layers,
    )
    if launch_world_size() == 1:
        parallel = ParallelConfig()
    replicas = check_layout(
        model,
        parallel,
        world_size=launch_world_size(),
        micro_batch_size=batch,
        global_batch_size=batch * launch_world_size(),
        seq_len=positions,
    )
    if replicas > 1:
        raise LayoutError(
            "the signal is measured on one copy of the model",
            found=f"{launch_world_size()} processes, {replicas} copies",
            expected=f"{parallel.tensor * parallel.pipeline} processes",
            remedy="start fewer, or raise parallel.tensor or parallel.pipeline",
        )
    return parallel


def _batch(sequences: SequenceData, num_sequences: int, positions: int) -> TokenBatch:
    """The first sequences of the plan, cut to so many positions."""
    import numpy as np
    import torch

    from distill_pretrain.contracts import TokenBatch
    from distill_pretrain.processes.process import local_device

    if num_sequences > sequences.num_sequences:
        raise ConfigError(
            "the corpus is too small",
            where="--batch",
            found=num_sequences,
            expected=f"at most {sequences.num_sequences} sequences",
            remedy="lower it",
        )
    tokens, labels = (
        torch.from_numpy(part[:, :positions].astype(np.int64)).to(local_device())
        for part in sequences.plan.read(np.arange(num_sequences))
    )
    return TokenBatch(tokens=tokens, labels=labels)


def _measure(
    model: ModelConfig,
    parallel: ParallelConfig,
    sequences: SequenceData,
    batch: TokenBatch,
    seed: int,
    checkpoint: Checkpoint | None,
) -> Signal:
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.losses.config import ObjectiveConfig
    from distill_pretrain.losses.sparse_kd import DistillationObjective
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    seq_len = sequences.plan.seq_len
    if checkpoint is not None:
        trained = trained_model(checkpoint.identity, checkpoint.folder)
        if trained.vocab_size != sequences.vocab_size:
            raise TokenizerMismatch(
                "the checkpoint has another vocabulary than the corpus",
                where=checkpoint.folder,
                found=trained.vocab_size,
                expected=sequences.vocab_size,
                remedy="name the corpus that it was trained on in data.tokens",
            )
        checkpoint.verify()
        seq_len = trained.seq_len
    with model_parallel(parallel, seed=seed) as groups:
        from distill_pretrain.mcore.init.signal import measure
        from distill_pretrain.mcore.model.chunks import build_model_chunks
        from distill_pretrain.mcore.student.state import load_weights

        chunks = build_model_chunks(
            model,
            parallel,
            vocab_size=sequences.vocab_size,
            seq_len=seq_len,
            precision="fp32",
            seed=seed if checkpoint is None else None,
            loss_function=DistillationObjective(
                ObjectiveConfig(ce_weight=1.0, kd_weight=0.0),
                vocab_size=sequences.vocab_size,
                tensor_group=groups.tensor,
                logit_cap=model.logit_cap,
            ),
        )
        if checkpoint is not None:
            load_weights(chunks, checkpoint.folder)
        return measure(chunks, model, batch)


def _lists(signal: Signal) -> dict[str, Any]:
    return {name: values.tolist() for name, values in vars(signal).items()}


def _rows(num_layers: int) -> list[int]:
    """Points of the stream to print: all of a shallow model's, evenly spread ones of a deep model's."""
    if num_layers < MOST_ROWS:
        return list(range(num_layers + 1))
    return sorted({round(i * num_layers / (MOST_ROWS - 1)) for i in range(MOST_ROWS)})


def _print(measured: Signal, predicted: Signal) -> None:
    """A table: every figure as measured, and in brackets as predicted for fresh weights."""
    say("Measured on the batch (in brackets: predicted for fresh weights)")
    say()
    say(
        "after layer       variance        token correlation       gradient norm        "
        "weight-gradient norm"
    )
    for point in _rows(len(measured.variance) - 1):
        name = "embedding" if point == 0 else f"{point:>9}"
        cells = [
            _cell(measured.variance[point], predicted.variance[point]),
            _cell(measured.correlation[point], predicted.correlation[point]),
            _cell(measured.gradient[point] ** 0.5, predicted.gradient[point] ** 0.5),
        ]
        if point:
            cells.append(
                _cell(measured.weight_gradient[point - 1], predicted.weight_gradient[point - 1])
            )
        say(f"{name:<10} {'  '.join(cells)}".rstrip())
    say()
    say(f"variance         {measured.variance.min():.3g} to {measured.variance.max():.3g}")
    say(
        f"gradient norm    largest / smallest layer {measured.gradient_span:.3g} "
        f"({predicted.gradient_span:.3g} predicted)"
    )


def _cell(measured: float, predicted: float) -> str:
    return f"{measured:9.3g} ({predicted:9.3g})"
