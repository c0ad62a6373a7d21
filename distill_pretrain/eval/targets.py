"""Caches as the other side of a comparison: read by micro-batch.

Shapes: B sequences of a micro-batch, L positions, K the most entries of a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.data.batches import TargetSource, pad_targets
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.eval.gradients import GradientBatch


def read_targets(
    cache: TargetSource, sequences: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]
) -> SparseTargets:
    """Read the targets [B, L, K] of whole sequences, if their tokens int32[B, L] are those the teacher saw."""
    parts = [
        cache.read(number, row) for number, row in zip(sequences.tolist(), tokens, strict=True)
    ]
    ids, probs = map(torch.from_numpy, pad_targets(parts, rows=len(sequences)))
    return SparseTargets(ids=ids.long(), probs=probs)


def gradient_batches(
    data: SequenceData,
    caches: Mapping[str, TargetSource],
    *,
    num_batches: int,
    micro_batch_size: int,
) -> Iterator[GradientBatch]:
    """Yield the first micro-batches of a corpus, in the order of its plan, with the targets of every cache."""
    for start in range(0, num_batches * micro_batch_size, micro_batch_size):
        numbers = np.arange(start, start + micro_batch_size, dtype=np.int64)
        tokens, labels = data.plan.read(numbers)
        yield GradientBatch(
            tokens=torch.from_numpy(tokens).long(),
            labels=torch.from_numpy(labels).long(),
            targets={name: read_targets(cache, numbers, tokens) for name, cache in caches.items()},
        )
