"""What the CUDA kernels of the loss are given: a slice of the logits and its loss, checked, and as C sees them.

Shapes: T rows, K entries, n = V_pad/tp local columns, V real vocabulary.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.targets import RowTargets

MAX_ENTRIES = 512
"""Most entries K of a row."""

MAX_COLUMNS = 1 << 19
"""Most columns n of a rank: a bit for each is kept in shared memory where targets have a bucket."""

SCALARS = 8
"""Floats that the forward pass leaves for the gradient of a row."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A rank's logits and their loss. Rank r of the vocabulary's ranks has columns [r n, (r + 1) n).

    Attributes:
        logits: bf16, fp16 or fp32 [T, n], columns adjacent, rows at any stride.
        loss: labels int64[T]; ids int64 or int32 [T, K], an id twice counting as one.
        rank: of this slice of the vocabulary.

    Raises:
        ConfigError: K or n is above the kernels' limit.
        ValueError: a tensor's shape or dtype is another, or the targets have both a floor and a bucket.
    """

    logits: torch.Tensor
    loss: Loss
    rank: int = 0

    def __post_init__(self) -> None:
        _require(self.logits.dtype in DTYPES, "logits", self.logits)
        _require(self.logits.size(1) > 0 and self.logits.stride(1) == 1, "logits", self.logits)
        require_vector("labels", self.loss.labels, (self.num_rows,), torch.int64)
        if self.loss.targets is not None:
            self._require_targets(self.loss.targets)
        _require_at_most(MAX_ENTRIES, self.num_entries, "target entries per token")
        _require_at_most(MAX_COLUMNS, self.logits.size(1), "vocabulary columns per rank")

    def _require_targets(self, targets: RowTargets) -> None:
        rows, shape = (self.num_rows,), (self.num_rows, self.num_entries)
        is_id = targets.ids.dtype in (torch.int64, torch.int32)
        _require(targets.ids.shape == shape and is_id, "ids", targets.ids)
        require_vector("probs", targets.probs, shape, torch.float32)
        for name, values in (("floor", targets.floor), ("bucket", targets.bucket)):
            if values is not None:
                require_vector(name, values, rows, torch.float32)
        if targets.floor is not None and targets.bucket is not None:
            raise ValueError("targets with a floor and a bucket")
        if self.loss.kd_scale is None:
            raise ValueError("targets without a kd_scale")
        require_vector("kd_scale", self.loss.kd_scale, rows, torch.float32)

    @property
    def num_rows(self) -> int:
        """T, the number of rows."""
        return self.logits.size(0)

    @property
    def num_entries(self) -> int:
        """K, the number of target entries of a row."""
        return self.loss.num_entries

    @property
    def is_general(self) -> bool:
        """Whether the kernels that know temperature, floor and bucket are needed."""
        targets = self.loss.targets
        with_targets = targets is not None and not (targets.floor is None is targets.bucket)
        return self.loss.row_temperature != 1.0 or with_targets

    @property
    def is_capped(self) -> bool:
        """Whether the kernels that cap logits are needed."""
        return self.loss.settings.logit_cap > 0

    @property
    def has_bucket(self) -> bool:
        """Whether targets give mass to all other ids as a whole."""
        return self.loss.targets is not None and self.loss.targets.bucket is not None


_SETTINGS = ("ce_weight", "z_loss", "logit_cap")
"""Those of the loss's settings that the kernels read as they are."""


class Arguments(ctypes.Structure):
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
        *((name, ctypes.c_float) for name in ("ce_weight", "z_loss", "temperature", "logit_cap")),
    ]

    num_ranks: int
    num_rows: int
    vectors_per_block: int
    ids_are_wide: bool
    grad_stride: int

    @classmethod
    def of(cls, problem: Problem, **buffers: torch.Tensor) -> Arguments:
        """Make the arguments of a problem, with what a kernel reads or writes beside it."""
        logits, loss, targets = problem.logits, problem.loss, problem.loss.targets
        arguments = cls(
            row_stride=logits.stride(0),
            num_rows=problem.num_rows,
            num_columns=logits.size(1),
            num_entries=problem.num_entries,
            num_ranks=1,
            rank=problem.rank,
            vocab_size=loss.vocab_size,
            **{name: getattr(loss.settings, name) for name in _SETTINGS},
            temperature=loss.row_temperature,
        )
        arguments._point("logits", logits)
        arguments._point("labels", loss.labels.contiguous())
        if targets is not None:
            assert loss.kd_scale is not None
            arguments.ids_are_wide = targets.ids.dtype == torch.int64
            arguments._point("ids", targets.ids.contiguous())
            arguments._point("probs", targets.probs.contiguous())
            arguments._point("kd_scales", loss.kd_scale.contiguous())
            for name, values in (("floors", targets.floor), ("buckets", targets.bucket)):
                if values is not None:
                    arguments._point(name, values.contiguous())
        for name, buffer in buffers.items():
            arguments._point(name, buffer.contiguous())
        return arguments

    def set_incoming(self, grad_losses: torch.Tensor | None) -> None:
        """Take the incoming gradient, fp32[T] at any stride; None stands for one."""
        if grad_losses is None:
            return
        require_vector("grad_losses", grad_losses, (self.num_rows,), torch.float32)
        self._point("grad_losses", grad_losses)
        self.grad_stride = grad_losses.stride(0)

    def _point(self, name: str, tensor: torch.Tensor) -> None:
        """Set a pointer; the arguments keep the tensor alive."""
        setattr(self, name, tensor.data_ptr())
        self.__dict__.setdefault("tensors", []).append(tensor)


def _require(holds: bool, name: str, tensor: torch.Tensor) -> None:
    if not holds:
        found = f"{tensor.dtype} {tuple(tensor.shape)} at strides {tensor.stride()}"
        raise ValueError(f"sparse_kd kernels do not take {name} {found}")


def require_vector(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raise ValueError unless a tensor is of this shape and dtype."""
    _require(tensor.shape == shape and tensor.dtype == dtype, name, tensor)


def _require_at_most(limit: int, found: int, what: str) -> None:
    if found > limit:
        raise ConfigError(
            f"more {what} than the CUDA kernels of the loss take",
            found=found,
            expected=f"at most {limit}",
            remedy="use the reference implementation of the loss",
        )
