"""Cross-entropy + sparse forward KL from vocab-parallel logits: the local stages, in plain PyTorch.

The maths is in README.md beside this file. Collectives between the stages belong to `losses`.

Shapes: T tokens, K kept entries, n = V/tp local vocabulary columns, V real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from distill_pretrain.kernels.sparse_kd.targets import RowTargets

MAX_ENTRIES = 65536
"""Most entries K of a row that this backend takes."""

CHUNK_ELEMENTS = 1 << 22
"""Size of the temporary buffers of the paths that need one."""

LEAST_OUTSIDE = 1e-30
"""The student's mass outside the kept ids, relative to its likeliest id, counts as no less: fp32 ends there."""

FIRST_PICK = 4
"""Columns of the packed sums before the picks: sum exp(s), sum exp(s/tau), the same outside the targets, sum s."""


@dataclass(frozen=True, kw_only=True)
class Picks:
    """The 1 + K columns of each row that the loss reads: the label's first, then the targets'.

    Attributes:
        columns: int64[T, 1+K], local column, 0 where this rank does not own it.
        owned: bool[T, 1+K].
    """

    columns: torch.Tensor
    owned: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RowScalars:
    """Everything of the gradient that is one number per row, or per pick; see README.md.

    Attributes:
        at_one: fp32[T], A1: coefficient of softmax(z)_j.
        at_tau: fp32[T], A2: coefficient of softmax(z/tau)_j; at the targets' columns `at_tau_kept` takes its place.
        at_tau_kept: fp32[T]; None where it is the same.
        floor: fp32[T], U: subtracted at every column; None for zero.
        at_picks: fp32[T, 1+K], what each pick subtracts.
    """

    at_one: torch.Tensor
    at_tau: torch.Tensor
    at_tau_kept: torch.Tensor | None
    floor: torch.Tensor | None
    at_picks: torch.Tensor


def pick_columns(
    labels: torch.Tensor, targets: RowTargets | None, *, first_column: int, num_columns: int
) -> Picks:
    """Columns of this rank's slice [first_column, first_column + num_columns) that labels and targets name.

    Args:
        labels: int64[T]; negative means no label.
        targets: None for K = 0.
        first_column: global id of the slice's first column.
        num_columns: real (unpadded) columns in the slice.
    """
    ids = labels.unsqueeze(-1)
    if targets is not None:
        ids = torch.cat((ids, targets.ids), dim=-1)
    columns = ids - first_column
    owned = (columns >= 0) & (columns < num_columns)  # no id at all is negative, so never owned
    return Picks(columns=columns.masked_fill(~owned, 0), owned=owned)


def row_max(logits: torch.Tensor) -> torch.Tensor:
    """fp32[T]: largest logit of each row of [T, n]; -inf where n = 0."""
    if logits.size(-1) == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"), dtype=torch.float32)
    return logits.amax(dim=-1).float()


def row_sums(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    picks: Picks,
    *,
    temperature: float,
    outside: bool,
    total: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradient starts from, and the row's local sums.

    Args:
        logits: [T, n], real columns.
        maxima: fp32[T], over all ranks.
        picks: label and targets.
        temperature: tau.
        outside: whether to sum exp(s/tau) over the columns that no target names.
        total: whether to sum s.

    Returns:
        fp32[T, n]: exp(s), or s itself where tau != 1, with s = z - max; and the sums, packed fp32[T, 4+1+K] as
        `FIRST_PICK` says, with s of each pick at the end. The packed rows of all ranks add up: a pick is 0 where it
        is not owned.
    """
    shifted = logits.float() - maxima.unsqueeze(-1)
    packed = shifted.new_zeros(len(shifted), FIRST_PICK + picks.columns.size(-1))
    if logits.size(-1) == 0:
        return shifted, packed
    picked = shifted.gather(-1, picks.columns).masked_fill_(~picks.owned, 0.0)
    packed[:, FIRST_PICK:] = picked
    if total:
        packed[:, 3] = shifted.sum(-1)
    if temperature == 1.0:
        base = shifted.exp_()
        packed[:, 0] = packed[:, 1] = base.sum(-1)
        if outside:
            packed[:, 2] = _outside_sum(base, picks)
        return base, packed
    for rows in _row_chunks(shifted):
        packed[rows, 0] = shifted[rows].exp().sum(-1)
        tempered = (shifted[rows] / temperature).exp_()
        packed[rows, 1] = tempered.sum(-1)
        if outside:
            chunk = Picks(columns=picks.columns[rows], owned=picks.owned[rows])
            packed[rows, 2] = _outside_sum(tempered, chunk)
    return shifted, packed


def label_terms(
    sums: torch.Tensor, maxima: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy lse - z_y, and lse, of each row with a label, fp32[T] each; 0 without one."""
    has_label = labels >= 0
    log_sum = sums[:, 0].log()
    ce = torch.where(has_label, log_sum - sums[:, FIRST_PICK], 0.0)
    return ce, torch.where(has_label, log_sum + maxima, 0.0)


def sparse_kl(
    sums: torch.Tensor, targets: RowTargets, *, temperature: float, vocab_size: int
) -> torch.Tensor:
    """KL(target || student at temperature tau) per token, fp32[T], from the packed sums over all ranks.

    sum_j T_j (log T_j - log q_j), q = softmax(z/tau), over all ids, or over the kept ids and one bucket of the
    others (arXiv 2503.16870, eq. 1, with a target's mass below 1 kept as it is); 0 without targets.
    """
    kept, floor = targets.kept, targets.floor
    log_sum = sums[:, 1].log()
    log_probs = sums[:, FIRST_PICK + 1 :] / temperature - log_sum.unsqueeze(-1)
    probs = targets.probs
    at_kept = probs if floor is None else probs + torch.where(kept, floor.unsqueeze(-1), 0.0)
    cross = torch.where(kept, probs * log_probs, 0.0)
    kl = (torch.special.xlogy(at_kept, at_kept) - cross).sum(-1)
    if floor is not None:
        others = vocab_size - kept.sum(-1)
        all_log_probs = sums[:, 3] / temperature - vocab_size * log_sum
        kl = kl + others * torch.special.xlogy(floor, floor)
        kl = kl - torch.where(floor > 0, floor * all_log_probs, 0.0)
    if targets.bucket is not None:
        bucket = targets.bucket
        kl = kl + torch.special.xlogy(bucket, bucket)
        kl = kl - bucket * (_outside(sums).log() - log_sum)
    return kl


def row_scalars(
    sums: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    targets: RowTargets | None,
    *,
    ce_weight: float,
    kd_weight: torch.Tensor | float,
    z_loss: float,
    temperature: float,
    vocab_size: int,
) -> RowScalars:
    """The gradient's coefficients.

    Args:
        sums: packed, over all ranks.
        labels: int64[T].
        lse: fp32[T], 0 without a label.
        targets: of the KL, or None.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the KL, a number or fp32[T].
        z_loss: weight of lse^2.
        temperature: tau.
        vocab_size: V.
    """
    at_label = (labels >= 0).float() * ce_weight
    at_one = at_label + 2.0 * z_loss * lse if z_loss else at_label
    if targets is None:
        zero = torch.zeros_like(at_label)
        return RowScalars(
            at_one=at_one,
            at_tau=zero,
            at_tau_kept=None,
            floor=None,
            at_picks=at_label.unsqueeze(-1),
        )
    weight = torch.as_tensor(kd_weight, device=sums.device).expand_as(at_label) / temperature
    mass, floor, at_tau_kept = targets.probs.sum(-1), None, None
    if targets.floor is not None:
        mass = mass + vocab_size * targets.floor
        floor = weight * targets.floor
    at_tau = weight * mass
    if targets.bucket is not None:
        inside = sums[:, 1] - sums[:, 2]
        at_tau_kept = weight * (mass + targets.bucket)
        at_tau = at_tau - weight * targets.bucket * inside / _outside(sums)
    at_targets = weight.unsqueeze(-1) * targets.probs
    return RowScalars(
        at_one=at_one,
        at_tau=at_tau,
        at_tau_kept=at_tau_kept,
        floor=floor,
        at_picks=torch.cat((at_label.unsqueeze(-1), at_targets), -1),
    )


def gradient_(
    base: torch.Tensor,
    sums: torch.Tensor,
    picks: Picks,
    scalars: RowScalars,
    grad_output: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """Gradient of the loss by the logits, fp32[T, n], written over what `row_sums` returned.

    dL/dz_j = A1 softmax(z)_j + A2 softmax(z/tau)_j - U - picks, times the incoming gradient fp32[T] of the row.
    """
    if base.size(-1) == 0:
        return base
    at_one = scalars.at_one * grad_output / sums[:, 0]
    at_tau = scalars.at_tau * grad_output / sums[:, 1]
    at_picks = -scalars.at_picks * grad_output.unsqueeze(-1)
    if scalars.at_tau_kept is not None:
        # Where the student is sure, A2 outside the targets is too large to be taken back at them: they start from 0.
        gone = -base.gather(-1, picks.columns) if temperature == 1.0 else float("-inf")
        _add_at_targets(base, picks, gone)
        shifted = sums[:, FIRST_PICK + 1 :]
        at_tau_kept = scalars.at_tau_kept * grad_output / sums[:, 1]
        at_picks[:, 1:] += at_one.unsqueeze(-1) * shifted.exp()
        at_picks[:, 1:] += at_tau_kept.unsqueeze(-1) * (shifted / temperature).exp()
    if temperature == 1.0:
        base.mul_((at_one + at_tau).unsqueeze(-1))
    else:
        for rows in _row_chunks(base):
            chunk = base[rows]
            plain = chunk.exp().mul_(at_one[rows].unsqueeze(-1))
            chunk.div_(temperature).exp_().mul_(at_tau[rows].unsqueeze(-1)).add_(plain)
    if scalars.floor is not None:
        base.sub_((scalars.floor * grad_output).unsqueeze(-1))
    return base.scatter_add_(-1, picks.columns, torch.where(picks.owned, at_picks, 0.0))


def _outside(sums: torch.Tensor) -> torch.Tensor:
    """fp32[T]: sum of exp(s/tau) outside the targets, over all ranks."""
    return sums[:, 2].clamp(min=LEAST_OUTSIDE)


def _outside_sum(exponentials: torch.Tensor, picks: Picks) -> torch.Tensor:
    """fp32[T]: row sums over the columns that no target names, without the cancellation of a difference."""
    kept = exponentials.gather(-1, picks.columns)
    _add_at_targets(exponentials, picks, -kept)
    outside = exponentials.sum(-1)
    _add_at_targets(exponentials, picks, kept)
    return outside


def _add_at_targets(rows: torch.Tensor, picks: Picks, values: torch.Tensor | float) -> None:
    """Add `values` [T, 1+K] to the owned targets' columns of [T, n], in place; the label's is left alone."""
    owned = picks.owned[:, 1:]
    if isinstance(values, torch.Tensor):
        added = torch.where(owned, values[:, 1:], 0.0)
    else:
        added = torch.zeros_like(owned, dtype=rows.dtype).masked_fill_(owned, values)
    rows.scatter_add_(-1, picks.columns[:, 1:], added)


def _row_chunks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices of [T, n] along T whose temporaries stay small."""
    size = max(1, CHUNK_ELEMENTS // max(1, rows.size(-1)))
    return (slice(first, first + size) for first in range(0, len(rows), size))
