"""Sums over a teacher's positions from which the figures of samplers are means; see `estimators`.

Shapes: T positions of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.sampling.drawing import DRAWN, multinomial_errors
from distill_pretrain.sampling.samplers import Sampler

RAW_BYTES_PER_ENTRY = 3
# Ids rarer than this enter the expected number of distinct ids through the series of 1 - (1 - t)^n: for the n of a
# sampler here, its third-order term is below 1e-4 of the first.
_RARE = 1e-5
_GRID_POINTS = 33

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplerFigures:
    """One sampler on one teacher; means over positions.

    Attributes:
        sampler: what was measured.
        error: exact E ||target - t||^2: variance and squared bias together.
        error_renormalised: the same after scaling a truncated target to mass 1; None for unbiased samplers.
        error_drawn: mean of ||target - t||^2 over real targets.
        error_formula_there: `error` at the positions of `error_drawn`.
        bias: sum |E target - t|, from the integer weights or the kept ids.
        bias_renormalised: as `error_renormalised`.
        top1_deviation: mean over real targets of (target - t) at the likeliest id, in standard errors; None where
            nothing is drawn.
        unique_ids: entries per position.
        hc_bytes: payload bytes per position of the entropy codec, with tables built from these very targets.
        raw_bytes: bytes per position at 24 bits per entry.
    """

    sampler: Sampler
    error: float
    error_renormalised: float | None
    error_drawn: float
    error_formula_there: float
    bias: float
    bias_renormalised: float | None
    top1_deviation: float | None
    unique_ids: float
    hc_bytes: float
    raw_bytes: float


def truncation(
    probs: Float64Array, targets: RaggedTargets
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Compute the missing mass and squared errors of targets that keep some probabilities as they are.

    Args:
        probs: float64[T, V], t.
        targets: of T positions, each with an entry or more.

    Returns:
        Missing mass R, squared error sum_{not K} t^2, and the squared error after dividing by 1 - R, which adds
        sum_K (t / (1 - R) - t)^2; float64[T] each.
    """
    lengths = targets.entries_per_token
    kept = probs[np.repeat(np.arange(len(lengths)), lengths), targets.ids]
    starts = np.cumsum(lengths) - lengths
    mass, squares = np.add.reduceat(kept, starts), np.add.reduceat(kept**2, starts)
    tail = np.maximum((probs**2).sum(axis=1) - squares, 0)
    return 1 - mass, tail, tail + squares * (1 / mass - 1) ** 2


class TeacherSums:
    """Sums over positions that do not depend on a sampler, and the distinct ids of n multinomial draws.

    Args:
        draws: N of the samplers, ascending; distinct ids are known from half the least to three times the largest.
    """

    def __init__(self, draws: Sequence[int]) -> None:
        self.positions = 0
        self.entropy = self.top1 = self.one_minus_squares = 0.0
        least, most = (draws[0], draws[-1]) if draws else (1, 1)
        self.grid: Float64Array = np.geomspace(max(1.0, least / 2), 3.0 * most, _GRID_POINTS)
        self.distinct: Float64Array = np.zeros(_GRID_POINTS)

    def add(self, probs: Float64Array) -> None:
        """Take a batch into account."""
        self.positions += len(probs)
        self.entropy -= float((probs * np.log(np.maximum(probs, 1e-300))).sum())
        self.top1 += float(probs.max(axis=1).sum())
        self.one_minus_squares += float(multinomial_errors(probs, 1).sum())
        # An id is among n draws with probability 1 - (1 - t)^n; summed over ids that is the expected number of distinct
        # ones. For the many rare ids n t - n (n - 1) t^2 / 2 will do, of which two sums over V serve every n.
        common = np.log1p(-np.minimum(probs[probs > _RARE], 1 - 1e-15))
        rare = probs[probs <= _RARE]
        first, second = float(rare.sum()), float((rare**2).sum())
        for point, n in enumerate(self.grid):
            seen = -np.expm1(n * common).sum()
            self.distinct[point] += seen + n * first - n * (n - 1) / 2 * second

    def draws_for(self, unique_ids: float) -> float:
        """Return the n for which n multinomial draws have so many distinct ids; nan where the grid does not reach."""
        # Between the grid's points distinct ids grow like a power of n, which is a line in logarithms.
        distinct = np.log(self.distinct / self.positions)
        wanted = np.log(unique_ids)
        if not distinct[0] <= wanted <= distinct[-1]:
            return float("nan")
        return float(np.exp(np.interp(wanted, distinct, np.log(self.grid))))


@dataclass
class SamplerSums:
    """Sums over positions for one sampler."""

    sampler: Sampler
    positions: int = 0
    error: float = 0.0
    error_renormalised: float = 0.0
    bias: float = 0.0
    bias_renormalised: float = 0.0
    entries: int = 0
    targets: list[RaggedTargets] = field(default_factory=list)
    drawn: int = 0
    error_drawn: float = 0.0
    error_formula: float = 0.0
    top1: list[Float64Array] = field(default_factory=list)

    def add(self, probs: Float64Array, targets: RaggedTargets, rounding: float) -> None:
        """Add the exact figures of a batch; `rounding` is its sum of |w / W - t|."""
        self.positions += len(probs)
        self.entries += len(targets.ids)
        self.targets.append(targets)
        self.error += float(self._errors(probs, targets).sum())
        if targets.kind == "counts":
            self.bias += rounding
            return
        # sum |E target - t|: what is left out is missing, R in all; scaled to mass 1, the kept are R too high as well.
        missing, _, renormalised = truncation(probs, targets)
        self.bias += float(missing.sum())
        self.bias_renormalised += float(2 * missing.sum())
        self.error_renormalised += float(renormalised.sum())

    def check(self, probs: Float64Array, seeds: Sequence[RaggedTargets]) -> None:
        """Add up what real targets of some positions under several seeds are off by."""
        rows, likeliest = np.arange(len(probs)), probs.argmax(axis=1)
        deviations = np.zeros(len(probs))
        # Deviations of one position under several seeds are of one distribution: their mean counts as one measurement.
        for targets in seeds:
            dense = -probs
            dense[np.repeat(rows, targets.entries_per_token), targets.ids] += targets.probs()
            self.error_drawn += float((dense**2).sum())
            self.error_formula += float(self._errors(probs, targets).sum())
            deviations += dense[rows, likeliest] / len(seeds)
        self.drawn += len(seeds) * len(probs)
        self.top1.append(deviations)

    def _errors(self, probs: Float64Array, targets: RaggedTargets) -> Float64Array:
        if self.sampler.kind == "counts":
            return DRAWN[self.sampler.name].errors(probs, self.sampler.num_draws)
        return truncation(probs, targets)[1]

    def figures(self, vocab_size: int) -> SamplerFigures:
        """Return the means over all positions so far."""
        is_drawn = self.sampler.kind == "counts"
        top1 = np.concatenate(self.top1)
        spread = top1.std() / np.sqrt(len(top1))
        return SamplerFigures(
            sampler=self.sampler,
            error=self.error / self.positions,
            error_renormalised=None if is_drawn else self.error_renormalised / self.positions,
            error_drawn=self.error_drawn / self.drawn,
            error_formula_there=self.error_formula / self.drawn,
            bias=self.bias / self.positions,
            bias_renormalised=None if is_drawn else self.bias_renormalised / self.positions,
            top1_deviation=float(top1.mean() / spread) if is_drawn and spread > 0 else None,
            unique_ids=self.entries / self.positions,
            hc_bytes=self._hc_bytes(vocab_size) / self.positions,
            raw_bytes=RAW_BYTES_PER_ENTRY * self.entries / self.positions,
        )

    def _hc_bytes(self, vocab_size: int) -> int:
        tables = build_tables(
            self.targets,
            kind=self.sampler.kind,
            num_draws=self.sampler.num_draws,
            vocab_size=vocab_size,
        )
        codec = HcCodec(tables)
        return sum(len(codec.encode(targets)) for targets in self.targets)
