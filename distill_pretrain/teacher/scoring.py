"""Teacher logits of a micro-batch as sparse targets.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import IGNORED_LABEL, LogitsEngine, RaggedTargets
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import TeacherError
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.sampling import BadLogits, sample_targets


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
        self, plan: CachePlan, sequence: int, offset: int, length: int
    ) -> tuple[RaggedTargets, npt.NDArray[np.int32]]:
        """Targets of `length` positions of a sequence, and their tokens.

        Raises:
            TeacherError: NaN or infinite logits, naming the sequence.
        """
        row, span = sequence - self.first, slice(offset, offset + length)
        positions = np.arange(length, dtype=np.uint64) + np.uint64(sequence * plan.seq_len + offset)
        try:
            targets = sample_targets(
                self.logits[row, span],
                positions,
                sampler=plan.sampler["name"],
                num_draws=plan.num_draws,
                seed=plan.sampler["seed"],
                valid=self.labels[row, span] != IGNORED_LABEL,
            )
        except BadLogits as error:
            raise TeacherError(
                "the teacher's logits are not finite",
                where=f"sequence {sequence}, {error}",
                remedy="check the teacher's weights and dtype; finished shards are kept",
            ) from None
        return targets, self.tokens[row, span]


def score(engine: LogitsEngine, sequences: SequenceData, first: int, count: int) -> ScoredBatch:
    """Run the teacher over `count` sequences from `first`."""
    tokens, labels = sequences.plan.read(np.arange(first, first + count))
    logits = engine.logits(torch.from_numpy(tokens.astype(np.int64)).to(engine.device))
    return ScoredBatch(first, tokens, labels, logits.cpu().numpy())
