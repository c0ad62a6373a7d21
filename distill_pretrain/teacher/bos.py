"""Does the teacher expect a BOS token that the corpus does not have? Measured before a capture.

Many teachers were only ever trained on texts that begin with one, and say much less without it; every checksum of a
cache made so is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.corpus.sequence_plan import SequencePlan, pieces_of
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.teacher.gate import SanityGate
from distill_pretrain.teacher.replica_group import ReplicaGroup

SEQUENCES = 8
DOCUMENTS = 64
"""So many are looked at for the token."""


def missing_bos(model: Path, index: TokenIndex) -> int | None:
    """Return the BOS token that a model's config.json names and that stands between no documents of a corpus.

    One that the model itself does not know counts for none.

    Args:
        model: folder of the teacher.
        index: the corpus.
    """
    try:
        raw = json.loads((model / "config.json").read_bytes())
        text = raw.get("text_config") or raw
        bos, known = text.get("bos_token_id", raw.get("bos_token_id")), text.get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    # A class's own default may lie beyond a smaller vocabulary, such as 50256 of GPT-2's.
    if not isinstance(bos, int) or (isinstance(known, int) and not 0 <= bos < known):
        return None
    for document in range(min(DOCUMENTS, index.num_documents)):
        last = index.document_length(document) - 1
        # Where one token ends every document, the next begins after it.
        if bos in (index.read(document, 0, 1)[0], index.read(document, last, 1)[0]):
            return None
    return bos


@dataclass(frozen=True, kw_only=True)
class BosFigures:
    """What a teacher says of some sequences, as they are and after a BOS token.

    Attributes:
        entropies: mean entropy in nats, without and with it.
        hit_rates: share of the next tokens that are among the sampled targets, likewise.
        num_sequences: how many.
    """

    entropies: tuple[float, float]
    hit_rates: tuple[float, float]
    num_sequences: int

    def warning(self, bos: int) -> str:
        """Write a line for the user."""
        (entropy, entropy_with), (hits, hits_with) = self.entropies, self.hit_rates
        return (
            f"the teacher's config.json names token {bos} as BOS, and no document of the corpus begins with "
            f"it. On {self.num_sequences} sequences its entropy is {entropy:.3f} nats without and {entropy_with:.3f} "
            f"with it in front; {hits:.1%} and {hits_with:.1%} of the next tokens are among the targets. If it says "
            "more with it, tokenize again with tokenizer.bos=always"
        )


def measure_bos(
    group_of: Callable[[SequenceData], ReplicaGroup],
    sequences: SequenceData,
    plan: CachePlan,
    bos: int,
) -> BosFigures | None:
    """Runs the teacher over the first sequences of a plan, without and with a BOS token in front of each.

    Every rank of the replica calls it.

    Args:
        group_of: the teacher, over some sequences.
        sequences: of the plan.
        plan: of the cache, or of one of them.
        bos: the token.

    Returns:
        The figures on the replica's leader; None on its other ranks.
    """
    with_bos = replace(sequences, plan=_BosFirst(sequences.plan, bos))
    groups = [group_of(sequences), group_of(with_bos)]
    found = [group.run(partial(_figures, group, plan)) for group in groups]
    if found[0] is None or found[1] is None:
        return None
    return BosFigures(
        entropies=(found[0][0], found[1][0]),
        hit_rates=(found[0][1], found[1][1]),
        num_sequences=min(SEQUENCES, plan.num_sequences),
    )


def _figures(group: ReplicaGroup, plan: CachePlan) -> tuple[float, float]:
    """Mean entropy and hit rate over the first sequences."""
    gate = SanityGate(vocab_size=plan.vocab_size, mode="off")
    wanted = min(SEQUENCES, plan.num_sequences)
    entropy = hits = positions = 0.0
    for first in range(0, wanted, plan.micro_batch_size):
        count = min(plan.micro_batch_size, wanted - first)
        batch = group.score(first, count, [plan])
        _, labels = group.sequences.plan.unmasked.read(np.arange(first, first + count))
        seen = gate.look(batch, 0, labels)
        entropy += seen.entropy * seen.positions
        hits += seen.hits
        positions += seen.positions
    return entropy / max(1, positions), hits / max(1, positions)


class _BosFirst(SequencePlan):
    """The sequences of a plan with a token in front, and what no longer fits left out.

    Where documents are separate every one of a sequence has the token in front: a teacher is shown each alone.
    """

    def __init__(self, plan: SequencePlan, bos: int) -> None:
        self.__dict__.update(vars(plan))
        self._bos = bos

    def read(self, sequences: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """See `SequencePlan`; the label of the token in front is the first of what is behind it."""
        tokens, _ = super().read(sequences)
        shifted, labels = np.zeros_like(tokens), np.full_like(tokens, IGNORED_LABEL)
        for row, (text, valid) in enumerate(zip(tokens, self.valid(sequences), strict=True)):
            text = text[valid]
            starts = np.zeros(1, np.int64)
            if self.document_end is not None:
                starts = pieces_of(text[None], self.document_end)[:, 1]
            whole = np.insert(text, starts, self._bos)
            following = np.append(whole[1:], IGNORED_LABEL)
            # The last of a document predicts no BOS.
            following[(starts + np.arange(len(starts)) - 1)[1:]] = IGNORED_LABEL
            size = min(len(whole), self.seq_len)
            shifted[row, :size], labels[row, :size] = whole[:size], following[:size]
        return shifted, labels
