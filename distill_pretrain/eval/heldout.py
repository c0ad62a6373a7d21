"""Scores models on held-out sequences, next to each other and next to the teacher.

Shapes: B sequences of a micro-batch, L positions, K stored entries of a position, V vocabulary, S sequences scored in
all, F sums per sequence, M calibration bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import LogitsEngine, SparseTargets
from distill_pretrain.data.batches import TargetSource
from distill_pretrain.errors import (
    CacheMismatch,
    ConfigError,
    TeacherError,
    TokenDataError,
    TokenizerMismatch,
)
from distill_pretrain.eval.metrics import (
    FIELDS,
    ModelScores,
    ScoreSettings,
    TeacherRows,
    batch_sums,
    finite_sequences,
)
from distill_pretrain.eval.targets import read_targets

TEACHER = "teacher"
"""Name under which the teacher's own figures are returned."""

_MOST_NAMED = 8


class HeldOutPlan(Protocol):
    """The part of `corpus.sequence_plan.SequencePlan` that is needed here."""

    @property
    def num_sequences(self) -> int:
        """How many there are."""
        ...

    def read(
        self, sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Read tokens int32[B, L] and labels int32[B, L] (-100: none)."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A micro-batch.

    Attributes:
        tokens: int64[B, L].
        labels: int64[B, L], -100 where there is none.
        cached: stored targets [B, L, K], or None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    cached: SparseTargets | None

    @classmethod
    def read(
        cls, plan: HeldOutPlan, cache: TargetSource | None, numbers: npt.NDArray[np.int64]
    ) -> _Batch:
        tokens, labels = plan.read(numbers)
        cached = None
        if cache is not None:
            cached = read_targets(cache, numbers, tokens)
        return cls(
            tokens=torch.from_numpy(tokens).long(),
            labels=torch.from_numpy(labels).long(),
            cached=cached,
        )

    def to(self, device: torch.device) -> _Batch:
        cached = self.cached
        if cached is not None:
            cached = SparseTargets(ids=cached.ids.to(device), probs=cached.probs.to(device))
        return _Batch(tokens=self.tokens.to(device), labels=self.labels.to(device), cached=cached)


def evaluate(
    engines: Mapping[str, LogitsEngine],
    teacher: LogitsEngine | None,
    plan: HeldOutPlan,
    *,
    cache: TargetSource | None = None,
    settings: ScoreSettings = ScoreSettings(),  # noqa: B008 - frozen
    num_sequences: int | None = None,
    micro_batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[torch.Tensor], None] = lambda state: None,
    progress: Callable[[int], None] = lambda sequences: None,
) -> dict[str, ModelScores]:
    """Scores every model on sequences 0 to num_sequences - 1 of the plan.

    Rank r takes sequences r, r + world_size, ...; each sequence's sums are kept apart until the end, and those of the
    calibration bins are exact, so the scores are the same for any world size, and for any micro-batch size if the
    engines' logits are.

    Args:
        engines: name -> model.
        teacher: scored too, under "teacher"; its forward pass is shared by all models.
        plan: held-out sequences.
        cache: stored targets of these sequences, to compare the models with.
        settings: calibration bins and draft lengths.
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
        CacheMismatch: the cache was made from other tokens, or has no target at any labelled position.
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
    width = len(settings.columns)
    # The last column counts sequences with unusable logits, so that all ranks learn of them.
    sums = torch.zeros(len(models), count, width + 1, dtype=torch.float64)
    bins = torch.zeros(len(models), settings.ece_bins, 3, dtype=torch.float64)
    mine = np.arange(rank, count, world_size, dtype=np.int64)
    for start in range(0, len(mine), micro_batch_size):
        numbers = mine[start : start + micro_batch_size]
        rows, bin_rows = _score(
            models, teacher is not None, _Batch.read(plan, cache, numbers), settings
        )
        sums[:, torch.from_numpy(numbers)] = rows
        bins += bin_rows
        if rows[..., -1].any():
            break
        progress(len(numbers))
    for state in (sums, bins):
        all_reduce_sum(state)
    _check_finite(list(models), sums[:, :, -1])
    _check_positions(sums[0], count, has_cache=cache is not None)
    return {
        name: ModelScores.of(
            sums[number, :, :-1].numpy(),
            bins[number].numpy(),
            settings=settings,
            has_teacher=teacher is not None,
            has_cache=cache is not None,
        )
        for number, name in enumerate(models)
    }


def _score(
    models: Mapping[str, LogitsEngine],
    has_teacher: bool,
    batch: _Batch,
    settings: ScoreSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums float64[models, B, F + 1], the last column 1 where logits are not finite, and bins float64[models, M, 3]."""
    width = len(settings.columns)
    sums = torch.zeros(len(models), len(batch.tokens), width + 1, dtype=torch.float64)
    bins = torch.zeros(len(models), settings.ece_bins, 3, dtype=torch.float64)
    teacher_rows = None
    # The teacher is last by name and first to run: the others need its distribution.
    order = list(enumerate(models.items()))
    for number, (_, engine) in reversed(order) if has_teacher else order:
        there = batch.to(engine.device)
        with torch.no_grad():
            logits = engine.logits(there.tokens)
            expected = (*there.tokens.shape, engine.vocab_size)
            assert tuple(logits.shape) == expected, (tuple(logits.shape), expected)
            finite = finite_sequences(logits)
            if not finite.all():
                sums[number, :, -1] = (~finite).double().cpu()
                break
            if has_teacher and teacher_rows is None:
                teacher_rows = TeacherRows.of(logits, there.labels)
            found = batch_sums(logits, there.labels, teacher_rows, there.cached, settings=settings)
            sums[number, :, :-1] = found.sequences.cpu()
            bins[number] = found.bins.cpu()
            del logits
    return sums, bins


def _check_positions(sums: torch.Tensor, count: int, *, has_cache: bool) -> None:
    """`sums` float64[S, F + 1] of any model: what was counted must not be nothing."""
    if not sums[:, FIELDS.index("positions")].any():
        raise TokenDataError(
            "no held-out position has a next token",
            found=f"{count} sequences, all of padding",
            remedy="use a larger held-out corpus",
        )
    if has_cache and not sums[:, FIELDS.index("cache_positions")].any():
        raise CacheMismatch(
            "the held-out cache has no target at any position with a next token",
            where="eval.cache",
            found=f"{count} sequences without targets",
            remedy="capture it from data.held_out_tokens, or leave eval.cache out",
        )


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
