"""Logits of several models at the same positions, some positions at a time: [B, L, V] is never whole.

Shapes: B sequences of a micro-batch, L positions, C positions of a chunk, V vocabulary, R ranks that split it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.contracts import LogitsChunk, Replica

CHUNK_ELEMENTS = 1 << 23
"""Size of the temporaries that are made of logits: so many numbers at a time."""


def row_slices(num_rows: int, width: int) -> Iterator[slice]:
    """Slices over [num_rows, width] of at most `CHUNK_ELEMENTS` numbers, but of one row at least."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def replica_of(engine: Any) -> Replica:
    """Return the processes that hold an engine together; the default, of one process, where it does not say."""
    return getattr(engine, "replica", Replica())


def logits_chunks(engine: Any, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
    """Compute the logits of tokens int64[B, L] over the whole vocabulary, chunk by chunk, in order.

    Every rank of the engine's replica calls it with the same tokens and exhausts it. Ranks with the LM head get the
    chunks, the others none. A model whose head cannot be applied to some positions gives one sequence at a time.

    Args:
        engine: a `LogitsEngine`, a `TeacherEngine`, or both.
        tokens: int64[B, L], on its device.
    """
    if not getattr(engine, "has_chunks", hasattr(engine, "chunks")):
        for row in range(len(tokens)):
            logits = engine.logits(tokens[row : row + 1])[0]
            yield LogitsChunk(first=row * tokens.size(1), first_id=0, logits=logits)
        return
    group = replica_of(engine).vocab_group
    if group is None:
        yield from engine.chunks(tokens)
        return
    for chunk in engine.chunks(tokens):
        yield from _whole_rows(chunk, group)
        del chunk  # before the next is made


def together(streams: Sequence[Iterator[LogitsChunk]]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Walk several models' chunks of the same positions, whatever their sizes.

    Of every model one chunk exists at a time, if the caller lets go of what it was given before it asks for more.

    Args:
        streams: of `logits_chunks`; all are exhausted, also on ranks that lack a model's LM head.

    Yields:
        Number of the first position, and [C, V] of every model; nothing on ranks that lack a model's LM head.
    """
    held: list[LogitsChunk | None] = [next(stream, None) for stream in streams]
    while held and all(chunk is not None for chunk in held):
        chunks = [chunk for chunk in held if chunk is not None]
        first, size = chunks[0].first, min(len(chunk.logits) for chunk in chunks)
        assert all(chunk.first == first for chunk in chunks), [chunk.first for chunk in chunks]
        logits = [chunk.logits[:size] for chunk in chunks]
        rest = [_behind(chunk, size) for chunk in chunks]
        held, chunks = [], []
        yield first, logits
        logits = []
        for number, stream in enumerate(streams):
            left = rest[number]
            held.append(next(stream, None) if left is None else left)
    for stream in streams:
        for _ in stream:
            pass


def _behind(chunk: LogitsChunk, size: int) -> LogitsChunk | None:
    """What is left of a chunk behind its first rows."""
    if size == len(chunk.logits):
        return None
    return LogitsChunk(
        first=chunk.first + size, first_id=chunk.first_id, logits=chunk.logits[size:]
    )


def _whole_rows(chunk: LogitsChunk, group: dist.ProcessGroup) -> Iterator[LogitsChunk]:
    """The rows of a chunk with the columns of all ranks of the group, on each of them, some rows at a time."""
    size = dist.get_world_size(group)
    own = torch.tensor([chunk.logits.size(1)], device=chunk.logits.device)
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own, group=group)
    widths = [int(width) for width in torch.cat(every).tolist()]
    # Columns of padding make the messages equal; ranks at the end of the vocabulary may have no column of it.
    most = max(widths)
    for rows in row_slices(len(chunk.logits), size * most):
        sent = chunk.logits.new_zeros(rows.stop - rows.start, most)
        sent[:, : widths[dist.get_rank(group)]] = chunk.logits[rows]
        # Nothing but the whole rows is kept while others are made of another model.
        logits, sent = _side_by_side(sent, widths, group), sent.new_empty(0)
        yield LogitsChunk(first=chunk.first + rows.start, first_id=0, logits=logits)
        del logits


def _side_by_side(
    sent: torch.Tensor, widths: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """The first columns of every rank's [rows, most], `widths` of them, in the order of the ranks."""
    parts = [torch.empty_like(sent) for _ in widths]
    # As bytes: gloo knows no bf16.
    dist.all_gather([part.view(torch.uint8) for part in parts], sent.view(torch.uint8), group=group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)
