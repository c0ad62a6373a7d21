"""Scores models on held-out sequences, next to each other and next to the teacher.

Shapes: B sequences of a micro-batch, L positions, V vocabulary, S sequences scored in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.errors import ConfigError, TeacherError, TokenDataError, TokenizerMismatch
from distill_pretrain.eval.metrics import (
    FIELDS,
    ModelScores,
    TeacherRows,
    finite_sequences,
    sequence_sums,
)

TEACHER = "teacher"
"""Name under which the teacher's own figures are returned."""

_MOST_NAMED = 8


class HeldOutPlan(Protocol):
    """The part of `formats.SequencePlan` that is needed here."""

    num_sequences: int

    def read(
        self, sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens int32[B, L] and labels int32[B, L] (-100: none)."""
        ...


def evaluate(
    engines: Mapping[str, LogitsEngine],
    teacher: LogitsEngine | None,
    plan: HeldOutPlan,
    *,
    num_sequences: int | None = None,
    micro_batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[torch.Tensor], None] = lambda state: None,
    progress: Callable[[int], None] = lambda sequences: None,
) -> dict[str, ModelScores]:
    """Scores every model on sequences 0 to num_sequences - 1 of the plan.

    Rank r takes sequences r, r + world_size, ...; each sequence's sums are kept apart until the end, so the
    scores are the same for any world size, and for any micro-batch size if the engines' logits are.

    Args:
        engines: name -> model.
        teacher: scored too, under "teacher"; its forward pass is shared by all models.
        plan: held-out sequences.
        num_sequences: None, or more than there are, takes all.
        micro_batch_size: B.
        rank: of this process among the replicas.
        world_size: number of replicas, each with all the models.
        all_reduce_sum: adds a float64 CPU tensor up over the replicas, in place.
        progress: called with the number of sequences just scored by this rank.

    Returns:
        Name -> scores, in the order of `engines`, then the teacher; the same on every rank.

    Raises:
        TokenizerMismatch: the models' vocabularies differ in size.
        TeacherError: a model returned NaN or infinite logits; raised on every rank.
        TokenDataError: not one position has a label.
        ConfigError: a model has the teacher's name.
    """
    assert 0 <= rank < world_size and micro_batch_size >= 1, (rank, world_size, micro_batch_size)
    if teacher is not None and TEACHER in engines:
        raise ConfigError(
            "a model is called like the teacher",
            where=f"eval.models.{TEACHER}",
            remedy="give it another name",
        )
    models = {**engines, **({} if teacher is None else {TEACHER: teacher})}
    _check_vocabularies(models)
    count = min(num_sequences or plan.num_sequences, plan.num_sequences)
    # The last column counts sequences with unusable logits, so that all ranks learn of them.
    state = torch.zeros(len(models), count, len(FIELDS) + 1, dtype=torch.float64)
    mine = np.arange(rank, count, world_size, dtype=np.int64)
    for start in range(0, len(mine), micro_batch_size):
        numbers = mine[start : start + micro_batch_size]
        tokens, labels = plan.read(numbers)
        rows = torch.from_numpy(numbers)
        state[:, rows] = _score(models, teacher is not None, tokens, labels)
        if state[:, rows, -1].any():
            break
        progress(len(numbers))
    all_reduce_sum(state)
    _check_finite(list(models), state[:, :, -1])
    sums = state[:, :, :-1].numpy()
    if not sums[0, :, 0].any():
        raise TokenDataError(
            "no held-out position has a next token",
            found=f"{count} sequences, all of padding",
            remedy="use a larger held-out corpus",
        )
    return {
        name: ModelScores.of(sums[number], has_teacher=teacher is not None)
        for number, name in enumerate(models)
    }


def _score(
    models: Mapping[str, LogitsEngine],
    has_teacher: bool,
    tokens: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
) -> torch.Tensor:
    """float64[models, B, F + 1] on the CPU; the last column is 1 where logits are not finite."""
    result = torch.zeros(len(models), len(tokens), len(FIELDS) + 1, dtype=torch.float64)
    teacher_rows = None
    # The teacher is last by name and first to run: the others need its distribution.
    order = list(enumerate(models.items()))
    for number, (_, engine) in reversed(order) if has_teacher else order:
        device_labels = torch.from_numpy(labels).to(engine.device, torch.int64)
        with torch.no_grad():
            logits = engine.logits(torch.from_numpy(tokens).to(engine.device, torch.int64))
            expected = (*tokens.shape, engine.vocab_size)
            assert tuple(logits.shape) == expected, (tuple(logits.shape), expected)
            finite = finite_sequences(logits)
            if not finite.all():
                result[number, :, -1] = (~finite).double().cpu()
                break
            if has_teacher and teacher_rows is None:
                teacher_rows = TeacherRows.of(logits, device_labels)
            result[number, :, :-1] = sequence_sums(logits, device_labels, teacher_rows).cpu()
            del logits
    return result


def _check_vocabularies(models: Mapping[str, LogitsEngine]) -> None:
    sizes = {name: engine.vocab_size for name, engine in models.items()}
    if len(set(sizes.values())) > 1:
        raise TokenizerMismatch(
            "models with different vocabularies cannot be compared per token",
            where="eval.models, teacher",
            found=", ".join(f"{name}: {size}" for name, size in sizes.items()),
            expected="one vocabulary size",
            remedy="compare models that use the same tokenizer",
        )


def _check_finite(names: list[str], unusable: torch.Tensor) -> None:
    """`unusable` float64[models, S]: above zero where a model's logits are not finite."""
    for name, row in zip(names, unusable, strict=True):
        sequences = torch.nonzero(row).flatten().tolist()
        if sequences:
            named = ", ".join(map(str, sequences[:_MOST_NAMED]))
            more = ", ..." if len(sequences) > _MOST_NAMED else ""
            raise TeacherError(
                "a model returned NaN or infinite logits",
                where=f"model {name}, held-out sequences {named}{more}",
                expected="finite numbers",
                remedy="check its training curve; a bf16 model may need dtype: fp32",
            )
