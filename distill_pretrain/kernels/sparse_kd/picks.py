"""Columns that a row of the loss reads one by one: its label's, and its targets'.

Shapes: T tokens, M columns of each, n local vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from distill_pretrain.kernels.sparse_kd.cap import soft_capped


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Columns of each row that the loss reads: the label's, or the targets'.

    Attributes:
        relative: int64[T, M], column counted from this rank's first.
        columns: int64[T, M], the same where this rank owns it, else any of its columns.
    """

    relative: torch.Tensor
    columns: torch.Tensor

    @cached_property
    def owned(self) -> torch.Tensor:
        """Whether this rank owns the column, bool[T, M]."""
        return self.relative == self.columns

    def of_rows(self, rows: slice[int]) -> Picks:
        """Return the picks of some rows."""
        return Picks(relative=self.relative[rows], columns=self.columns[rows])


def pick_columns(ids: torch.Tensor, *, first_column: int, num_columns: int) -> Picks:
    """Find the columns of this rank's slice [first_column, first_column + num_columns) that ids [T, M] name.

    Args:
        ids: int64[T, M]; negative means none.
        first_column: global id of the slice's first column.
        num_columns: real (unpadded) columns in the slice, at least 1.
    """
    # No id at all is negative, so never owned.
    relative = ids - first_column
    return Picks(relative=relative, columns=relative.clamp(0, num_columns - 1))


def picked_logits(
    logits: torch.Tensor, maxima: torch.Tensor, picks: Picks, cap: float
) -> torch.Tensor:
    """Return z - max at the picks' columns, fp32[T, M], of logits [T, n], capped, and maxima fp32[T]."""
    return soft_capped(logits.gather(-1, picks.columns), cap).sub_(maxima.unsqueeze(-1))


def removed(picks: Picks) -> torch.Tensor:
    """Return what takes the picks' columns out of a row where it is added: -inf where this rank owns them, else 0.

    fp32[T, M].
    """
    # 1 - 1 / 0; masked_fill takes several times as long.
    return 1.0 - (~picks.owned).float().reciprocal_()
