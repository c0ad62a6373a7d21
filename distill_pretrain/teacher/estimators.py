"""What the samplers promise, measured on a teacher: error, bias, unique ids, bytes.

Errors are sums over the vocabulary of squared deviations from the teacher's softmax t, averaged over positions. Exact
ones (float64): multinomial sum t (1 - t) / N, systematic sum f (1 - f) / N^2 with f the fractional part of N t, the
rest the squared bias of the kept ids' probabilities. Real targets under several seeds check them.

Shapes: T positions of a micro-batch, V vocabulary, E entries in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import IGNORED_LABEL, TeacherEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.sampling.samplers import Sampler, sample_sets
from distill_pretrain.sampling.weights import integer_weights
from distill_pretrain.teacher.estimator_sums import SamplerFigures, SamplerSums, TeacherSums
from distill_pretrain.teacher.scoring import require_whole_vocabulary

SEEDS = 8
CHECKED_POSITIONS_PER_BATCH = 64

Float64Array = npt.NDArray[np.float64]


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
    teacher = TeacherSums(draws)
    sums = [SamplerSums(sampler) for sampler in samplers]
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
    teacher: TeacherSums,
    sums: Sequence[SamplerSums],
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
    tokens, labels = sequences.plan.unmasked.read(np.arange(first, first + count))
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
    """Count the positions whose targets differ between two micro-batch sizes, and all positions looked at.

    The teacher's float rounding may depend on the batch's shape; see `capture.micro_batch_size`.
    """
    a, b = (
        _rows_of(engine, sequences, sampler, num_sequences, size)
        for size in (micro_batch_size, other)
    )
    return sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=True)), len(a)


def softmax64(logits: npt.NDArray[np.float32]) -> Float64Array:
    """Compute the softmax of float32[T, V] in float64[T, V]."""
    probs = logits.astype(np.float64)
    probs -= probs.max(axis=1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=1, keepdims=True)
    return probs


def _ratios(teacher: TeacherSums, sums: Sequence[SamplerSums]) -> tuple[VarianceRatio, ...]:
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
