"""Host side of sparse_kd.cuh: shapes, shared memory and grids. Collectives between the stages belong to the caller.

Three stages, for a vocabulary split over ranks: `row_statistics`, an all-gather of them in rank order, `combine`,
and `gradient_` in the backward pass. Where a row is whole, `fused_` does all of it in one.

Shapes: T rows, K entries, n = V_pad/tp local columns, V real vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distill_pretrain.kernels.cuda.launcher import KernelSource, Launcher
from distill_pretrain.kernels.sparse_kd.problem import (
    DTYPES,
    SCALARS,
    Arguments,
    Problem,
    require_vector,
)
from distill_pretrain.kernels.sparse_kd.settings import TERMS, LossSettings

MAX_CLUSTER = 8
FUSED_BYTES = 128
"""Of a row, in the registers of each thread of `fused_`."""

WARP = 32

STATISTICS = 9
"""Floats that the ranks exchange per row."""

PARTIAL_BYTES, ENTRY_BYTES, STATISTICS_BYTES, SCALARS_BYTES = 32, 8, 4 * STATISTICS, 4 * SCALARS
VECTOR_BYTES = 16


def _source(more: str) -> KernelSource:
    """The kernels with such template arguments behind dtype and GENERAL."""
    stages = (
        f"sparse_kd::{stage}<{dtype}, {general}{more}>"
        for stage in ("row_statistics", "gradient", "fused")
        for dtype in DTYPES.values()
        for general in ("false", "true")
    )
    return KernelSource(
        folder="sparse_kd", entry="sparse_kd.cuh", kernels=(*stages, "sparse_kd::combine")
    )


SOURCE, CAPPED = _source(""), _source(", true")
"""The kernels, and those for models that cap their logits: a process compiles what it needs."""
SOURCES = (SOURCE, CAPPED)


def source_of(settings: LossSettings) -> KernelSource:
    """Return what a launcher for a loss must be of."""
    return CAPPED if settings.logit_cap else SOURCE


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Threads per block, multiples of 32; results depend on them by rounding alone.

    Attributes:
        statistics: of `row_statistics`; at most 512, as the next two.
        combine: of `combine`, a row per warp.
        gradient: of `gradient_`.
        gradient_vectors: vectors of 16 bytes per thread of `gradient_`.
        fused: of `fused_`; more where a cluster of `max_cluster` such blocks cannot hold a row, up to 512.
        max_cluster: blocks of a cluster of `fused_`; 1 on devices without clusters.
    """

    statistics: int = 512
    combine: int = 128
    gradient: int = 256
    gradient_vectors: int = 8
    fused: int = 512
    max_cluster: int = MAX_CLUSTER


BLOCKS = Blocks()


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The loss, and what the gradient needs of it.

    Attributes:
        losses: fp32[T], weighted.
        terms: fp32[3, T]: those of `settings.TERMS`, unweighted.
        scalars: fp32[T, 8].
        subtracted: fp32[T, 1+K].
    """

    losses: torch.Tensor
    terms: torch.Tensor
    scalars: torch.Tensor
    subtracted: torch.Tensor


def row_statistics(
    launcher: Launcher, problem: Problem, *, blocks: Blocks = BLOCKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the logits once.

    Returns:
        fp32[T, 9], to gather from all ranks; and fp32[T, 1+K], the label's and the targets' logits where they are in
        this rank's columns.
    """
    statistics = _floats(problem, problem.num_rows, STATISTICS)
    picks = _floats(problem, problem.num_rows, 1 + problem.num_entries)
    shared = WARP * PARTIAL_BYTES
    if problem.has_bucket:
        shared += _bits_bytes(problem.logits.size(1) + VECTOR_BYTES)
    _launch(
        launcher,
        _kernel("row_statistics", problem),
        Arguments.of(problem, statistics=statistics, picks=picks),
        grid=(problem.num_rows, 1),
        block=blocks.statistics,
        shared_bytes=shared,
    )
    return statistics, picks


def combine(
    launcher: Launcher, problem: Problem, statistics: torch.Tensor, *, blocks: Blocks = BLOCKS
) -> Combined:
    """Combine the ranks' maxima and sums into loss and gradient scalars, the same bits on every rank.

    Args:
        launcher: of `source_of` the loss's settings.
        problem: the loss.
        statistics: fp32[ranks, T, 9] of all ranks, in rank order.
        blocks: threads.
    """
    num_ranks = statistics.size(0)
    require_vector(
        "statistics", statistics, (num_ranks, problem.num_rows, STATISTICS), torch.float32
    )
    combined = Combined(
        losses=_floats(problem, problem.num_rows),
        terms=_floats(problem, len(TERMS), problem.num_rows),
        scalars=_floats(problem, problem.num_rows, SCALARS),
        subtracted=_floats(problem, problem.num_rows, 1 + problem.num_entries),
    )
    warps = blocks.combine // WARP
    arguments = Arguments.of(problem, statistics=statistics, **vars(combined))
    arguments.num_ranks = num_ranks
    _launch(
        launcher,
        "sparse_kd::combine",
        arguments,
        grid=(math.ceil(problem.num_rows / warps), 1),
        block=blocks.combine,
        shared_bytes=warps * problem.num_entries * (ENTRY_BYTES + 4),
    )
    return combined


def gradient_(
    launcher: Launcher,
    problem: Problem,
    picks: torch.Tensor,
    scalars: torch.Tensor,
    subtracted: torch.Tensor,
    grad_losses: torch.Tensor | None = None,
    *,
    blocks: Blocks = BLOCKS,
) -> torch.Tensor:
    """Overwrite the logits with the loss's gradient by them, and return them.

    Args:
        launcher: of `source_of` the loss's settings.
        problem: the loss.
        picks: fp32[T, 1+K] of `row_statistics`.
        scalars: fp32[T, 8] of `combine`.
        subtracted: fp32[T, 1+K] of `combine`.
        grad_losses: fp32[T] at any stride, the incoming gradient; None for one.
        blocks: threads.
    """
    arguments = Arguments.of(problem, picks=picks, scalars=scalars, subtracted=subtracted)
    arguments.set_incoming(grad_losses)
    arguments.vectors_per_block = blocks.gradient * blocks.gradient_vectors
    values = VECTOR_BYTES // problem.logits.element_size()
    vectors = math.ceil((_most_offset(problem.logits) + problem.logits.size(1)) / values)
    _launch(
        launcher,
        _kernel("gradient", problem),
        arguments,
        grid=(problem.num_rows, math.ceil(vectors / arguments.vectors_per_block)),
        block=blocks.gradient,
    )
    return problem.logits


def fused_(
    launcher: Launcher,
    problem: Problem,
    grad_losses: torch.Tensor | None = None,
    *,
    blocks: Blocks = BLOCKS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss, and its gradient over the logits, in one read and one write; for rows that are whole.

    Args:
        launcher: of `source_of` the loss's settings.
        problem: the loss; of one rank, and one that `fits_fused`.
        grad_losses: fp32[T] at any stride, the incoming gradient, known beforehand; None for one.
        blocks: threads.

    Returns:
        losses fp32[T] and terms fp32[3, T], as `Combined` has them; not multiplied by `grad_losses`.
    """
    shape = _fused_shape(problem, blocks)
    if shape is None or problem.rank != 0:
        raise ValueError(f"rows of {problem.logits.size(1)} columns do not fit the fused kernel")
    cluster, threads = shape
    losses, terms = (
        _floats(problem, problem.num_rows),
        _floats(problem, len(TERMS), problem.num_rows),
    )
    arguments = Arguments.of(problem, losses=losses, terms=terms)
    arguments.set_incoming(grad_losses)
    shared = problem.num_entries * ENTRY_BYTES + MAX_CLUSTER * STATISTICS_BYTES
    shared += (
        WARP * (FUSED_BYTES + PARTIAL_BYTES) + SCALARS_BYTES + (3 * problem.num_entries + 2) * 4
    )
    if problem.has_bucket:
        shared += _bits_bytes(threads * FUSED_BYTES // problem.logits.element_size())
    _launch(
        launcher,
        _kernel("fused", problem),
        arguments,
        grid=(problem.num_rows * cluster, 1),
        block=threads,
        shared_bytes=shared,
        cluster=cluster,
    )
    return losses, terms


def fits_fused(problem: Problem, *, blocks: Blocks = BLOCKS) -> bool:
    """Tell whether a cluster's registers hold a row: up to 512 KiB where clusters have eight blocks."""
    return _fused_shape(problem, blocks) is not None


def _fused_shape(problem: Problem, blocks: Blocks) -> tuple[int, int] | None:
    """Blocks of a cluster, and threads of each."""
    positions = _most_offset(problem.logits) + problem.logits.size(1)
    num_threads = math.ceil(positions * problem.logits.element_size() / FUSED_BYTES)
    cluster = 1
    while cluster < blocks.max_cluster and cluster * blocks.fused < num_threads:
        cluster *= 2
    threads = WARP * math.ceil(num_threads / (cluster * WARP))
    return (cluster, threads) if threads <= 512 else None


def _launch(
    launcher: Launcher,
    kernel: str,
    arguments: Arguments,
    *,
    grid: tuple[int, int],
    block: int,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    if arguments.num_rows > 0:
        launcher.launch(
            kernel,
            arguments,
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            cluster=cluster,
        )


def _kernel(stage: str, problem: Problem) -> str:
    general = "true" if problem.is_general else "false"
    more = ", true" if problem.is_capped else ""
    return f"sparse_kd::{stage}<{DTYPES[problem.logits.dtype]}, {general}{more}>"


def _floats(problem: Problem, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=problem.logits.device)


def _bits_bytes(num_bits: int) -> int:
    return 4 * math.ceil(num_bits / 32)


def _most_offset(logits: torch.Tensor) -> int:
    """Most columns that a row begins after an aligned address; 0 where all rows are aligned."""
    size = logits.element_size()
    is_aligned = logits.data_ptr() % VECTOR_BYTES == 0 == logits.stride(0) * size % VECTOR_BYTES
    return 0 if is_aligned else VECTOR_BYTES // size - 1
