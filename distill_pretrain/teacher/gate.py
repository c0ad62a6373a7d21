"""Is the teacher sane? Judged from the targets while they are captured, before garbage fills a cache.

A frozen or wrongly loaded teacher gives finite logits, and so a cache that every checksum finds sound. Four figures
tell, each a mean over a window of recent positions:

- mass: the stored probability of the true next token, and of the tokens one place before and after it;
- confidence: sum_v p(v)^2, the mass that the teacher itself expects where its probabilities are right;
- lead: sum_v over rarer tokens of mean_t [p_t(v) 1(l_t = v)] - mean_t p_t(v) * mean_t 1(l_t = v), where l_t is the next
  token. It is a covariance: zero for a teacher that says the same everywhere, whatever it says, and for one whose words
  have nothing to do with the text. For a teacher whose probabilities are right it is sum_v Var_t p_t(v), so never
  negative. Tokens that make up much of the text are left out: in long runs of one token nothing else can be predicted;
- chance: the second term alone, the scale of the lead.

Standard errors are those of the means of stretches of the text, since neighbouring positions are not independent.

Shapes: B sequences, L positions, n positions of a stretch.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.canary import target_columns
from distill_pretrain.errors import TeacherError
from distill_pretrain.processes.logs import ANY_RANK
from distill_pretrain.teacher.scoring import SampledBatch

_log = logging.getLogger(__name__)

STRETCH_POSITIONS = 1024
FEWEST_STRETCHES = 8
FEWEST_SEQUENCES = 64
ENOUGH_POSITIONS = 1 << 18
"""Fewer sequences will do when they are this long."""
MOST_SEQUENCES = 512
"""Of the window: a teacher that fails later is found so many sequences after it failed."""
FEWEST_RARE = 2000
COMMON_SHARE = 0.05
LEAST_LEAD = 0.05
LEAST_MASS = 0.1
SHIFTED_MASS = 0.5
UNIFORM_ENTROPY = 0.97
UNIFORM_MASS = 3.0
CLEARLY = 4.0

Mode = Literal["refuse", "warn", "off"]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """What a batch says of the teacher.

    Attributes:
        positions: with a target, a next token, and neighbours that have one.
        hits: of those, positions whose next token is among the stored ids.
        entropy: mean of the teacher in nats; of the stored targets where the teacher's is unknown.
    """

    positions: int
    hits: float
    entropy: float


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Means over consecutive positions of sequences `first` to `last`."""

    first: int
    last: int
    positions: int
    rare: int
    mass: float
    earlier: float
    later: float
    confidence: float
    lead: float
    chance: float
    entropy: float


class SanityGate:
    """Looks at every batch of one process; stops, or warns of, a teacher that cannot be sound.

    Nothing is judged before 64 sequences and 8 stretches of 1024 positions; then the last 512 sequences are.

    Args:
        vocab_size: V.
        mode: "refuse" raises, "warn" says each kind of fault once, "off" only measures.
    """

    def __init__(self, *, vocab_size: int, mode: Mode) -> None:
        self._vocab_size = vocab_size
        self._mode = mode
        self._said: set[str] = set()
        self._open: list[_Sequence] = []
        self._window: deque[_Stretch] = deque()

    def look(self, batch: SampledBatch, index: int, labels: npt.NDArray[np.int32]) -> BatchFigures:
        """Take a batch into account.

        Args:
            batch: the targets.
            index: which of its plans to look at.
            labels: int32[B, L], next tokens.

        Raises:
            TeacherError: the teacher is at fault (mode "refuse").
        """
        seen = [
            _Sequence.of(
                number, batch.targets(index, number, 0, labels.shape[1]), label, batch.entropy
            )
            for number, label in enumerate(labels, batch.first)
        ]
        if self._mode != "off":
            for sequence in seen:
                self._add(sequence)
        positions = sum(len(sequence.labels) for sequence in seen)
        stored = sum(float(sequence.entropies.sum()) for sequence in seen) / max(1, positions)
        return BatchFigures(
            positions=positions,
            hits=sum(float(sequence.hits.sum()) for sequence in seen),
            entropy=stored if math.isnan(batch.entropy) else batch.entropy,
        )

    def _add(self, sequence: _Sequence) -> None:
        self._open.append(sequence)
        if sum(len(one.labels) for one in self._open) < STRETCH_POSITIONS:
            return
        self._window.append(_stretch_of(self._open))
        self._open = []
        window = self._window
        while (
            len(window) > FEWEST_STRETCHES
            and sum(s.last - s.first + 1 for s in window) > MOST_SEQUENCES
        ):
            window.popleft()
        self._judge()

    def _judge(self) -> None:
        window = self._window
        positions = sum(s.positions for s in window)
        sequences = sum(s.last - s.first + 1 for s in window)
        if len(window) < FEWEST_STRETCHES or (
            sequences < FEWEST_SEQUENCES and positions < ENOUGH_POSITIONS
        ):
            return
        fault = _fault_of(list(window), self._vocab_size)
        if fault is None or fault.what in self._said:
            return
        if self._mode == "refuse":
            raise fault
        self._said.add(fault.what)
        _log.warning(str(fault), extra=ANY_RANK)


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """The usable positions of one sequence: n of them, with E entries.

    `ids`, `probs` and `rows` are those of the entries; `rows` counts usable positions.
    """

    number: int
    labels: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    probs: Float64Array
    hits: Float64Array
    mass: Float64Array
    entropies: Float64Array
    confidence: float
    entropy: float

    @classmethod
    def of(
        cls, number: int, targets: RaggedTargets, labels: npt.NDArray[np.int32], entropy: float
    ) -> _Sequence:
        columns = target_columns(targets, labels)
        lengths = targets.entries_per_token
        kept = np.repeat(columns.usable, lengths)
        return cls(
            number=number,
            labels=labels[columns.usable],
            ids=targets.ids[kept],
            probs=targets.probs().astype(np.float64)[kept],
            hits=columns.hits[:, 0],
            mass=columns.mass,
            entropies=columns.entropy,
            confidence=_confidence(targets, kept),
            entropy=entropy,
        )


def _confidence(targets: RaggedTargets, kept: npt.NDArray[np.bool_]) -> float:
    """Sum over positions of an estimate of sum_v p(v)^2; nan where one draw per position says nothing of it."""
    values = targets.values[kept].astype(np.float64)
    if targets.kind == "logprobs":
        return float(np.exp(2 * values).sum())
    if targets.num_draws == 1:
        return math.nan
    # Pairs of draws that agree; a draw agrees with itself whatever the distribution.
    return float((values * (values - 1)).sum()) / (targets.num_draws * (targets.num_draws - 1))


def _stretch_of(parts: list[_Sequence]) -> _Stretch:
    labels = np.concatenate([part.labels for part in parts])
    mass = np.concatenate([part.mass for part in parts])
    ids = np.concatenate([part.ids for part in parts])
    probs = np.concatenate([part.probs for part in parts])
    n = len(labels)
    known, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rare = counts <= COMMON_SHARE * n
    found = np.searchsorted(known, ids).clip(max=len(known) - 1)
    among = known[found] == ids
    expected = np.bincount(found[among], probs[among], minlength=len(known)) / n
    chance = float((expected * counts / n)[rare].sum())
    of_rare = rare[place]
    return _Stretch(
        first=parts[0].number,
        last=parts[-1].number,
        positions=n,
        rare=int(of_rare.sum()),
        mass=float(mass[:, 0].mean()),
        earlier=float(mass[:, 1].mean()),
        later=float(mass[:, 2].mean()),
        confidence=sum(part.confidence for part in parts) / n,
        lead=float(mass[of_rare, 0].sum()) / n - chance,
        chance=chance,
        entropy=sum(part.entropy * len(part.labels) for part in parts) / n,
    )


def _fault_of(window: list[_Stretch], vocab_size: int) -> TeacherError | None:
    """What is wrong with the teacher, or None where nothing clearly is."""

    def mean(name: str) -> tuple[float, float]:
        """Mean of a figure, and `CLEARLY` standard errors of it."""
        values = np.array([getattr(stretch, name) for stretch in window])
        return float(values.mean()), CLEARLY * float(values.std(ddof=1)) / math.sqrt(len(values))

    mass, mass_error = mean("mass")
    confidence, _ = mean("confidence")
    entropy, _ = mean("entropy")
    lead, lead_error = mean("lead")
    chance, _ = mean("chance")
    neighbours = {"before": mean("earlier"), "after": mean("later")}
    found = (
        f"mean probability of the next token {mass:.4g} (of its neighbours {neighbours['before'][0]:.4g}, "
        f"{neighbours['after'][0]:.4g}), expected by the teacher itself {confidence:.4g}, "
        f"gained by looking at the text {lead:.2g}"
        + (
            ""
            if math.isnan(entropy)
            else f"; entropy {entropy:.2f} of at most {math.log(vocab_size):.2f} nats"
        )
    )

    def fault(what: str, expected: str, remedy: str) -> TeacherError:
        return TeacherError(
            what,
            where=f"sequences {window[0].first} to {window[-1].last}",
            found=found,
            expected=expected,
            remedy=f"{remedy}; shards finished so far are kept, but those of these sequences are suspect; "
            "to go on all the same set capture.sanity_gate=warn",
        )

    weights = "check that teacher.path holds trained weights and that all of them were loaded"
    if entropy > UNIFORM_ENTROPY * math.log(vocab_size) and (
        mass + mass_error < UNIFORM_MASS / vocab_size
    ):
        return fault(
            "the teacher's distribution is uniform: it has not learned anything",
            f"an entropy clearly below log V = {math.log(vocab_size):.2f} nats",
            weights,
        )
    if mass + mass_error < SHIFTED_MASS * confidence:
        for place, (other, error) in neighbours.items():
            if other - error > max(2 * (mass + mass_error), SHIFTED_MASS * confidence):
                return fault(
                    f"the teacher predicts the token {place} the next one: its logits are shifted",
                    "the next token likelier than its neighbours",
                    "row t of the engine's logits must be the prediction after token t",
                )
    if sum(stretch.rare for stretch in window) >= FEWEST_RARE and (
        lead + lead_error < LEAST_LEAD * chance
    ):
        return fault(
            "the teacher's predictions do not depend on the text: it is frozen, or reads something else",
            f"a gain clearly above {LEAST_LEAD * chance:.2g}",
            weights,
        )
    if mass + mass_error < LEAST_MASS * confidence:
        return fault(
            "the teacher is hardly ever right, and far less often than it believes",
            f"a mean probability of the next token near {confidence:.4g}",
            f"check that the corpus has the teacher's own tokenizer; {weights}",
        )
    if sum(stretch.rare for stretch in window) >= FEWEST_RARE and (
        mass + mass_error < UNIFORM_MASS / vocab_size and lead <= lead_error
    ):
        # Random weights: confident to a degree, of other tokens in every place, and right as often as a die.
        return fault(
            "the teacher is no better than chance: its weights are random, or its ids are not the corpus's",
            f"a mean probability of the next token far above 1 / V = {1 / vocab_size:.2g}",
            f"check that the corpus has the teacher's own tokenizer; {weights}",
        )
    return None
