"""Rules that every codec of targets shares, and the 16-bit code of a log-probability.

Legend: T positions of the block, E entries in all, V vocabulary. A "problem" is a sentence, or None where all is well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import TeacherError

LOGPROB_SCALE = 2048
_LARGEST_LOGPROB_CODE = 65535
# Rounding to 1/2048 moves a probability by at most 1/4096 of itself.
_LARGEST_ROW_MASS = 1.0 + 2.0**-11


def structure_problem(
    lengths: npt.NDArray[np.int32],
    ids: npt.NDArray[np.int32],
    *,
    max_entries_per_token: int,
    vocab_size: int,
) -> str | None:
    """Say what is wrong with row lengths int32[T] and ids int32[E], their order aside; None for nothing."""
    if len(lengths) and (lengths.min() < 0 or lengths.max() > max_entries_per_token):
        return f"{lengths.max()} entries at one position, at most {max_entries_per_token}"
    if int(lengths.sum(dtype=np.int64)) != len(ids):
        return f"{len(ids)} entries, but the positions count {lengths.sum(dtype=np.int64)}"
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        return f"token id {ids.max()} outside the vocabulary of {vocab_size}"
    return None


def order_problem(lengths: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> str | None:
    """Say that the ids of a position do not ascend strictly; None if they all do. The structure must be sound."""
    if len(ids) == 0:
        return None
    ascending = np.ones(len(ids) + 1, np.bool_)
    np.greater(ids[1:], ids[:-1], out=ascending[1:-1])
    ascending[np.cumsum(lengths)] = True
    return None if ascending.all() else "token ids of a position do not ascend"


def counts_problem(targets: RaggedTargets) -> str | None:
    """Say which rule counts break: each is from 1 to N, and a position's add up to N; None if they are sound."""
    values, num_draws = targets.values, targets.num_draws
    if len(values) and (values.min() < 1 or values.max() > num_draws):
        return f"a count of {values.max()}, expected 1 to {num_draws}"
    sums = _row_sums(targets, values)
    if np.any(sums != num_draws):
        return f"counts of a position add up to {sums[sums != num_draws][0]}"
    return None


def logprobs_problem(targets: RaggedTargets) -> str | None:
    """Say why log-probabilities are no distribution; None if they are one."""
    values = targets.values
    if not np.all(values <= 0):
        return "a log-probability is positive or NaN"
    masses = _row_sums(targets, np.exp(values.astype(np.float64)))
    if np.any(masses > _LARGEST_ROW_MASS):
        return f"probabilities of a position add up to {masses.max():.6f}"
    return None


def logprob_codes(targets: RaggedTargets) -> npt.NDArray[np.uint32]:
    """Return the codes that are stored, uint32[E]: q = min(65535, round(-2048 ln p)), ties to even.

    Raises:
        TeacherError: log-probabilities are positive, NaN, or add up to more than 1.
    """
    problem = logprobs_problem(targets)
    if problem is not None:
        raise TeacherError(
            "top-k log-probabilities are no distribution",
            found=problem,
            expected="values <= 0 whose probabilities add up to at most 1",
            remedy="check the teacher's weights and dtype",
        )
    scaled = np.rint(targets.values.astype(np.float64) * -LOGPROB_SCALE)
    return np.minimum(scaled, _LARGEST_LOGPROB_CODE).astype(np.uint32)


def logprobs_of_codes(codes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of stored codes, float32[E]: ln p = -q / 2048."""
    logprobs: npt.NDArray[np.float32] = codes.astype(np.float32) / np.float32(-LOGPROB_SCALE)
    return logprobs


def _row_sums(targets: RaggedTargets, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums over the non-empty rows."""
    lengths = targets.entries_per_token
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    if len(starts) == 0:
        return np.zeros(0, values.dtype)
    sums: npt.NDArray[Any] = np.add.reduceat(values, starts)
    return sums
