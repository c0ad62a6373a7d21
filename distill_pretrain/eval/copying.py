"""Copying from context: the loss on random tokens when they come a second time, beside the loss when they came first.

A model that looks up what followed a token before (an induction head, Olsson et al. 2022, arXiv 2209.11895) predicts
the repetition; one that knows frequencies alone predicts both copies alike. Distillation is reported to hurt this
(arXiv 2509.01649).

Shapes: S sequences, n ids that are repeated, B sequences of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.errors import ConfigError
from distill_pretrain.eval.config import CopyingConfig
from distill_pretrain.eval.heldout import HeldOutPlan
from distill_pretrain.eval.subject import Subject

_VERSION = 1
"""Of the draw and the figures, for what an earlier run left."""

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class CopiesPlan:
    """Random ids as sequences to score; a `heldout.HeldOutPlan`.

    Both kinds have the same n - 1 labels per sequence, so that their losses can be compared: the first id has none,
    since nothing tells where the repetition begins.

    Attributes:
        drawn: int32[S, n].
        repeated: whether the ids come twice, and only the second time has labels.
    """

    drawn: npt.NDArray[np.int32]
    repeated: bool

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.drawn)

    def read(
        self, sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Read tokens and labels, int32[B, n], or [B, 2n] where the ids come twice."""
        once = self.drawn[sequences]
        none = np.full_like(once, IGNORED_LABEL)
        labels = np.concatenate((once[:, 1:], none[:, :1]), axis=1)
        if not self.repeated:
            return once, labels
        return np.concatenate((once, once), axis=1), np.concatenate((none, labels), axis=1)


def id_counts(plan: HeldOutPlan, num_sequences: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """Count every id among the labels of the first sequences of a plan, int64[V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, num_sequences, _ROWS_AT_ONCE):
        numbers = np.arange(start, min(start + _ROWS_AT_ONCE, num_sequences), dtype=np.int64)
        labels = plan.read(numbers)[1]
        counts += np.bincount(labels[labels >= 0], minlength=vocab_size)
    return counts


def draw_ids(
    counts: npt.NDArray[np.int64], *, num_sequences: int, length: int, seed: int
) -> npt.NDArray[np.int32]:
    """Draw ids in proportion to their counts, each at most once in a sequence: a copy is then never ambiguous.

    Ids as frequent as in text are those that a model has learnt; most ids of a vocabulary it has hardly seen.

    Args:
        counts: int64[V].
        num_sequences: S.
        length: n.
        seed: of the draw; sequence s depends on (seed, s) alone.

    Returns:
        int32[S, n].

    Raises:
        ConfigError: fewer than n ids have a count.
    """
    known = np.flatnonzero(counts)
    if len(known) < length:
        raise ConfigError(
            "the held-out text has too few different ids to copy",
            where="eval.copying.length",
            found=f"{len(known)} ids",
            expected=f"at least {length}",
            remedy="set eval.copying.length to less",
        )
    shares = counts[known] / counts.sum()
    rows = [
        np.random.default_rng((seed, number)).choice(known, length, replace=False, p=shares)
        for number in range(num_sequences)
    ]
    return np.stack(rows).astype(np.int32)


def copying_figures(
    subject: Subject,
    config: CopyingConfig,
    earlier: Mapping[str, Any] | None,
    *,
    end_of_document: int | None,
    micro_batch_size: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Score every model on both copies, unless that was done before with the same inputs.

    Each process of the job calls this, and scores its share of the sequences.

    Args:
        subject: the models, and the held-out text whose ids are drawn.
        config: the section eval.copying.
        earlier: what this function returned in an earlier run; None if there was none.
        end_of_document: an id that is not drawn; None where it is unknown.
        micro_batch_size: sequences of one forward pass.
        progress: called with the number of sequences that this process has just scored, of each copy.

    Returns:
        {"inputs": all that decides the figures, "models": name -> {"first", "repeated": cross-entropies in nats per
        token, "repeated_standard_error": with sequences as independent units, None for one, "accuracy": share of the
        repeated tokens that are the likeliest, "kl": of teacher and model on the repeated tokens, None without a
        teacher}}.

    Raises:
        ConfigError: the sequences are too short, or the text has too few ids.
        DistillPretrainError: see `heldout.evaluate`.
    """
    longest = subject.held_out.plan.seq_len // 2
    length = config.length or longest
    if not 2 <= length <= longest:
        raise ConfigError(
            "ids that come twice do not fit into a sequence",
            where="eval.copying.length",
            found=f"{length} of data.seq_len {subject.held_out.plan.seq_len}",
            expected=f"2 to {longest}",
            remedy="lower it, or leave it out",
        )
    inputs = {
        "version": _VERSION,
        "text": subject.inputs(),
        "num_sequences": config.num_sequences,
        "length": length,
        "seed": config.seed,
    }
    if earlier and earlier["inputs"] == inputs:
        return dict(earlier)
    counts = id_counts(subject.held_out.plan, subject.num_sequences, subject.held_out.vocab_size)
    if end_of_document is not None:
        counts[end_of_document] = 0
    drawn = draw_ids(counts, num_sequences=config.num_sequences, length=length, seed=config.seed)
    first, again = (
        subject.scores_on(
            CopiesPlan(drawn, repeated), micro_batch_size=micro_batch_size, progress=progress
        )
        for repeated in (False, True)
    )
    return {
        "inputs": inputs,
        "models": {
            name: {
                "first": first[name].ce,
                "repeated": score.ce,
                "repeated_standard_error": score.ce_standard_error,
                "accuracy": score.top1_accuracy,
                "kl": score.kl,
            }
            for name, score in again.items()
        },
    }
