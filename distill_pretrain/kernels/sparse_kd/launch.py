"""Host side of sparse_kd.cuh: shapes, shared memory and grids. Collectives between the stages belong to the caller.

Three stages, for a vocabulary split over ranks: `row_statistics`, an all-gather of them in rank order, `combine`,
and `gradient_` in the backward pass. Where a row is whole, `fused_` does all of it in one.

Shapes: T rows, K entries, n = V_pad/tp local columns, V real vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.cuda.launcher import KernelSource, Launcher
from distill_pretrain.kernels.sparse_kd.targets import RowTargets

MAX_ENTRIES = 512
"""Most entries K of a row."""

MAX_COLUMNS = 1 << 19
"""Most columns n of a rank: a bit for each is kept in shared memory where targets have a bucket."""

MAX_CLUSTER = 8
FUSED_BYTES = 64
"""Of a row, in the registers of each thread of `fused_`."""

WARP = 32

STATISTICS = 9
"""Floats that the ranks exchange per row."""

SCALARS = 8
PARTIAL_BYTES, ENTRY_BYTES, STATISTICS_BYTES, SCALARS_BYTES = 32, 8, 4 * STATISTICS, 4 * SCALARS
VECTOR_BYTES = 16

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

SOURCE = KernelSource(
    folder="sparse_kd",
    entry="sparse_kd.cuh",
    kernels=(
        *(
            f"sparse_kd::{stage}<{dtype}, {general}>"
            for stage in ("row_statistics", "gradient", "fused")
            for dtype in DTYPES.values()
            for general in ("false", "true")
        ),
        "sparse_kd::combine",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Threads per block, multiples of 32; results depend on them by rounding alone.

    Attributes:
        statistics: of `row_statistics`; at most 512, as the next two.
        combine: of `combine`, a row per warp.
        gradient: of `gradient_`.
        gradient_vectors: vectors of 16 bytes per thread of `gradient_`.
        fused: of `fused_`; more where a cluster of `max_cluster` such blocks cannot hold a row, up to 1024.
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
class Problem:
    """What the loss is of. Rank r of the vocabulary's ranks has columns [r n, (r + 1) n).

    Attributes:
        logits: bf16, fp16 or fp32 [T, n], columns adjacent, rows at any stride.
        labels: int64[T], negative for none.
        targets: ids int64 or int32 [T, K] padded with -1, an id twice counting as one; None for K = 0.
        kd_scale: fp32[T], weight of the KL with tau^2 and token weight in it; unused without targets.
        vocab_size: V; columns from V on carry no mass and get zero gradient.
        ce_weight: weight of the cross-entropy.
        z_loss: weight of lse^2.
        temperature: tau.
        rank: of this slice of the vocabulary.

    Raises:
        ConfigError: K or n is above the kernels' limit.
        ValueError: a tensor's shape or dtype is another, or the targets have both a floor and a bucket.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    targets: RowTargets | None
    kd_scale: torch.Tensor | None
    vocab_size: int
    ce_weight: float
    z_loss: float = 0.0
    temperature: float = 1.0
    rank: int = 0

    def __post_init__(self) -> None:
        rows = (self.num_rows,)
        _require(self.logits.dtype in DTYPES, "logits", self.logits)
        _require(self.logits.size(1) > 0 and self.logits.stride(1) == 1, "logits", self.logits)
        _require_vector("labels", self.labels, rows, torch.int64)
        if self.targets is not None:
            shape = (self.num_rows, self.num_entries)
            ids = self.targets.ids
            _require(ids.shape == shape and ids.dtype in (torch.int64, torch.int32), "ids", ids)
            _require_vector("probs", self.targets.probs, shape, torch.float32)
            for name in ("floor", "bucket"):
                values = getattr(self.targets, name)
                if values is not None:
                    _require_vector(name, values, rows, torch.float32)
            if self.targets.floor is not None and self.targets.bucket is not None:
                raise ValueError("targets with a floor and a bucket")
            if self.kd_scale is None:
                raise ValueError("targets without a kd_scale")
            _require_vector("kd_scale", self.kd_scale, rows, torch.float32)
        _require_at_most(MAX_ENTRIES, self.num_entries, "target entries per token")
        _require_at_most(MAX_COLUMNS, self.logits.size(1), "vocabulary columns per rank")

    @property
    def num_rows(self) -> int:
        """T."""
        return self.logits.size(0)

    @property
    def num_entries(self) -> int:
        """K."""
        return 0 if self.targets is None else self.targets.ids.size(1)

    @property
    def is_general(self) -> bool:
        """Whether the kernels that know temperature, floor and bucket are needed."""
        targets = self.targets
        with_targets = targets is not None and not (targets.floor is None is targets.bucket)
        return self.temperature != 1.0 or with_targets

    @property
    def has_bucket(self) -> bool:
        """Whether targets give mass to all other ids as a whole."""
        return self.targets is not None and self.targets.bucket is not None


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The loss, and what the gradient needs of it.

    Attributes:
        losses: fp32[T], weighted.
        terms: fp32[3, T]: cross-entropy, KL, lse^2, unweighted.
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
        _arguments(problem, statistics=statistics, picks=picks),
        grid=(problem.num_rows, 1),
        block=blocks.statistics,
        shared_bytes=shared,
    )
    return statistics, picks


def combine(
    launcher: Launcher, problem: Problem, statistics: torch.Tensor, *, blocks: Blocks = BLOCKS
) -> Combined:
    """Loss and gradient scalars, the same bits on every rank.

    Args:
        launcher: of `SOURCE`.
        problem: the loss.
        statistics: fp32[ranks, T, 9] of all ranks, in rank order.
        blocks: threads.
    """
    num_ranks = statistics.size(0)
    _require_vector(
        "statistics", statistics, (num_ranks, problem.num_rows, STATISTICS), torch.float32
    )
    combined = Combined(
        losses=_floats(problem, problem.num_rows),
        terms=_floats(problem, 3, problem.num_rows),
        scalars=_floats(problem, problem.num_rows, SCALARS),
        subtracted=_floats(problem, problem.num_rows, 1 + problem.num_entries),
    )
    warps = blocks.combine // WARP
    arguments = _arguments(problem, statistics=statistics, **vars(combined))
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
    """Overwrite the logits with the loss's gradient by them; returns them.

    Args:
        launcher: of `SOURCE`.
        problem: the loss.
        picks: fp32[T, 1+K] of `row_statistics`.
        scalars: fp32[T, 8] of `combine`.
        subtracted: fp32[T, 1+K] of `combine`.
        grad_losses: fp32[T] at any stride, the incoming gradient; None for one.
        blocks: threads.
    """
    arguments = _arguments(problem, picks=picks, scalars=scalars, subtracted=subtracted)
    _set_incoming(arguments, grad_losses)
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
    """Loss, and its gradient over the logits, in one read and one write; for rows that are whole.

    Args:
        launcher: of `SOURCE`.
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
    losses, terms = _floats(problem, problem.num_rows), _floats(problem, 3, problem.num_rows)
    arguments = _arguments(problem, losses=losses, terms=terms)
    _set_incoming(arguments, grad_losses)
    shared = problem.num_entries * ENTRY_BYTES + MAX_CLUSTER * STATISTICS_BYTES
    shared += WARP * PARTIAL_BYTES + SCALARS_BYTES + (3 * problem.num_entries + 2) * 4
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
    """Whether a cluster's registers hold a row: up to 512 KiB where clusters have eight blocks."""
    return _fused_shape(problem, blocks) is not None


def _fused_shape(problem: Problem, blocks: Blocks) -> tuple[int, int] | None:
    """Blocks of a cluster, and threads of each."""
    positions = _most_offset(problem.logits) + problem.logits.size(1)
    num_threads = math.ceil(positions * problem.logits.element_size() / FUSED_BYTES)
    cluster = 1
    while cluster < blocks.max_cluster and cluster * blocks.fused < num_threads:
        cluster *= 2
    threads = WARP * math.ceil(num_threads / (cluster * WARP))
    return (cluster, threads) if threads <= 1024 else None


class _Arguments(ctypes.Structure):
    """Mirrors `Arguments` of sparse_kd.cuh."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("logits", "labels", "ids", "probs", "floors", "buckets", "kd_scales"),
                *("grad_losses", "statistics", "picks", "scalars", "subtracted", "losses", "terms"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("row_stride", "grad_stride")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("num_rows", "num_columns", "num_entries", "num_ranks", "rank", "vocab_size"),
                *("ids_are_wide", "vectors_per_block"),
            )
        ),
        *((name, ctypes.c_float) for name in ("ce_weight", "z_loss", "temperature")),
    ]

    def point(self, name: str, tensor: torch.Tensor | None) -> None:
        """Set a pointer; the arguments keep the tensor alive."""
        if tensor is not None:
            setattr(self, name, tensor.data_ptr())
            self.__dict__.setdefault("tensors", []).append(tensor)


def _arguments(problem: Problem, **buffers: torch.Tensor) -> _Arguments:
    logits, targets = problem.logits, problem.targets
    arguments = _Arguments(
        row_stride=logits.stride(0),
        num_rows=problem.num_rows,
        num_columns=logits.size(1),
        num_entries=problem.num_entries,
        num_ranks=1,
        rank=problem.rank,
        vocab_size=problem.vocab_size,
        ce_weight=problem.ce_weight,
        z_loss=problem.z_loss,
        temperature=problem.temperature,
    )
    arguments.point("logits", logits)
    arguments.point("labels", problem.labels.contiguous())
    if targets is not None:
        assert problem.kd_scale is not None
        arguments.ids_are_wide = targets.ids.dtype == torch.int64
        arguments.point("ids", targets.ids.contiguous())
        arguments.point("probs", targets.probs.contiguous())
        arguments.point("kd_scales", problem.kd_scale.contiguous())
        arguments.point("floors", None if targets.floor is None else targets.floor.contiguous())
        arguments.point("buckets", None if targets.bucket is None else targets.bucket.contiguous())
    for name, buffer in buffers.items():
        arguments.point(name, buffer.contiguous())
    return arguments


def _set_incoming(arguments: _Arguments, grad_losses: torch.Tensor | None) -> None:
    if grad_losses is None:
        return
    _require_vector("grad_losses", grad_losses, (arguments.num_rows,), torch.float32)
    arguments.point("grad_losses", grad_losses)
    arguments.grad_stride = grad_losses.stride(0)


def _launch(launcher: Launcher, kernel: str, arguments: _Arguments, **shape: object) -> None:
    if arguments.num_rows > 0:
        launcher.launch(kernel, arguments, **shape)  # type: ignore[arg-type]


def _kernel(stage: str, problem: Problem) -> str:
    general = "true" if problem.is_general else "false"
    return f"sparse_kd::{stage}<{DTYPES[problem.logits.dtype]}, {general}>"


def _floats(problem: Problem, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=problem.logits.device)


def _bits_bytes(num_bits: int) -> int:
    return 4 * math.ceil(num_bits / 32)


def _most_offset(logits: torch.Tensor) -> int:
    """Most columns that a row begins after an aligned address; 0 where all rows are aligned."""
    size = logits.element_size()
    is_aligned = logits.data_ptr() % VECTOR_BYTES == 0 == logits.stride(0) * size % VECTOR_BYTES
    return 0 if is_aligned else VECTOR_BYTES // size - 1


def _require(holds: bool, name: str, tensor: torch.Tensor) -> None:
    if not holds:
        found = f"{tensor.dtype} {tuple(tensor.shape)} at strides {tensor.stride()}"
        raise ValueError(f"sparse_kd kernels do not take {name} {found}")


def _require_vector(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    _require(tensor.shape == shape and tensor.dtype == dtype, name, tensor)


def _require_at_most(limit: int, found: int, what: str) -> None:
    if found > limit:
        raise ConfigError(
            f"more {what} than the CUDA kernels of the loss take",
            found=found,
            expected=f"at most {limit}",
            remedy="use the reference implementation of the loss",
        )
