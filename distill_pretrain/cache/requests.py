"""What `CacheReader.read` refuses before it reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.errors import CacheMismatch


def require_readable(
    plan: CachePlan,
    location: str,
    sequence: int,
    tokens: npt.NDArray[np.int32],
    start: int,
    stop: int,
) -> None:
    """Raise CacheMismatch unless the cache has the positions asked for, and the tokens int32[L] are a sequence's."""
    if not 0 <= sequence < plan.num_sequences:
        raise CacheMismatch(
            "no such sequence in the cache",
            where=location,
            found=sequence,
            expected=f"0 to {plan.num_sequences - 1}",
            remedy="lower data.num_sequences, or capture more sequences",
        )
    if not 0 <= start < stop <= plan.seq_len:
        raise CacheMismatch(
            "no such positions in a sequence of the cache",
            where=location,
            found=f"{start} to {stop}",
            expected=f"start < stop, within 0 to {plan.seq_len}",
        )
    if tokens.shape != (plan.seq_len,) or tokens.dtype != np.int32:
        raise CacheMismatch(
            "the tokens of a sequence are read with its targets, and these are none",
            where=location,
            found=f"{tokens.dtype} {tokens.shape}",
            expected=f"int32 ({plan.seq_len},), the whole sequence as `SequencePlan.read` gives it",
        )
