"""Host side of the sampling kernels: what `sampling.columns` asks of a rank's logits, answered where they lie.

Legend: T rows, V columns of this rank, N draws, E entries in all.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import DrawnEntries, LikeliestEntries, RowMoments
from distill_pretrain.kernels.cuda.launcher import KernelSource, Launcher

LOGIT_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCK_COLUMNS = 256
MAX_DRAWS = 8192
"""Their columns lie in shared memory."""
THREADS = 256
_STREAMS = (0, 1)
"""Streams of the samplers that the kernels know: multinomial and systematic."""

Array = npt.NDArray[Any]


def _name(kernel: str, dtype: torch.dtype) -> str:
    return f"teacher_sampling::{kernel}<{LOGIT_TYPES[dtype]}>"


SOURCE = KernelSource(
    folder="teacher_sampling",
    entry="teacher_sampling.cuh",
    kernels=tuple(
        _name(kernel, dtype)
        for kernel in ("weigh", "draw", "select", "look")
        for dtype in LOGIT_TYPES
    ),
)


class Draws(Protocol):
    """The random numbers of a sampler at some positions, as the kernels need them; see `sampling.columns.Draws`."""

    @property
    def stream(self) -> int:
        """The name of the sampler."""
        ...

    @property
    def num_draws(self) -> int:
        """N, the draws per position."""
        ...

    @property
    def seed(self) -> int:
        """The seed: the key of Philox."""
        ...

    @property
    def positions(self) -> npt.NDArray[np.uint64]:
        """The positions that are sampled, uint64[P]."""
        ...


class DeviceColumns:
    """A rank's columns of all rows.

    Args:
        logits: [T, V] of one of `LOGIT_TYPES`, columns next to each other; no column counts as one of -inf.
        launcher: of SOURCE, on the device of the logits.
        threads: per block, a multiple of 32.
    """

    rows_at_once = 4096

    def __init__(self, logits: torch.Tensor, launcher: Launcher, *, threads: int = THREADS) -> None:
        assert logits.ndim == 2 and logits.dtype in LOGIT_TYPES, (logits.shape, logits.dtype)
        logits = logits.detach()
        if logits.shape[1] == 0:
            logits = logits.new_full((len(logits), 1), -torch.inf)
        elif logits.stride(1) != 1 and logits.shape[1] > 1:
            logits = logits.contiguous()
        self._logits = logits
        self._launcher = launcher
        self._threads = threads
        self.num_rows, self.width = logits.shape

    def block(self, rows: npt.NDArray[np.int64]) -> DeviceBlock:
        """Take some rows, ascending."""
        first, last = int(rows[0]), int(rows[-1])
        return DeviceBlock(
            self._logits[first : last + 1], rows - first, self._launcher, self._threads
        )


class DeviceBlock:
    """Some rows of a rank's columns.

    Args:
        logits: [R, V], R >= T.
        rows: int64[T], those of the R that count.
        launcher: of SOURCE.
        threads: per block.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int64],
        launcher: Launcher,
        threads: int,
    ) -> None:
        self._logits = logits
        self._launcher = launcher
        self._threads = threads
        self._numbers = self._sent(rows.astype(np.int64))
        self._num_blocks = -(-logits.shape[1] // BLOCK_COLUMNS)

    def largest(self) -> npt.NDArray[np.float32]:
        """Return the largest logit of each row, float32[T], +inf for a row that holds NaN."""
        largest = self._logits.amax(1)[self._numbers].float()
        return _fetched(torch.where(largest.isnan(), torch.inf, largest))

    def weigh(self, maxima: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Sum the integer weights of each row, int64[T], by the maxima over all ranks; call it before those below."""
        self._maxima = self._sent(maxima)
        self._before = self._new((len(maxima), self._num_blocks + 1), torch.int64)
        arguments = _WeighArguments(rows=self._rows(), before=self._before.data_ptr())
        self._launch("weigh", arguments, len(maxima), 8 * (self._num_blocks + 1))
        return _fetched(self._before[:, -1])

    def drawn(
        self,
        draws: Draws,
        rows: slice,
        below: npt.NDArray[np.int64],
        totals: npt.NDArray[np.int64],
    ) -> DrawnEntries:
        """Find those of the draws that fall on this rank's columns; see `sampling.columns.Block`."""
        assert 1 <= draws.num_draws <= MAX_DRAWS and draws.stream in _STREAMS, draws
        positions = self._sent(draws.positions[rows].view(np.int64))
        sent_below, sent_totals = self._sent(below), self._sent(totals)
        lengths = self._new((len(positions),), torch.int32)
        columns = self._new((len(positions), draws.num_draws), torch.int32)
        counts = torch.empty_like(columns)
        slots = 1 << (draws.num_draws - 1).bit_length()
        arguments = _DrawArguments(
            rows=self._rows(),
            before=self._before.data_ptr(),
            positions=positions.data_ptr(),
            below=sent_below.data_ptr(),
            totals=sent_totals.data_ptr(),
            lengths=lengths.data_ptr(),
            columns=columns.data_ptr(),
            counts=counts.data_ptr(),
            seed=draws.seed,
            stream=draws.stream,
            draws=draws.num_draws,
            slots=slots,
        )
        self._launch("draw", arguments, len(positions), 4 * slots)
        return DrawnEntries(*_ragged(lengths, columns, counts))

    def likeliest(self, k: int) -> LikeliestEntries:
        """Find the k largest of this rank's logits, ties to the lower column; -inf is never among them."""
        k = min(k, self._logits.shape[1])
        # Which of equal logits torch picks is not defined, and does not matter to the k-th largest.
        values = self._logits.topk(k, dim=1, sorted=False).values
        thresholds = values.amin(1)[self._numbers].float()
        lengths = self._new((len(thresholds),), torch.int32)
        columns = self._new((len(thresholds), k), torch.int32)
        logits = self._new(columns.shape, torch.float32)
        weights = self._new(columns.shape, torch.int64)
        arguments = _SelectArguments(
            rows=self._rows(),
            thresholds=thresholds.data_ptr(),
            lengths=lengths.data_ptr(),
            columns=columns.data_ptr(),
            values=logits.data_ptr(),
            weights=weights.data_ptr(),
            k=k,
        )
        self._launch("select", arguments, len(thresholds), 8 * (self._num_blocks + 1))
        return LikeliestEntries(*_ragged(lengths, columns, logits, weights))

    def moments(self, rows: npt.NDArray[np.int64]) -> RowMoments:
        """Compute the moments of some rows of the block."""
        chosen = self._sent(rows.astype(np.int64))
        numbers, maxima = self._numbers[chosen], self._maxima[chosen]
        depths = self._new((len(rows),), torch.float64)
        top = self._new((len(rows),), torch.int32)
        arguments = _LookArguments(
            rows=self._rows(numbers, maxima), depths=depths.data_ptr(), top=top.data_ptr()
        )
        self._launch("look", arguments, len(rows), _LOOK_BYTES * self._threads // 32)
        return RowMoments(_fetched(depths), _fetched(top))

    def _rows(
        self, numbers: torch.Tensor | None = None, maxima: torch.Tensor | None = None
    ) -> _Rows:
        numbers = self._numbers if numbers is None else numbers
        maxima = self._maxima if maxima is None else maxima
        return _Rows(
            logits=self._logits.data_ptr(),
            numbers=numbers.data_ptr(),
            maxima=maxima.data_ptr(),
            stride=self._logits.stride(0),
            columns=self._logits.shape[1],
            count=len(numbers),
        )

    def _launch(
        self, kernel: str, arguments: ctypes.Structure, num_rows: int, shared_bytes: int
    ) -> None:
        self._launcher.launch(
            _name(kernel, self._logits.dtype),
            arguments,
            grid=(num_rows, 1),
            block=self._threads,
            shared_bytes=shared_bytes,
        )

    def _sent(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._logits.device)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._logits.device)


def _fetched(values: torch.Tensor) -> Array:
    fetched: Array = values.cpu().numpy()
    return fetched


def _ragged(lengths: torch.Tensor, *padded: torch.Tensor) -> list[Array]:
    """Lengths [T], and of each of the others [T, most] the first entries of its rows, joined; on the host."""
    sizes = _fetched(lengths)
    filled = np.arange(padded[0].shape[1]) < sizes[:, None]
    return [sizes, *(_fetched(values)[filled] for values in padded)]


_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LOOK_BYTES = 16


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("logits", "numbers", "maxima")),
        ("stride", _INT64),
        *((name, _INT32) for name in ("columns", "count")),
    )


class _WeighArguments(ctypes.Structure):
    _fields_ = (("rows", _Rows), ("before", _POINTER))


class _DrawArguments(ctypes.Structure):
    _fields_ = (
        ("rows", _Rows),
        *((name, _POINTER) for name in ("before", "positions", "below", "totals")),
        *((name, _POINTER) for name in ("lengths", "columns", "counts")),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        *((name, _INT32) for name in ("draws", "slots", "unused")),
    )


class _SelectArguments(ctypes.Structure):
    _fields_ = (
        ("rows", _Rows),
        *((name, _POINTER) for name in ("thresholds", "lengths", "columns", "values", "weights")),
        *((name, _INT32) for name in ("k", "unused")),
    )


class _LookArguments(ctypes.Structure):
    _fields_ = (("rows", _Rows), *((name, _POINTER) for name in ("depths", "top")))
