"""The figures of eval.gradients: a table made from its section and the training text, or that of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache_of, open_sequences
from distill_pretrain.errors import ConfigError
from distill_pretrain.eval.config import GradientsConfig
from distill_pretrain.eval.gradients import compare_gradients
from distill_pretrain.eval.student import CheckpointStudent
from distill_pretrain.eval.subject import cache_identity
from distill_pretrain.eval.targets import gradient_batches


def gradient_figures(
    source: DataConfig,
    config: GradientsConfig,
    teacher: LogitsEngine,
    earlier: Mapping[str, Any] | None,
    *,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Compare the gradients of eval.gradients, unless that was done before with the same inputs.

    Args:
        source: section that names the training text.
        config: section that names the student, the caches and the numbers of micro-batches.
        teacher: the teacher of the caches; its whole distribution is what they are compared with.
        earlier: what this function returned in an earlier run; None if there was none.
        progress: called with the number of micro-batches just done.

    Returns:
        {"inputs": all that decides the figures, "caches": what `compare_gradients` returns}, as JSON values.

    Raises:
        ConfigError: the text is too short, or its documents are separate.
        CacheMismatch: a cache is of another text.
        CheckpointError, TokenizerMismatch: the student cannot be used.
    """
    if source.documents == "separate":
        what = "gradients are compared on joined documents alone"
        raise ConfigError(what, where="eval.gradients", found="data.documents: separate")
    data = open_sequences(source)
    most = max(config.num_batches)
    if most * config.micro_batch_size > data.num_sequences:
        raise ConfigError(
            "data.tokens has too few sequences for the gradients",
            where="eval.gradients.num_batches",
            found=f"{most} micro-batches of {config.micro_batch_size}",
            expected=f"at most {data.num_sequences // config.micro_batch_size} micro-batches",
            remedy="lower num_batches or micro_batch_size",
        )
    caches = {
        name: open_cache_of(
            location,
            data,
            num_sequences=most * config.micro_batch_size,
            key=f"eval.gradients.caches.{name}",
            corpus_key="data.tokens",
        )
        for name, location in config.caches.items()
    }
    student = CheckpointStudent(config.model, vocab_size=data.vocab_size)
    inputs = {
        "model": {"path": str(config.model), "checkpoint_sha256": student.sha256},
        "teacher": teacher.identity,
        "sequence_plan_id": data.plan.plan_id,
        "caches": {name: cache_identity(cache) for name, cache in caches.items()},
        "num_batches": sorted(set(config.num_batches)),
        "micro_batch_size": config.micro_batch_size,
        "residual": config.residual,
    }
    if earlier and earlier["inputs"] == inputs:
        return dict(earlier)
    batches = gradient_batches(
        data, caches, num_batches=most, micro_batch_size=config.micro_batch_size
    )
    found = compare_gradients(
        student,
        teacher,
        batches,
        num_batches=config.num_batches,
        residual=config.residual,
        progress=progress,
    )
    return {"inputs": inputs, "caches": found}
