"""Teacher logits of a micro-batch as sparse targets.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import IGNORED_LABEL, LogitsEngine, RaggedTargets
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import TeacherError
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.sampling import BadLogits, Sampler, sample_sets


@dataclass(frozen=True)
class ScoredBatch:
    """What the teacher says of some consecutive sequences.

    Attributes:
        first: number of the first sequence.
        tokens: int32[B, L].
        labels: int32[B, L].
        logits: fp32[B, L, V].
    """

    first: int
    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]

    @property
    def stop(self) -> int:
        """One after the last sequence."""
        return self.first + len(self.tokens)

    def sample(
        self, plans: Sequence[CachePlan], sequence: int, offset: int, length: int
    ) -> tuple[list[RaggedTargets], npt.NDArray[np.int32]]:
        """Targets of `length` positions of a sequence for each of some plans, and the positions' tokens.

        Raises:
            TeacherError: NaN or infinite logits, naming the sequence.
        """
        row, span = sequence - self.first, slice(offset, offset + length)
        first_position = sequence * plans[0].seq_len + offset
        positions = np.arange(length, dtype=np.uint64) + np.uint64(first_position)
        try:
            targets = sample_sets(
                self.logits[row, span],
                positions,
                [sampler_of(plan) for plan in plans],
                valid=self.labels[row, span] != IGNORED_LABEL,
            )
        except BadLogits as error:
            raise TeacherError(
                "the teacher's logits are not finite",
                where=f"sequence {sequence}, {error}",
                remedy="check the teacher's weights and dtype; finished shards are kept",
            ) from None
        return targets, self.tokens[row, span]


def sampler_of(plan: CachePlan) -> Sampler:
    """The sampler that a plan describes."""
    return Sampler(
        name=plan.sampler["name"],
        num_draws=plan.num_draws,
        seed=plan.sampler["seed"],
        top_p=plan.sampler.get("top_p"),
    )


def score(engine: LogitsEngine, sequences: SequenceData, first: int, count: int) -> ScoredBatch:
    """Run the teacher over `count` sequences from `first`.

    Raises:
        TeacherError: the logits have other columns than the corpus's vocabulary, such as padding ones.
    """
    tokens, labels = sequences.plan.read(np.arange(first, first + count))
    logits = engine.logits(torch.from_numpy(tokens.astype(np.int64)).to(engine.device))
    expected = (*tokens.shape, sequences.vocab_size)
    if tuple(logits.shape) != expected:
        raise TeacherError(
            "the teacher's logits do not have one column per token of the vocabulary",
            where=f"sequences {first} to {first + count - 1}",
            found=f"shape {tuple(logits.shape)}",
            expected=f"{expected}: sequences, positions, vocabulary",
            remedy="use a teacher of the corpus's tokenizer, and cut padding columns off in its engine",
        )
    return ScoredBatch(first, tokens, labels, logits.cpu().numpy())
