"""The same samplers where the columns of the logits are split over ranks.

Legend: T positions, V_own columns of this rank, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import TeacherError
from distill_pretrain.sampling.columns import Columns
from distill_pretrain.sampling.figures import DistributionFigures
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.sampling.philox import Uint64Array
from distill_pretrain.sampling.samplers import Sampler, sample_split

# Two collectives per so many rows; their int64 weights take 16 MB at 65,536 columns.
_ROWS_AT_ONCE = 32


def sample_sets_parallel(
    logits: torch.Tensor,
    first_id: int,
    positions: Uint64Array,
    samplers: Sequence[Sampler],
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    valid: npt.NDArray[np.bool_] | None = None,
    figures: DistributionFigures | None = None,
    read: Callable[[torch.Tensor], Columns] = host_columns,
) -> list[RaggedTargets]:
    """Sample the targets that `sample_sets` gives of the whole rows, bit for bit, on every rank of the group.

    Every rank of the group calls it, with the same arguments but its own columns.

    Args:
        logits: float32, bf16 or fp16 [T, V_own], on the device that the group communicates from; V_own may be 0.
        first_id: token id of column 0; a rank's ids follow those of the rank before it.
        positions: see `sample_sets`, as the arguments below.
        samplers: one or more.
        group: the ranks that have the other columns.
        vocab_size: V, columns of all ranks together.
        valid: bool[T].
        figures: told of some of the rows, the same on every rank.
        read: where the columns are looked at, the same on every rank.

    Raises:
        BadLogits: see `sample_sets`; on every rank.
        TeacherError: the ranks' columns together are not the vocabulary; on every rank.
    """
    assert logits.ndim == 2 and logits.is_floating_point(), (logits.shape, logits.dtype)
    split = _SplitVocabulary(first_id, group, logits.device)
    split.require_vocabulary(logits.shape[1], vocab_size)
    return sample_split(read(logits), positions, samplers, split, valid=valid, figures=figures)


class _SplitVocabulary:
    """See `samplers.Split`."""

    def __init__(self, first_id: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.first_id = first_id
        self._group = group
        self._device = device
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)

    def require_vocabulary(self, columns: int, vocab_size: int) -> None:
        """Refuse columns that do not make up the vocabulary, in order.

        Raises:
            TeacherError: on every rank.
        """
        shards = self._all_gather(np.array([[self.first_id, columns]]))[:, 0]
        held = shards[shards[:, 1] > 0]
        ends = held.sum(axis=1)
        starts = np.concatenate(([0], ends[:-1]))
        if not np.array_equal(held[:, 0], starts) or ends[-1:].tolist() != [vocab_size]:
            raise TeacherError(
                "the teacher's logits do not have one column per token of the vocabulary",
                found=f"ids {', '.join(f'{a} to {a + n - 1}' for a, n in held.tolist())} on the ranks",
                expected=f"0 to {vocab_size - 1}, in order",
                remedy="use a teacher of the corpus's tokenizer, and cut padding columns off in its engine",
            )

    def rows_at_once(self, columns: int) -> int:
        """Return how many rows the ranks communicate about at once; it must not depend on their columns."""
        return _ROWS_AT_ONCE

    def maxima(self, own: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the largest of the ranks' values of each row, float32[T]."""
        found = torch.tensor(own, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        maxima: npt.NDArray[np.float32] = found.cpu().numpy()
        return maxima

    def totals(
        self, own: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sums over the ranks before this one, and over all, int64[T] each."""
        everyone = self._all_gather(np.ascontiguousarray(own))
        return everyone[: self._rank].sum(axis=0), everyone.sum(axis=0)

    def gathered(self, own: list[npt.NDArray[Any]]) -> list[list[npt.NDArray[Any]]]:
        """Return every rank's arrays; they travel in one message."""
        sizes = self._all_gather(np.array([len(array) for array in own]))
        packed = np.frombuffer(b"".join(array.tobytes() for array in own), np.uint8)
        widths = np.array([array.itemsize for array in own])
        message = np.zeros(int((sizes * widths).sum(axis=1).max(initial=0)), np.uint8)
        message[: len(packed)] = packed
        return [
            _unpacked(data.tobytes(), of_rank, [array.dtype for array in own])
            for data, of_rank in zip(self._all_gather(message), sizes, strict=True)
        ]

    def _all_gather(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[R, ...]."""
        sent = torch.from_numpy(own).to(self._device)
        received = [torch.empty_like(sent) for _ in range(self._size)]
        dist.all_gather(received, sent, group=self._group)
        everyone: npt.NDArray[Any] = torch.stack(received).cpu().numpy()
        return everyone


def _unpacked(
    data: bytes, sizes: npt.NDArray[np.int64], dtypes: list[np.dtype[Any]]
) -> list[npt.NDArray[Any]]:
    arrays, offset = [], 0
    for size, dtype in zip(sizes.tolist(), dtypes, strict=True):
        arrays.append(np.frombuffer(data, dtype, size, offset))
        offset += size * dtype.itemsize
    return arrays
