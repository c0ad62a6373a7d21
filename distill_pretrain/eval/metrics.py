"""Held-out figures from logits: per-position terms, their sums per sequence, and the scores made of them.

Shapes: B sequences of a micro-batch, L positions, T positions with a label, V vocabulary, S sequences scored,
F = len(FIELDS).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FIELDS = ("positions", "ce", "top1_hits", "kl", "top1_agreements", "teacher_entropy")
"""What is summed over the labelled positions of a sequence; CE, KL and entropy in nats."""

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """The teacher at the labelled positions of a micro-batch, computed once for all students.

    Attributes:
        logprobs: float32[T, V].
        top1: int64[T].
        entropy: float64[T], nats.
    """

    logprobs: torch.Tensor
    top1: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> TeacherRows:
        """From the teacher's logits float32[B, L, V] and labels int64[B, L] (negative: ignored)."""
        logprobs = torch.log_softmax(logits[labels >= 0].float(), dim=-1)
        entropy = logprobs.new_empty(len(logprobs), dtype=torch.float64)
        for rows in _chunks(logprobs):
            part = logprobs[rows]
            entropy[rows] = -(part.exp() * part).sum(-1, dtype=torch.float64)
        return cls(logprobs=logprobs, top1=logprobs.argmax(-1), entropy=entropy)


def sequence_sums(
    logits: torch.Tensor, labels: torch.Tensor, teacher: TeacherRows | None = None
) -> torch.Tensor:
    """Sums of `FIELDS` over the labelled positions of each sequence.

    Log-softmax in float32, sums in float64; KL(teacher || student) = sum_v t_v (log t_v - log p_v) over the
    whole vocabulary. A state over S sequences is these rows; states of ranks that scored different sequences
    add up, and a sequence's row does not depend on the rows beside it.

    Args:
        logits: float32[B, L, V].
        labels: int64[B, L]; negative labels (-100) are ignored.
        teacher: the teacher at the same positions; without it the last three fields are zero.

    Returns:
        float64[B, F].
    """
    batch, length, _ = logits.shape
    assert labels.shape == (batch, length), (labels.shape, logits.shape)
    valid = labels >= 0
    kept, kept_labels = logits[valid], labels[valid]
    terms = torch.zeros(len(kept), len(FIELDS), dtype=torch.float64, device=logits.device)
    terms[:, 0] = 1.0
    for rows in _chunks(kept):
        logprobs = torch.log_softmax(kept[rows].float(), dim=-1)
        top1 = logprobs.argmax(-1)
        terms[rows, 1] = -logprobs.gather(-1, kept_labels[rows, None]).squeeze(-1).double()
        terms[rows, 2] = (top1 == kept_labels[rows]).double()
        if teacher is not None:
            reference = teacher.logprobs[rows]
            pointwise = reference.exp() * (reference - logprobs)
            terms[rows, 3] = pointwise.sum(-1, dtype=torch.float64)
            terms[rows, 4] = (top1 == teacher.top1[rows]).double()
            terms[rows, 5] = teacher.entropy[rows]
    per_position = terms.new_zeros(batch, length, len(FIELDS))
    per_position[valid] = terms
    return per_position.sum(1)


def finite_sequences(logits: torch.Tensor) -> torch.Tensor:
    """bool[B]: whether every logit, float32[B, L, V], of the sequence is finite."""
    flat = logits.flatten(1)
    return torch.isfinite(flat.amax(1)) & torch.isfinite(flat.amin(1))


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Held-out figures of one model.

    Attributes:
        num_sequences: S, sequences scored.
        num_positions: labelled positions scored.
        ce: nats per token, the mean over all positions.
        ce_standard_error: of `ce`, with sequences as the independent units; None for one sequence.
        perplexity: exp(ce).
        top1_accuracy: share of positions whose likeliest token is the true one.
        kl: KL(teacher || model), nats per token; None without a teacher.
        top1_agreement: share of positions whose likeliest token is the teacher's; None without a teacher.
        teacher_entropy: the teacher's mean entropy, nats per token; None without a teacher.
    """

    num_sequences: int
    num_positions: int
    ce: float
    ce_standard_error: float | None
    perplexity: float
    top1_accuracy: float
    kl: float | None
    top1_agreement: float | None
    teacher_entropy: float | None
    sums: npt.NDArray[np.float64]
    """float64[S, F], the rows they were made of."""

    @classmethod
    def of(cls, sums: npt.NDArray[np.float64], *, has_teacher: bool) -> ModelScores:
        """From float64[S, F] with at least one labelled position."""
        total = {name: math.fsum(sums[:, column]) for column, name in enumerate(FIELDS)}
        positions = total["positions"]
        assert positions > 0, "no labelled position"
        ce = total["ce"] / positions
        return cls(
            num_sequences=len(sums),
            num_positions=round(positions),
            ce=ce,
            ce_standard_error=_ratio_error(sums[:, 1], sums[:, 0]),
            perplexity=math.exp(min(ce, 700.0)),
            top1_accuracy=total["top1_hits"] / positions,
            kl=total["kl"] / positions if has_teacher else None,
            top1_agreement=total["top1_agreements"] / positions if has_teacher else None,
            teacher_entropy=total["teacher_entropy"] / positions if has_teacher else None,
            sums=sums,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able figures."""
        return {k: v for k, v in asdict(self).items() if k != "sums"}


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A figure of one model minus another's, on the same positions.

    Attributes:
        difference: nats per token.
        standard_error: of the difference, with sequences as the independent units; None for one sequence.
    """

    difference: float
    standard_error: float | None

    @classmethod
    def of(cls, model: ModelScores, other: ModelScores, field: str) -> PairedDifference:
        """`model` minus `other` in one of `FIELDS`; both scored the same sequences."""
        assert np.array_equal(model.sums[:, 0], other.sums[:, 0]), "scored on different positions"
        column = FIELDS.index(field)
        gaps, positions = model.sums[:, column] - other.sums[:, column], model.sums[:, 0]
        return cls(
            difference=math.fsum(gaps) / math.fsum(positions),
            standard_error=_ratio_error(gaps, positions),
        )


def _ratio_error(totals: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> float | None:
    """Standard error of sum(totals) / sum(sizes) over sampled clusters (Cochran 1977, eq. 6.13)."""
    used = sizes > 0
    count = int(used.sum())
    if count < 2:
        return None
    ratio = math.fsum(totals) / math.fsum(sizes)
    residuals = totals[used] - ratio * sizes[used]
    variance = count / (count - 1) * math.fsum(residuals**2)
    return math.sqrt(variance) / math.fsum(sizes)


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices over [T, V] that bound the size of temporaries."""
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[-1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
