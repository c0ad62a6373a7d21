"""Do a cache's targets fit the text? Measured at the start of training on a sample of its sequences.

Every block is already tied to its tokens by a hash; this catches what no hash can: targets that were shifted before
they were hashed, and a teacher that ignored its input (frozen, wrongly loaded, uniform).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets
from distill_pretrain.data.batches import SequenceSource, TargetSource
from distill_pretrain.data.kept_mass import KeptShare
from distill_pretrain.errors import CacheMismatch, DistillPretrainError, TeacherError
from distill_pretrain.processes.logs import ANY_RANK

_log = logging.getLogger(__name__)

MOST_SEQUENCES = 64
MOST_POSITIONS = 1 << 17
FEWEST_SEQUENCES = 32
FEWEST_POSITIONS = 1000
DECISIVE_POSITIONS = 8000
NUM_GROUPS = 32
CLEARLY = 4.0
COMPARED_SHARE = 0.5
"""Of a capture: a smaller part has too few documents to have its hit rate."""
RATE_TOLERANCE = 0.05

_ALIGNED, _EARLIER, _LATER = range(3)


@dataclass(frozen=True, kw_only=True)
class Canary:
    """What a sample of a cache says about the text.

    The three columns compare the targets of a position with the next token of that position, of the one before, and
    of the one after.

    Attributes:
        hits: float64[T, 3], 1 where that token is among the stored ids.
        mass: float64[T, 3], the stored probability of that token.
        positions: int64[S], how many of the T each sequence of the sample has, in order.
        entropy: mean entropy of the stored targets, nats.
        uniform_share: share of positions with several ids of almost equal probability.
        same_top_share: share of positions whose likeliest id is the sample's commonest.
    """

    hits: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]
    entropy: float
    uniform_share: float
    same_top_share: float

    @property
    def num_positions(self) -> int:
        """T, the number of positions with targets, a next token, and neighbours that have one."""
        return len(self.hits)

    def __str__(self) -> str:
        if not self.num_positions:
            return "no position of the sample has a target and neighbours to compare with"
        rate, mass = self.hits.mean(0), self.mass.mean(0)
        return (
            f"next token among the stored ids at {rate[0]:.1%} of {self.num_positions:,} positions "
            f"(one place off: {rate[1]:.1%}, {rate[2]:.1%}), with mean probability {mass[0]:.4f} "
            f"(one place off: {mass[1]:.4f}, {mass[2]:.4f}); entropy {self.entropy:.2f} nats, "
            f"{self.uniform_share:.0%} of positions look uniform, "
            f"{self.same_top_share:.0%} share one likeliest id"
        )


def measure_canary(
    plan: SequenceSource,
    cache: TargetSource,
    *,
    num_sequences: int,
    kept: KeptShare | None = None,
) -> Canary:
    """Read from sequences spread evenly over the first `num_sequences`.

    They are 64, or as many more as short ones take to make 16,000 positions. Of sequences too long for 131,072
    positions in all a part each is read, from the start of the first one to the end of the last. All that is
    read is added to `kept`.
    """
    wanted = min(num_sequences, max(MOST_SEQUENCES, 2 * DECISIVE_POSITIONS // plan.seq_len))
    size = min(plan.seq_len, MOST_POSITIONS // wanted)
    columns: list[TargetColumns] = []
    for place, sequence in enumerate((np.arange(wanted) * num_sequences // wanted).tolist()):
        tokens, labels = (array[0] for array in plan.read(np.array([sequence])))
        start = place * (plan.seq_len - size) // max(1, wanted - 1)
        targets = cache.read(sequence, tokens, start, start + size)
        columns.append(target_columns(targets, labels[start : start + size]))
        if kept is not None:
            kept.add(targets)
    positions = np.array([len(column.hits) for column in columns])
    _, hits, mass, entropy, uniform, top = map(np.concatenate, zip(*columns, strict=True))
    _, counts = np.unique(top, return_counts=True)
    return Canary(
        hits=hits,
        mass=mass,
        positions=positions,
        entropy=float(entropy.mean()) if len(top) else 0.0,
        uniform_share=float(uniform.mean()) if len(top) else 0.0,
        same_top_share=float(counts.max() / len(top)) if len(top) else 0.0,
    )


def check_canary(canary: Canary, *, where: object, captured_rate: float | None) -> str | None:
    """Judge a sample; raise, or return what it could not decide.

    The stored probability of the true next token must exceed that of the neighbours' next tokens by 4 standard
    errors. It is the probability and not the hit rate that decides because with k near the vocabulary, or many draws
    of a small one, every token is among the ids; with one id per position (k = 1, N = 1) the two say the same.
    Targets that do not depend on the text (constant, or uniform) give the three tokens equal probability on average,
    shifted ones give a neighbour more, and a language model of a few dozen steps is 14 standard errors clear on
    2,500 positions. Both sides of a difference come from the same position; its standard error is that of the means of
    32 stretches of the sample, since neighbouring positions are not independent. Below 8,000 positions a weak teacher
    cannot be told from a useless one by that: there, at 1,000 positions or more, it is an error if the lead is 4
    standard errors below half of a neighbour's probability, and else a doubt.

    The hit rate must also not lie below the one counted at capture by more than 5 points and 5 standard errors. Texts
    differ in how well a teacher knows them, so that standard error is one over sequences, and with fewer than 32 of
    them nothing is compared.

    Args:
        canary: the sample.
        where: the cache.
        captured_rate: `canary_hit_rate` of its manifest, None if it was not counted.

    Raises:
        CacheMismatch: the targets are shifted against the text, or hit it less often than at capture.
        TeacherError: the targets do not depend on the text.
    """
    if canary.num_positions < 2 * NUM_GROUPS:
        return f"too few positions to tell whether targets and text fit: {canary.num_positions}"
    leads = [_lead(canary.mass, other) for other in (_EARLIER, _LATER)]
    if min(leads) < -CLEARLY:
        place = "before" if leads[0] < leads[1] else "after"
        raise CacheMismatch(
            f"the targets fit the text one position {place} theirs: they are shifted",
            where=where,
            found=canary,
            expected="the next token likelier than its neighbours",
            remedy="capture the cache anew with this version",
        )
    if captured_rate is not None and np.count_nonzero(canary.positions) >= FEWEST_SEQUENCES:
        rate, error = _rate_over_sequences(canary)
        if rate < captured_rate - max(RATE_TOLERANCE, 5 * error):
            raise CacheMismatch(
                "the targets hit the text less often than when they were captured",
                where=where,
                found=canary,
                expected=f"a hit rate near {captured_rate:.1%} (manifest.json)",
                remedy="run `distill-pretrain verify`; if it finds nothing, capture the cache anew; "
                "to train from this cache all the same set data.canary=warn",
            )
    if min(leads) >= CLEARLY:
        return None
    is_useless = any(_has_no_lead(canary.mass, other) for other in (_EARLIER, _LATER))
    if canary.num_positions < (FEWEST_POSITIONS if is_useless else DECISIVE_POSITIONS):
        return "too few positions to tell a weak teacher from one that ignores the text"
    raise TeacherError(
        "the targets do not depend on the text: the next token is no likelier than its neighbours",
        where=where,
        found=canary,
        expected="a teacher that predicts the text (trained, and loaded with its own weights and tokenizer)",
        remedy="evaluate the teacher, then capture anew; to train from this cache all the same set data.canary=warn",
    )


def run_canary(
    plan: SequenceSource,
    cache: TargetSource,
    *,
    num_sequences: int,
    where: object,
    captured_rate: float | None,
    captured_sequences: int,
    refuse: bool,
    kept: KeptShare | None = None,
) -> None:
    """Measure and judge a cache, and log one line with the figures.

    Args:
        plan: the sequences.
        cache: their targets.
        num_sequences: of the plan, that training uses.
        where: the cache, for messages.
        captured_rate: `canary_hit_rate` of its manifest, None if it was not counted; not compared where training
            uses less than half of the capture.
        captured_sequences: that the rate is of.
        refuse: raise what `check_canary` raises; otherwise log it as a warning.
        kept: gets what is read.
    """
    canary = measure_canary(plan, cache, num_sequences=num_sequences, kept=kept)
    if num_sequences < COMPARED_SHARE * captured_sequences:
        captured_rate = None
    try:
        doubt = check_canary(canary, where=where, captured_rate=captured_rate)
    except DistillPretrainError as error:
        if refuse:
            raise
        _log.warning(str(error), extra=ANY_RANK)
        return
    _log.info(f"canary of {where}: {canary}" + (f"; {doubt}" if doubt else ""), extra=ANY_RANK)


class TargetColumns(NamedTuple):
    """What the targets of a sequence say of its text, at the n usable of its T positions.

    Usable are those with targets, a next token, and neighbours that have one.

    Attributes:
        usable: bool[T].
        hits, mass: float64[n, 3], see `Canary`.
        entropy: float64[n], of the stored targets, nats.
        uniform: float64[n], 1 where several ids are almost equally probable.
        likeliest: float64[n], the likeliest id.
    """

    usable: npt.NDArray[np.bool_]
    hits: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.float64]
    likeliest: npt.NDArray[np.float64]


def target_columns(targets: RaggedTargets, labels: npt.NDArray[np.int32]) -> TargetColumns:
    """Compare the targets of a sequence with its labels int32[T]."""
    lengths = targets.entries_per_token
    rows = np.repeat(np.arange(len(lengths)), lengths)
    probs = targets.probs().astype(np.float64)
    known = labels != IGNORED_LABEL
    usable = (lengths > 0) & known & np.roll(known, 1) & np.roll(known, -1)
    usable[[0, -1]] = False

    def of_label(
        label: npt.NDArray[np.int32], weight: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        found = targets.ids == label[rows]
        sums = np.bincount(rows[found], weight[found], minlength=len(lengths))
        # Without any entry bincount forgets the weights' dtype.
        wanted: npt.NDArray[np.float64] = sums[usable].astype(np.float64)
        return wanted

    compared = [labels, np.roll(labels, 1), np.roll(labels, -1)]
    hits = np.stack([of_label(label, np.ones_like(probs)) for label in compared], 1)
    mass = np.stack([of_label(label, probs) for label in compared], 1)
    entropy = np.bincount(rows, -probs * np.log(np.maximum(probs, 1e-30)), minlength=len(lengths))
    by_prob = np.lexsort((targets.ids, probs, rows))
    ends = np.cumsum(lengths)[usable]
    last, first = by_prob[ends - 1], by_prob[ends - lengths[usable]]
    uniform = (lengths[usable] > 1) & (probs[last] <= 1.5 * probs[first])
    return TargetColumns(
        usable=usable,
        hits=hits,
        mass=mass,
        entropy=entropy[usable],
        uniform=uniform.astype(np.float64),
        likeliest=targets.ids[last].astype(np.float64),
    )


def _lead(mass: npt.NDArray[np.float64], other: int) -> float:
    """Return by how many standard errors the aligned column exceeds another."""
    mean, error = _mean_and_error(mass[:, _ALIGNED] - mass[:, other])
    if error == 0:
        return float(np.sign(mean)) * np.inf if mean else 0.0
    return mean / error


def _has_no_lead(mass: npt.NDArray[np.float64], other: int) -> bool:
    """Whether the aligned column clearly exceeds another by less than half of it."""
    mean, error = _mean_and_error(mass[:, _ALIGNED] - mass[:, other])
    return mean + CLEARLY * error < float(mass[:, other].mean()) / 2


def _rate_over_sequences(canary: Canary) -> tuple[float, float]:
    """The hit rate and its standard error; sequences, of different sizes, are what is independent."""
    sizes = canary.positions[canary.positions > 0]
    hits = np.add.reduceat(canary.hits[:, _ALIGNED], np.cumsum(sizes) - sizes)
    rate = hits.sum() / sizes.sum()
    deviations = hits - rate * sizes
    error = np.sqrt(len(sizes) / (len(sizes) - 1) * (deviations**2).sum()) / sizes.sum()
    return float(rate), float(error)


def _mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    groups = np.array([group.mean() for group in np.array_split(values, NUM_GROUPS)])
    return float(values.mean()), float(groups.std(ddof=1) / np.sqrt(NUM_GROUPS))
