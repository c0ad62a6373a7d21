"""What the samplers promise, measured on a teacher: error, bias, unique ids, bytes.

Errors are sums over the vocabulary of squared deviations from the teacher's softmax t, averaged over positions. Exact
ones (float64): multinomial sum t (1 - t) / N, systematic sum f (1 - f) / N^2 with f the fractional part of N t, the
rest the squared bias of the kept ids' probabilities. Real targets under several seeds check them.

Shapes: T positions of a micro-batch, V vocabulary, E entries in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets, TeacherEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.sampling import Sampler, sample_sets
from distill_pretrain.sampling.weights import integer_weights
from distill_pretrain.teacher.scoring import require_whole_vocabulary

SEEDS = 8
CHECKED_POSITIONS_PER_BATCH = 64
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


@dataclass(frozen=True, kw_only=True)
class VarianceRatio:
    """Variance of multinomial over that of systematic sampling.

    Attributes:
        num_draws: N of the systematic sampler.
        at_equal_draws: multinomial with the same N.
        at_equal_entries: multinomial with as many draws as give the same expected number of entries per position.
        draws_at_equal_entries: that number of draws.
    """

    num_draws: int
    at_equal_draws: float
    at_equal_entries: float
    draws_at_equal_entries: float


@dataclass(frozen=True, kw_only=True)
class EstimatorStudy:
    """Samplers compared on one teacher.

    Attributes:
        positions: looked at, those without a next token left out.
        vocab_size: V.
        entropy: mean of the teacher, in nats.
        top1: mean largest probability of the teacher.
        samplers: in the order given.
        ratios: for every N for which both unbiased samplers were given.
    """

    positions: int
    vocab_size: int
    entropy: float
    top1: float
    samplers: tuple[SamplerFigures, ...]
    ratios: tuple[VarianceRatio, ...]


def study_estimators(
    engine: TeacherEngine,
    sequences: SequenceData,
    samplers: Sequence[Sampler],
    *,
    num_sequences: int,
    micro_batch_size: int,
) -> EstimatorStudy:
    """Measure samplers on what a teacher says of the first sequences.

    Args:
        engine: the teacher.
        sequences: what it scores.
        samplers: to compare.
        num_sequences: so many, or all that there are.
        micro_batch_size: sequences per forward pass.

    Raises:
        TeacherError: NaN or infinite logits.
    """
    count = min(num_sequences, sequences.num_sequences)
    draws = sorted({s.num_draws for s in samplers if s.kind == "counts"})
    teacher = _TeacherSums(draws)
    sums = [_SamplerSums(sampler) for sampler in samplers]
    for first in range(0, count, micro_batch_size):
        size = min(micro_batch_size, count - first)
        for logits, positions in _scored(engine, sequences, first, size):
            _study_rows(teacher, sums, logits, positions)
    return EstimatorStudy(
        positions=teacher.positions,
        vocab_size=sequences.vocab_size,
        entropy=teacher.entropy / teacher.positions,
        top1=teacher.top1 / teacher.positions,
        samplers=tuple(one.figures(sequences.vocab_size) for one in sums),
        ratios=_ratios(teacher, sums),
    )


def _study_rows(
    teacher: _TeacherSums,
    sums: Sequence[_SamplerSums],
    logits: npt.NDArray[np.float32],
    positions: npt.NDArray[np.uint64],
) -> None:
    samplers = [one.sampler for one in sums]
    probs = softmax64(logits)
    teacher.add(probs)
    checked = _spread(len(logits))
    drawn = sample_sets(logits, positions, samplers)
    drawn_again = [
        sample_sets(logits[checked], positions[checked], [_reseeded(s, n) for s in samplers])
        for n in range(SEEDS)
    ]
    weights = integer_weights(logits).astype(np.float64)
    rounding = np.abs(weights / weights.sum(axis=1, keepdims=True) - probs).sum()
    for number, one in enumerate(sums):
        one.add(probs, drawn[number], float(rounding))
        one.check(probs[checked], [again[number] for again in drawn_again])


def _scored(
    engine: TeacherEngine, sequences: SequenceData, first: int, count: int
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]]]:
    """Logits [T, V] and positions [T] of those that have a next token, chunk by chunk."""
    tokens, labels = sequences.plan.read(np.arange(first, first + count))
    valid = (labels != IGNORED_LABEL).reshape(-1)
    start = first * sequences.plan.seq_len
    for chunk in engine.chunks(torch.from_numpy(tokens.astype(np.int64)).to(engine.device)):
        require_whole_vocabulary(chunk, sequences.vocab_size)
        rows = np.flatnonzero(valid[chunk.first : chunk.first + len(chunk.logits)])
        if len(rows):
            positions = (start + chunk.first + rows).astype(np.uint64)
            yield chunk.logits.cpu().float().numpy()[rows], positions


def moved_by_batch_shape(
    engine: TeacherEngine,
    sequences: SequenceData,
    sampler: Sampler,
    *,
    num_sequences: int,
    micro_batch_size: int,
    other: int,
) -> tuple[int, int]:
    """Positions whose targets differ between two micro-batch sizes, and all positions looked at.

    The teacher's float rounding may depend on the batch's shape; see `capture.micro_batch_size`.
    """
    a, b = (
        _rows_of(engine, sequences, sampler, num_sequences, size)
        for size in (micro_batch_size, other)
    )
    return sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=True)), len(a)


def softmax64(logits: npt.NDArray[np.float32]) -> Float64Array:
    """float64[T, V] of float32[T, V]."""
    probs = logits.astype(np.float64)
    probs -= probs.max(axis=1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=1, keepdims=True)
    return probs


def systematic_errors(probs: Float64Array, num_draws: int) -> Float64Array:
    """float64[T]: sum over V of f (1 - f) / N^2, f the fractional part of N t."""
    fraction = np.modf(num_draws * probs)[0]
    errors: Float64Array = (fraction * (1 - fraction)).sum(axis=1) / num_draws**2
    return errors


def multinomial_errors(probs: Float64Array, num_draws: float) -> Float64Array:
    """float64[T]: sum over V of t (1 - t) / N."""
    errors: Float64Array = (1 - (probs**2).sum(axis=1)) / num_draws
    return errors


def truncation(
    probs: Float64Array, targets: RaggedTargets
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Of targets that keep some probabilities as they are.

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


class _TeacherSums:
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
        self.positions += len(probs)
        self.entropy -= float((probs * np.log(np.maximum(probs, 1e-300))).sum())
        self.top1 += float(probs.max(axis=1).sum())
        self.one_minus_squares += float(multinomial_errors(probs, 1).sum())
        common = np.log1p(-np.minimum(probs[probs > _RARE], 1 - 1e-15))
        rare = probs[probs <= _RARE]
        first, second = float(rare.sum()), float((rare**2).sum())
        for point, n in enumerate(self.grid):
            seen = -np.expm1(n * common).sum()
            self.distinct[point] += seen + n * first - n * (n - 1) / 2 * second

    def draws_for(self, unique_ids: float) -> float:
        """The n for which n multinomial draws have so many distinct ids; nan where the grid does not reach."""
        distinct = np.log(self.distinct / self.positions)
        wanted = np.log(unique_ids)
        if not distinct[0] <= wanted <= distinct[-1]:
            return float("nan")
        return float(np.exp(np.interp(wanted, distinct, np.log(self.grid))))


@dataclass
class _SamplerSums:
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
        """Exact figures of a batch; `rounding` is its sum of |w / W - t|."""
        self.positions += len(probs)
        self.entries += len(targets.ids)
        self.targets.append(targets)
        self.error += float(self._errors(probs, targets).sum())
        if targets.kind == "counts":
            self.bias += rounding
            return
        missing, _, renormalised = truncation(probs, targets)
        self.bias += float(missing.sum())
        self.bias_renormalised += float(2 * missing.sum())
        self.error_renormalised += float(renormalised.sum())

    def check(self, probs: Float64Array, seeds: Sequence[RaggedTargets]) -> None:
        """Real targets of some positions under several seeds."""
        rows, likeliest = np.arange(len(probs)), probs.argmax(axis=1)
        deviations = np.zeros(len(probs))
        for targets in seeds:
            dense = -probs
            dense[np.repeat(rows, targets.entries_per_token), targets.ids] += targets.probs()
            self.error_drawn += float((dense**2).sum())
            self.error_formula += float(self._errors(probs, targets).sum())
            deviations += dense[rows, likeliest] / len(seeds)
        self.drawn += len(seeds) * len(probs)
        self.top1.append(deviations)

    def _errors(self, probs: Float64Array, targets: RaggedTargets) -> Float64Array:
        if self.sampler.name == "systematic":
            return systematic_errors(probs, self.sampler.num_draws)
        if self.sampler.name == "multinomial":
            return multinomial_errors(probs, self.sampler.num_draws)
        return truncation(probs, targets)[1]

    def figures(self, vocab_size: int) -> SamplerFigures:
        """Means."""
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


def _ratios(teacher: _TeacherSums, sums: Sequence[_SamplerSums]) -> tuple[VarianceRatio, ...]:
    known = {(one.sampler.name, one.sampler.num_draws): one for one in sums}
    found = []
    for (name, num_draws), systematic in known.items():
        multinomial = known.get(("multinomial", num_draws))
        if name != "systematic" or multinomial is None:
            continue
        equal = teacher.draws_for(systematic.entries / systematic.positions)
        found.append(
            VarianceRatio(
                num_draws=num_draws,
                at_equal_draws=multinomial.error / systematic.error,
                at_equal_entries=teacher.one_minus_squares / equal / systematic.error,
                draws_at_equal_entries=equal,
            )
        )
    return tuple(found)


def _reseeded(sampler: Sampler, number: int) -> Sampler:
    return Sampler(
        name=sampler.name,
        num_draws=sampler.num_draws,
        seed=(sampler.seed + 1 + number) % (1 << 64),
        top_p=sampler.top_p,
    )


def _spread(num_rows: int) -> npt.NDArray[np.int64]:
    """Some rows of a batch, evenly spread."""
    wanted = min(num_rows, CHECKED_POSITIONS_PER_BATCH)
    rows: npt.NDArray[np.int64] = np.arange(wanted) * num_rows // max(1, wanted)
    return rows


def _rows_of(
    engine: TeacherEngine,
    sequences: SequenceData,
    sampler: Sampler,
    num_sequences: int,
    micro_batch_size: int,
) -> list[npt.NDArray[Any]]:
    """(id, value) pairs of every position."""
    rows: list[npt.NDArray[Any]] = []
    for first in range(0, num_sequences, micro_batch_size):
        size = min(micro_batch_size, num_sequences - first)
        for logits, positions in _scored(engine, sequences, first, size):
            (targets,) = sample_sets(logits, positions, [sampler])
            pairs = np.stack((targets.ids.astype(np.float64), targets.values), axis=1)
            rows += np.split(pairs, np.cumsum(targets.entries_per_token)[:-1])
    return rows
