"""Held-out figures from logits: per-position terms, their sums per sequence, and the scores made of them.

Shapes: B sequences of a micro-batch, L positions, T positions with a label, of some, V vocabulary, S sequences scored,
K stored entries of a position, M calibration bins, F columns of `columns(draft_lengths)`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.eval.acceptance import acceptance_rates, accepted_drafts
from distill_pretrain.eval.calibration import Calibration, bin_sums

FIELDS = (
    "positions",
    "ce",
    "top1_hits",
    "kl",
    "top1_agreements",
    "teacher_entropy",
    "acceptance",
    "cache_positions",
    "cross_entropy_cache",
    "entropy_cache",
)
"""What is summed over the labelled positions of a sequence; CE, KL and entropies in nats."""

POSITIONS_OF = {"cross_entropy_cache": "cache_positions"}
"""The column that counts what a field is a mean over, where it is not `positions`."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What is computed beside the fixed figures.

    Attributes:
        ece_bins: M.
        draft_lengths: every k of `accepted_length`.
    """

    ece_bins: int = 15
    draft_lengths: tuple[int, ...] = (2, 4, 8)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the F sums of a sequence: `FIELDS`, then accepted drafts and rounds of every k."""
        drafts = [(f"accepted_{k}", f"rounds_{k}") for k in self.draft_lengths]
        return FIELDS + tuple(name for pair in drafts for name in pair)


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """The teacher at some positions, computed once for all students.

    Attributes:
        logprobs: float32[T, V].
        probs: float32[T, V].
        top1: int64[T].
        entropy: float64[T], nats.
    """

    logprobs: torch.Tensor
    probs: torch.Tensor
    top1: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> TeacherRows:
        """Compute them of the teacher's logits [T, V]."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        probs = logprobs.exp()
        return cls(
            logprobs=logprobs,
            probs=probs,
            top1=logprobs.argmax(-1),
            entropy=-(probs * logprobs).sum(-1, dtype=torch.float64),
        )


@dataclass(frozen=True, kw_only=True)
class PositionTerms:
    """What positions contribute to a model's scores.

    Attributes:
        terms: float64[T, FIELDS].
        bins: float64[M, 3], of all of them; see `calibration.bin_sums`.
    """

    terms: torch.Tensor
    bins: torch.Tensor


def position_terms(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: TeacherRows | None = None,
    cached: SparseTargets | None = None,
    *,
    ece_bins: int,
) -> PositionTerms:
    """Compute what labelled positions contribute; several fp32 copies of the logits exist meanwhile.

    Log-softmax in float32, sums in float64; KL(teacher || student) = sum_v t_v (log t_v - log p_v) over the
    whole vocabulary. A position's terms do not depend on the rows beside it.

    Args:
        logits: [T, V].
        labels: int64[T], no negative ones.
        teacher: the teacher at the same positions; without it what compares with it is zero.
        cached: stored targets [T, K] of the same positions; without them what compares with them is zero.
        ece_bins: M.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    terms = torch.zeros(len(labels), len(FIELDS), dtype=torch.float64, device=logits.device)
    top1 = logprobs.argmax(-1)
    best = logprobs.gather(-1, top1[:, None]).squeeze(-1)
    hits = top1 == labels
    terms[:, 0] = 1.0
    terms[:, 1] = -logprobs.gather(-1, labels[:, None]).squeeze(-1).double()
    terms[:, 2] = hits.double()
    if cached is not None:
        terms[:, 7:10] = _cache_terms(logprobs, cached.ids, cached.probs.double())
    if teacher is not None:
        gaps = teacher.logprobs - logprobs
        terms[:, 3] = gaps.mul_(teacher.probs).sum(-1, dtype=torch.float64)
        terms[:, 4] = (top1 == teacher.top1).double()
        terms[:, 5] = teacher.entropy
        terms[:, 6] = acceptance_rates(teacher.probs, logprobs.exp_())
    return PositionTerms(terms=terms, bins=bin_sums(best.exp(), hits, ece_bins))


def sequence_sums(
    terms: torch.Tensor, valid: torch.Tensor, *, settings: ScoreSettings, has_teacher: bool
) -> torch.Tensor:
    """Add up the terms of every sequence, float64[B, F].

    A state over S sequences is these rows; states of ranks that scored different sequences add up.

    Args:
        terms: float64[B, L, FIELDS], zero where there is no label.
        valid: bool[B, L], positions with a label.
        settings: draft lengths.
        has_teacher: whether there is an acceptance rate.
    """
    known = valid if has_teacher else torch.zeros_like(valid)
    rates = terms[..., FIELDS.index("acceptance")]
    drafts = [accepted_drafts(rates, known, k) for k in settings.draft_lengths]
    return torch.cat([terms.sum(1), *drafts], dim=1)


def _cache_terms(logprobs: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Has a target, -sum_i t_i log p_i, -sum_i t_i log t_i: float64[T, 3] over stored ids [T, K], padded with -1."""
    present = (ids >= 0).any(-1).double()
    chosen = logprobs.gather(-1, ids.clamp(min=0)).double()  # padding has probability 0
    cross = -(probs * chosen).sum(-1)
    return torch.stack((present, cross, -torch.xlogy(probs, probs).sum(-1)), dim=1)


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Held-out figures of one model.

    Sampled targets t_hat of a cache are unbiased, so `cross_entropy_cache` = -sum_i t_hat_i log p_i estimates the
    cross-entropy of teacher and model without bias. Their entropy is lower than the teacher's (by Jensen), so
    `kl_cache` overestimates KL(teacher || model); by the same amount for every model scored on the cache, so that
    differences between models are differences of KL without bias. Top-k targets are neither: what lies outside the
    stored ids counts in no term.

    Attributes:
        num_sequences: S, sequences scored.
        num_positions: labelled positions scored.
        ce: nats per token, the mean over all positions.
        ce_standard_error: of `ce`, with sequences as the independent units; None for one sequence.
        perplexity: exp(ce).
        top1_accuracy: share of positions whose likeliest token is the true one.
        ece: expected calibration error of the likeliest token against the true one, 0 to 1.
        reliability: see `Calibration.as_dict`.
        kl: KL(teacher || model), nats per token; None without a teacher.
        top1_agreement: share of positions whose likeliest token is the teacher's; None without a teacher.
        teacher_entropy: the teacher's mean entropy, nats per token; None without a teacher.
        acceptance: mean probability that the teacher accepts a draft of the model; None without a teacher.
        accepted_length: k -> drafts accepted per round of k, as `accepted_drafts` defines it (None where no sequence
            has k positions in a row); None without a teacher.
        num_cache_positions: labelled positions with a stored target; None without a cache.
        cross_entropy_cache: -sum_i t_i log p_i over stored ids, nats per token; None without a cache.
        kl_cache: sum_i t_i (log t_i - log p_i) over stored ids, nats per token; None without a cache.
    """

    num_sequences: int
    num_positions: int
    ce: float
    ce_standard_error: float | None
    perplexity: float
    top1_accuracy: float
    ece: float
    reliability: dict[str, list[Any]]
    kl: float | None
    top1_agreement: float | None
    teacher_entropy: float | None
    acceptance: float | None
    accepted_length: dict[str, float | None] | None
    num_cache_positions: int | None
    cross_entropy_cache: float | None
    kl_cache: float | None
    sums: npt.NDArray[np.float64]
    """float64[S, F], the rows they were made of."""

    @classmethod
    def of(
        cls,
        sums: npt.NDArray[np.float64],
        bins: npt.NDArray[np.float64],
        *,
        settings: ScoreSettings,
        has_teacher: bool,
        has_cache: bool,
    ) -> ModelScores:
        """Make scores of sums float64[S, F], with at least one labelled position, and bins float64[M, 3]."""
        names = settings.columns
        total = {name: math.fsum(sums[:, column]) for column, name in enumerate(names)}
        positions = total["positions"]
        assert positions > 0, "no labelled position"
        stored = total["cache_positions"]
        assert stored > 0 or not has_cache, "no position with a stored target"
        ce = total["ce"] / positions
        calibration = Calibration(sums=bins)
        accepted = {str(k): _ratio(total, k) for k in settings.draft_lengths}
        cross = total["cross_entropy_cache"]
        return cls(
            num_sequences=len(sums),
            num_positions=round(positions),
            ce=ce,
            ce_standard_error=_ratio_error(sums[:, 1], sums[:, 0]),
            perplexity=math.exp(min(ce, 700.0)),
            top1_accuracy=total["top1_hits"] / positions,
            ece=calibration.ece,
            reliability=calibration.as_dict(),
            kl=total["kl"] / positions if has_teacher else None,
            top1_agreement=total["top1_agreements"] / positions if has_teacher else None,
            teacher_entropy=total["teacher_entropy"] / positions if has_teacher else None,
            acceptance=total["acceptance"] / positions if has_teacher else None,
            accepted_length=accepted if has_teacher else None,
            num_cache_positions=round(stored) if has_cache else None,
            cross_entropy_cache=cross / stored if has_cache else None,
            kl_cache=(cross - total["entropy_cache"]) / stored if has_cache else None,
            sums=sums,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {k: v for k, v in asdict(self).items() if k != "sums"}


def _ratio(total: dict[str, float], k: int) -> float | None:
    rounds = total[f"rounds_{k}"]
    return total[f"accepted_{k}"] / rounds if rounds else None


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
        """Compute `model` minus `other` in one of `FIELDS`; both scored the same sequences."""
        column = FIELDS.index(field)
        sizes = FIELDS.index(POSITIONS_OF.get(field, "positions"))
        positions = model.sums[:, sizes]
        assert np.array_equal(positions, other.sums[:, sizes]), "scored on different positions"
        gaps = model.sums[:, column] - other.sums[:, column]
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
