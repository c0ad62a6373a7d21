"""The loss over one rank's columns, forward and backward, by the CUDA kernels or in plain PyTorch; no autograd here.

Shapes: T tokens, K kept entries, n = V_pad/tp local vocabulary columns, V real vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from distill_pretrain.kernels.cuda.backend import Backend, launcher_for
from distill_pretrain.kernels.cuda.launcher import Launcher
from distill_pretrain.kernels.sparse_kd import launch, reference
from distill_pretrain.kernels.sparse_kd.coarse import Coarse, compare
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.picks import pick_columns
from distill_pretrain.kernels.sparse_kd.problem import SCALARS, Problem

ROW_NUMBERS = SCALARS
"""Floats per row that the forward pass leaves for the gradient, whatever computed it."""


class KernelSaved(NamedTuple):
    """What the kernels' gradient needs beside the logits.

    Attributes:
        scalars: fp32[T, 8], of `launch.combine`.
        picks: fp32[T, 1+K], logits of the label and the targets, of `launch.row_statistics`.
        subtracted: fp32[T, 1+K], what the label and the targets take off the gradient, of `launch.combine`.
    """

    scalars: torch.Tensor
    picks: torch.Tensor
    subtracted: torch.Tensor


class ReferenceSaved(NamedTuple):
    """What the reference's gradient needs beside the logits; other numbers than the kernels', in the same shapes.

    Attributes:
        numbers: fp32[T, 8]: three sums of `reference.row_sums`, lse, slope outside (`coarse`), zeros, and the maxima.
        picked: fp32[T, 1+K], shifted logits of the targets, of `reference.row_sums`.
        probs: fp32[T, 1+K], this rank's part of the targets, of `reference.row_sums`; or of the slopes by their logits.
    """

    numbers: torch.Tensor
    picked: torch.Tensor
    probs: torch.Tensor


Saved = KernelSaved | ReferenceSaved
"""The type says which backend made it, and so which one takes the gradient."""

SAVED: dict[Backend, type[Saved]] = {"cuda": KernelSaved, "reference": ReferenceSaved}


class Forward(NamedTuple):
    """The loss, and what its gradient needs beside the logits.

    Attributes:
        losses: fp32[T], weighted.
        terms: fp32[3, T]: those of `settings.TERMS`, unweighted.
        saved: for `gradient_`.
    """

    losses: torch.Tensor
    terms: torch.Tensor
    saved: Saved


def forward(logits: torch.Tensor, loss: Loss) -> Forward:
    """Compute the loss of logits [T, n]; with a group, every rank of it calls this."""
    if loss.backend == "reference":
        return _reference_forward(logits, loss)
    launcher, problem = _launcher(logits, loss), _problem(logits, loss)
    statistics, picks = launch.row_statistics(launcher, problem)
    if loss.form != "forward_kl":
        return _coarse_kernel_forward(_gathered(statistics, loss.group), picks, loss)
    combined = launch.combine(launcher, problem, _gathered(statistics, loss.group))
    saved = KernelSaved(combined.scalars, picks, combined.subtracted)
    return Forward(combined.losses, combined.terms, saved)


def gradient_(logits: torch.Tensor, loss: Loss, saved: Saved, grad_losses: torch.Tensor) -> None:
    """Write the gradient over the logits that `forward` read, for the incoming fp32[T]; no rank waits for another.

    What `forward` saved decides what computes it.
    """
    if isinstance(saved, ReferenceSaved):
        _reference_gradient_(logits, loss, saved, grad_losses)
        return
    launch.gradient_(
        _launcher(logits, loss),
        _problem(logits, loss),
        saved.picks,
        saved.scalars,
        saved.subtracted,
        grad_losses,
    )


def loss_and_gradient_(
    logits: torch.Tensor, loss: Loss, row_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss fp32[T] and terms fp32[3, T]; the logits become the gradient of the sum of loss * weights fp32[T].

    Without weights that is one read and one write on a GPU where rows are whole and fit.
    """
    is_plain = row_weights is None and loss.form == "forward_kl"
    if is_plain and loss.group is None and loss.backend == "cuda":
        problem, blocks = _problem(logits, loss), _blocks(logits.device)
        if launch.fits_fused(problem, blocks=blocks):
            return launch.fused_(_launcher(logits, loss), problem, blocks=blocks)
    seen = forward(logits, loss)
    weights = torch.ones_like(seen.losses) if row_weights is None else row_weights
    gradient_(logits, loss, seen.saved, weights)
    return seen.losses, seen.terms


def _launcher(logits: torch.Tensor, loss: Loss) -> Launcher:
    return launcher_for(launch.source_of(loss.settings), logits.device)


def _blocks(device: torch.device) -> launch.Blocks:
    """GPUs before compute capability 9.0 have no clusters of blocks."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return launch.Blocks(max_cluster=1)
    return launch.BLOCKS


def _ranks(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(group)  # type: ignore[arg-type]


def _rank(group: str | None) -> int:
    return 0 if group is None else dist.get_rank(_ranks(group))


def _all_reduce(
    values: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: str | None
) -> None:
    if group is not None:
        dist.all_reduce(values, op=operation, group=_ranks(group))


def _gathered(statistics: torch.Tensor, group: str | None) -> torch.Tensor:
    """fp32[ranks, T, 9] of all ranks."""
    if group is None:
        return statistics.unsqueeze(0)
    ranks = _ranks(group)
    size, (num_rows, width) = dist.get_world_size(ranks), statistics.shape
    every = statistics.new_empty(size * num_rows, width)
    dist.all_gather_into_tensor(every, statistics, group=ranks)
    return every.view(size, num_rows, width)


def _problem(logits: torch.Tensor, loss: Loss) -> Problem:
    return Problem(logits=logits, loss=loss, rank=_rank(loss.group))


def _real_columns(logits: torch.Tensor, loss: Loss) -> tuple[int, int]:
    """Global id of this rank's first column, and how many of its columns are no padding."""
    first = _rank(loss.group) * logits.size(-1)
    return first, max(0, min(logits.size(-1), loss.vocab_size - first))


def _reference_forward(logits: torch.Tensor, loss: Loss) -> Forward:
    first, num_columns = _real_columns(logits, loss)
    real = logits[:, :num_columns]
    maxima = reference.row_maxima(
        real, loss.targets, first_column=first, cap=loss.settings.logit_cap
    )
    _all_reduce(maxima, dist.ReduceOp.MAX, loss.group)
    sums, picked, probs = reference.row_sums(
        real,
        maxima,
        loss.labels,
        loss.targets,
        first_column=first,
        temperature=loss.row_temperature,
        cap=loss.settings.logit_cap,
    )
    _all_reduce(sums, dist.ReduceOp.SUM, loss.group)
    coarse = None
    if loss.form == "forward_kl":
        losses, terms, lse = reference.loss_and_terms(sums, maxima, loss)
    else:
        coarse, probs = _reference_coarse(real, maxima, sums, picked, loss, first=first)
        ce, lse = reference.label_terms(sums, maxima, loss)
        losses, terms = _with_coarse(coarse, ce, lse, loss)
    # The gradient needs the first three sums, and lse to which the others added.
    numbers = sums.new_zeros(len(sums), ROW_NUMBERS)
    numbers[:, :3], numbers[:, 3], numbers[:, -len(maxima) :] = sums[:, :3], lse, maxima.t()
    if coarse is not None:
        numbers[:, 4] = coarse.outside
    return Forward(losses, terms, ReferenceSaved(numbers, picked, probs))


def _reference_gradient_(
    logits: torch.Tensor, loss: Loss, saved: ReferenceSaved, grad_losses: torch.Tensor
) -> None:
    first, num_columns = _real_columns(logits, loss)
    sums, lse = saved.numbers[:, :3], saved.numbers[:, 3]
    has_bucket = loss.targets is not None and loss.targets.bucket is not None
    maxima = saved.numbers[:, -2:].t() if has_bucket else saved.numbers[:, -1:].t()
    if loss.form == "forward_kl":
        scalars = reference.row_scalars(sums, maxima, lse, loss)
    else:
        scalars = reference.coarse_scalars(sums, saved.numbers[:, 4], lse, loss)
    reference.gradient_(
        logits[:, :num_columns],
        maxima,
        sums,
        loss.labels,
        loss.targets,
        saved.picked,
        saved.probs,
        scalars,
        grad_losses,
        first_column=first,
        temperature=loss.row_temperature,
        cap=loss.settings.logit_cap,
    )
    logits[:, num_columns:] = 0


def _reference_coarse(
    real: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    picked: torch.Tensor,
    loss: Loss,
    *,
    first: int,
) -> tuple[Coarse, torch.Tensor]:
    """The distillation term, and fp32[T, 1+K] of its slopes by the targets' logits where they are this rank's."""
    assert loss.targets is not None
    slopes = torch.zeros_like(picked)
    kept = torch.zeros_like(picked[:, 1:])
    owned = torch.zeros_like(kept, dtype=torch.bool)
    if real.size(-1):
        columns = pick_columns(loss.targets.ids, first_column=first, num_columns=real.size(-1))
        owned = columns.owned
        kept = torch.where(owned, picked[:, 1:], 0.0)
    _all_reduce(kept, dist.ReduceOp.SUM, loss.group)
    # Relative to the row's maximum, as `picked` is.
    coarse = compare(kept, maxima[1] - maxima[0] + sums[:, 2].log(), loss)
    slopes[:, 1:] = torch.where(owned, coarse.kept, 0.0)
    return coarse, slopes


def _with_coarse(
    coarse: Coarse, ce: torch.Tensor, lse: torch.Tensor, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss fp32[T], and the unweighted terms fp32[3, T]."""
    settings, square = loss.settings, lse.square()
    losses = settings.ce_weight * ce + coarse.losses + settings.z_loss * square
    return losses, torch.stack((ce, coarse.values, square))


def _coarse_kernel_forward(statistics: torch.Tensor, picks: torch.Tensor, loss: Loss) -> Forward:
    """`launch.combine` of a loss over kept ids and a bucket, in plain PyTorch: the same bits on every rank.

    Args:
        statistics: fp32[ranks, T, 9] of all ranks, in rank order.
        picks: fp32[T, 1+K] of this rank's columns.
        loss: of the rows.
    """
    assert loss.targets is not None
    settings, labels, ids = loss.settings, loss.labels, loss.targets.ids
    # A logit is on one rank, and 0 on the others.
    _all_reduce(picks, dist.ReduceOp.SUM, loss.group)
    maxima, sums, _, outside_maxima, outsides, *_ = statistics.unbind(-1)
    largest, outside_largest = maxima.amax(0), outside_maxima.amax(0)
    base, outside_base = (x.masked_fill(x == -math.inf, 0.0) for x in (largest, outside_largest))
    log_sum = (sums * (maxima - base).exp()).sum(0).log()
    outside = (outsides * (outside_maxima - outside_base).exp()).sum(0)
    has_label = labels >= 0
    ce = torch.where(has_label, log_sum - (picks[:, 0] - base), 0.0)
    ce = ce.masked_fill(labels >= loss.vocab_size, math.nan)
    lse = torch.where(has_label, base + log_sum, 0.0)
    coarse = compare(
        picks[:, 1:] - base.unsqueeze(-1), outside_largest - base + outside.log(), loss
    )
    losses, terms = _with_coarse(coarse, ce, lse, loss)

    # RowScalars of sparse_kd.cuh: what is taken off at kept ids has all of their slope.
    at_label = settings.ce_weight * has_label.float()
    plain = (at_label + 2.0 * settings.z_loss * lse) * (-log_sum).exp()
    scalars = torch.zeros(len(labels), SCALARS, device=picks.device)
    scalars[:, 0], scalars[:, 3] = outside_base, base
    scalars[:, 1], scalars[:, 4] = plain * (outside_largest - base).exp(), plain
    scalars[:, 2] = coarse.outside / outside.clamp(min=1.0)
    is_label = (ids == labels.unsqueeze(-1)) & loss.targets.kept
    scalars[:, 7] = (has_label | loss.targets.kept.any(-1)).float()
    subtracted = torch.empty_like(picks)
    subtracted[:, 0] = torch.where(has_label & ~is_label.any(-1), at_label, -math.inf)
    at_kept = torch.where(is_label, at_label.unsqueeze(-1), 0.0) - coarse.kept
    subtracted[:, 1:] = at_kept.masked_fill(~loss.targets.kept, -math.inf)
    return Forward(losses, terms, KernelSaved(scalars, picks, subtracted))
