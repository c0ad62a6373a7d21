"""Which part of a sequence a context-parallel rank holds. Does not import torch."""

from __future__ import annotations

from distill_pretrain.errors import LayoutError


def context_spans(seq_len: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return the pieces [start, stop) of a sequence that a context-parallel rank holds, in order.

    Of 2 * size equal chunks these are number `rank` and number `2 * size - 1 - rank`: under causal attention every
    rank has the same work (megatron-core's load-balanced order).

    Raises:
        LayoutError: the sequence does not divide into 2 * size chunks.
    """
    if size == 1:
        return [(0, seq_len)]
    chunk, left = divmod(seq_len, 2 * size)
    if left:
        raise LayoutError(
            "the sequence does not divide among the context-parallel ranks",
            where="data.seq_len",
            found=seq_len,
            expected=f"a multiple of 2 x context-parallel size = {2 * size}",
            remedy="change data.seq_len (and capture anew), or the context-parallel size",
        )
    last = 2 * size - 1 - rank
    if last == rank + 1:  # one piece: its blocks are read once
        return [(rank * chunk, (last + 1) * chunk)]
    return [(rank * chunk, (rank + 1) * chunk), (last * chunk, (last + 1) * chunk)]
