"""Scores models on held-out sequences, next to each other and next to the teacher.

Shapes: B sequences of a micro-batch, L positions, K stored entries of a position, V vocabulary, S sequences scored in
all, F sums per sequence, M calibration bins, T positions of some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import LogitsEngine, Replica, SparseTargets, TeacherEngine
from distill_pretrain.data.batches import TargetSource
from distill_pretrain.errors import (
    CacheMismatch,
    ConfigError,
    TeacherError,
    TokenDataError,
    TokenizerMismatch,
)
from distill_pretrain.eval.chunks import logits_chunks, row_slices, together
from distill_pretrain.eval.metrics import (
    FIELDS,
    ModelScores,
    ScoreSettings,
    TeacherRows,
    position_terms,
    sequence_sums,
)
from distill_pretrain.eval.targets import read_targets

Engine = LogitsEngine | TeacherEngine

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
    engines: Mapping[str, Engine],
    teacher: Engine | None,
    plan: HeldOutPlan,
    *,
    cache: TargetSource | None = None,
    settings: ScoreSettings = ScoreSettings(),  # noqa: B008 - frozen
    num_sequences: int | None = None,
    micro_batch_size: int = 8,
    replica: Replica = Replica(),  # noqa: B008 - frozen
    all_reduce_sum: Callable[[torch.Tensor], None] = lambda state: None,
    progress: Callable[[int], None] = lambda sequences: None,
) -> dict[str, ModelScores]:
    """Scores every model on sequences 0 to num_sequences - 1 of the plan.

    Replica r of n takes sequences r, r + n, ...; each sequence's sums are kept apart until the end, and those of the
    calibration bins are exact, so the scores are the same for any number of replicas, and for any micro-batch size if
    the engines' logits are.

    Args:
        engines: name -> model.
        teacher: scored too, under "teacher"; its forward pass is shared by all models.
        plan: held-out sequences.
        cache: stored targets of these sequences, to compare the models with.
        settings: calibration bins and draft lengths.
        num_sequences: None, or more than there are, takes all.
        micro_batch_size: B.
        replica: the processes that hold the models that are in parts together, and every other model each; other
            replicas have all the models too. Its leader has every LM head.
        all_reduce_sum: adds a float64 CPU tensor up over all ranks of all replicas, in place.
        progress: called with the number of sequences just scored by this replica.

    Returns:
        Name -> scores, in the order of `engines`, then the teacher; the same on every rank.

    Raises:
        TokenizerMismatch: the models' vocabularies differ in size.
        TeacherError: a model returned NaN or infinite logits; raised on every rank.
        TokenDataError: not one position has a label.
        CacheMismatch: the cache was made from other tokens, or has no target at any labelled position.
        ConfigError: a model has the teacher's name.
    """
    assert 0 <= replica.number < replica.count and micro_batch_size >= 1, replica
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
    mine = np.arange(replica.number, count, replica.count, dtype=np.int64)
    for start in range(0, len(mine), micro_batch_size):
        numbers = mine[start : start + micro_batch_size]
        batch = _Batch.read(plan, cache, numbers)
        rows, bin_rows = _score(
            models,
            batch,
            has_teacher=teacher is not None,
            settings=settings,
            counts=replica.is_leader,
        )
        sums[:, torch.from_numpy(numbers)] = rows
        bins += bin_rows
        if replica.share(bool(rows[..., -1].any())):
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


class _Tally:
    """What the positions of a micro-batch contribute to the scores of every model.

    Args:
        batch: on the device of the logits.
        num_models: n, the teacher last among them.
        has_teacher: whether there is one.
        settings: bins and draft lengths.
    """

    def __init__(
        self, batch: _Batch, num_models: int, *, has_teacher: bool, settings: ScoreSettings
    ) -> None:
        self._settings, self._has_teacher = settings, has_teacher
        self._shape = batch.labels.shape
        self._labels = batch.labels.flatten()
        self._cached = None
        if batch.cached is not None:
            ids, probs = batch.cached.ids.flatten(0, 1), batch.cached.probs.flatten(0, 1)
            self._cached = SparseTargets(ids=ids, probs=probs)
        device = batch.labels.device
        sizes = (num_models, len(self._labels))
        self._terms = torch.zeros(*sizes, len(FIELDS), dtype=torch.float64, device=device)
        self._unusable = torch.zeros(*sizes, dtype=torch.bool, device=device)
        self._bins = torch.zeros(
            num_models, settings.ece_bins, 3, dtype=torch.float64, device=device
        )

    def add(self, first: int, logits: Sequence[torch.Tensor]) -> None:
        """Count positions from number `first`: logits [T, V] of every model."""
        rows = slice(first, first + len(logits[0]))
        for number, some in enumerate(logits):
            self._unusable[number, rows] = ~(some.amax(-1).isfinite() & some.amin(-1).isfinite())
        places = torch.nonzero(self._labels[rows] >= 0).flatten()
        if not len(places):
            return
        labels = self._labels[first + places]
        cached = self._cached
        if cached is not None:
            cached = SparseTargets(
                ids=cached.ids[first + places], probs=cached.probs[first + places]
            )
        teacher = TeacherRows.of(logits[-1][places]) if self._has_teacher else None
        for number, some in enumerate(logits):
            found = position_terms(
                some[places], labels, teacher, cached, ece_bins=self._settings.ece_bins
            )
            self._terms[number, first + places] = found.terms
            self._bins[number] += found.bins

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sums float64[n, B, F + 1], the last 1 where logits are not finite, and bins float64[n, M, 3]."""
        batch, length = self._shape
        sums = [
            sequence_sums(
                terms.view(batch, length, -1),
                (self._labels >= 0).view(batch, length),
                settings=self._settings,
                has_teacher=self._has_teacher,
            )
            for terms in self._terms
        ]
        unusable = self._unusable.view(-1, batch, length).any(-1, keepdim=True)
        return torch.cat((torch.stack(sums), unusable), -1).cpu(), self._bins.cpu()


def _score(
    models: Mapping[str, Engine],
    batch: _Batch,
    *,
    has_teacher: bool,
    settings: ScoreSettings,
    counts: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `_Tally.result`; zeros where this rank's share of the models only helps another rank to count."""
    there = batch.to(next(iter(models.values())).device)
    tally = _Tally(there, len(models), has_teacher=has_teacher, settings=settings)
    with torch.no_grad():
        for first, logits in together([logits_chunks(m, there.tokens) for m in models.values()]):
            for rows in row_slices(*logits[0].shape) if counts else ():
                tally.add(first + rows.start, [every[rows] for every in logits])
            # Or two chunks of every model would exist at once.
            del logits
    return tally.result()


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


def _check_vocabularies(models: Mapping[str, Engine]) -> None:
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
