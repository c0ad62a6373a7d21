"""Cross-entropy + sparse forward KL from vocab-parallel logits: the local stages, in plain PyTorch.

The maths is in README.md beside this file; comments here say which of its terms a line is. Collectives between the
stages belong to `stages`. Everything of a row is summed in fp32: a sum of bf16 stops growing at 256 times its terms.

Shapes: T tokens, K kept entries, n = V/tp local vocabulary columns, V real vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from distill_pretrain.kernels.sparse_kd.cap import cap_slope, soft_capped
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.picks import Picks, pick_columns, picked_logits, removed
from distill_pretrain.kernels.sparse_kd.targets import RowTargets

MAX_ENTRIES = 65536
"""Most entries K of a row that this backend takes."""

CHUNK_ELEMENTS = 1 << 18
"""Size of the temporary buffers: a few of them fit into a core's cache."""

NUM_SUMS = 6
"""Sums of a row: exp(s), exp(s/tau), exp(s/tau) outside the targets, s, s of the label, t s over the targets.

s is a logit less its row's maximum; in the third less the maximum outside the targets, or a student that is sure of a
target would leave nothing of the others."""


@dataclass(frozen=True, kw_only=True)
class RowScalars:
    """Everything of the gradient that is one number per row; see README.md.

    Attributes:
        at_one: fp32[T], A1: coefficient of softmax(z)_j.
        at_tau: fp32[T], A2: coefficient of softmax(z/tau)_j; with a bucket, of the same outside the targets, but with
            exp(s/tau) relative to the maximum there.
        at_tau_kept: fp32[T], A2 at the targets' columns; None where there is no bucket.
        floor: fp32[T], U: subtracted at every column; None for zero.
        at_label: fp32[T], subtracted at the label.
        at_target: fp32[T], subtracted at the targets, times their probability; None without targets.
    """

    at_one: torch.Tensor
    at_tau: torch.Tensor
    at_tau_kept: torch.Tensor | None
    floor: torch.Tensor | None
    at_label: torch.Tensor
    at_target: torch.Tensor | None


def row_maxima(
    logits: torch.Tensor, targets: RowTargets | None, *, first_column: int, cap: float = 0.0
) -> torch.Tensor:
    """Return the largest logit of each row of [T, n], and with a bucket the largest outside the targets.

    Either is -inf where there is none. Of capped logits they are the capped largest ones.

    Returns:
        fp32[1, T]; with a bucket fp32[2, T], so that the last one is what the columns outside are relative to.
    """
    num_rows, num_columns = logits.shape
    has_bucket = targets is not None and targets.bucket is not None
    if num_columns == 0:
        return logits.new_full((1 + has_bucket, num_rows), -math.inf, dtype=torch.float32)
    largest = soft_capped(logits.amax(dim=-1), cap)
    if targets is None or not has_bucket:
        return largest.unsqueeze(0)
    picks = pick_columns(targets.ids, first_column=first_column, num_columns=num_columns)
    without = removed(picks).to(logits.dtype)
    outside = torch.empty_like(largest)
    for rows in _row_chunks(logits):
        others = logits[rows].scatter_add(-1, picks.columns[rows], without[rows])
        outside[rows] = others.amax(-1)
    return torch.stack((largest, soft_capped(outside, cap)))


def row_sums(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    labels: torch.Tensor,
    targets: RowTargets | None,
    *,
    first_column: int,
    temperature: float,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute this rank's part of the row's sums, fp32[T, 6] as `NUM_SUMS` says; those that no target needs are 0.

    Args:
        logits: [T, n], real columns.
        maxima: fp32[1 or 2, T] of `row_maxima`, over all ranks.
        labels: int64[T]; negative means no label.
        targets: None for K = 0.
        first_column: global id of the first column.
        temperature: tau.
        cap: of the logits, or 0.

    Returns:
        The sums; and for the gradient, fp32[T, 1+K], of each target from the second column on: s = z - max, left out
        where no target has a bucket and another column's where this rank does not own the target, and the target's
        probability, 0 where this rank does not own it.
    """
    num_columns = logits.size(-1)
    outside = targets is not None and targets.bucket is not None
    total = targets is not None and targets.floor is not None
    largest, base = maxima[0], _base(maxima)
    packed = maxima.new_zeros(len(logits), NUM_SUMS)
    shape = (len(logits), 1 + (0 if targets is None else targets.ids.size(-1)))
    picked, probs = maxima.new_zeros(shape), maxima.new_zeros(shape)
    if num_columns == 0:
        return packed, picked, probs
    picks = pick_columns(labels.unsqueeze(-1), first_column=first_column, num_columns=num_columns)
    packed[:, 4] = torch.where(picks.owned, picked_logits(logits, largest, picks, cap), 0.0)[:, 0]
    if targets is not None:
        picks = pick_columns(targets.ids, first_column=first_column, num_columns=num_columns)
        at_targets = picked_logits(logits, largest, picks, cap)
        torch.mul(targets.probs, picks.owned, out=probs[:, 1:])
        if outside:
            picked[:, 1:] = at_targets
        # A probability of 0 is no target, even of a logit that is -inf; torch.where takes several times as long.
        packed[:, 5] = at_targets.mul_(probs[:, 1:]).nansum(-1)
    # With a bucket `base` is m_o, the maximum outside the targets: sums of those columns are exact there, however far
    # below the row's maximum m they lie. They are moved to m at the end, where the targets' own terms join them.
    for rows in _row_chunks(logits):
        exponentials = _shifted(logits[rows], base[rows], cap)
        if outside:
            # What is above 0 is a target's, which `_sum` takes out.
            exponentials.clamp_(max=0.0)
        if total:
            packed[rows, 3] = exponentials.sum(-1)
        others = picks.of_rows(rows) if outside else None
        if temperature != 1.0:
            packed[rows, 0] = _sum(exponentials.exp(), others)
            exponentials.div_(temperature)
        packed[rows, 1] = _sum(exponentials.exp_(), others)
    if temperature == 1.0:
        packed[:, 0] = packed[:, 1]
    if outside:
        packed[:, 2] = packed[:, 1]
        for column, tau in ((0, 1.0), (1, temperature)):
            inside = (picked[:, 1:] / tau).exp_().mul_(picks.owned).sum(-1)
            packed[:, column] = packed[:, column] * _lowered(maxima, tau) + inside
    return packed, picked, probs


def label_terms(
    sums: torch.Tensor, maxima: torch.Tensor, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy lse - z_y, and lse, of each row with a label, fp32[T] each; 0 without one.

    The cross-entropy of a label at or beyond the vocabulary is NaN, as in the kernels.
    """
    has_label = loss.labels >= 0
    log_sum = sums[:, 0].log()
    ce = torch.where(has_label, log_sum - sums[:, 4], 0.0)
    ce = ce.masked_fill(loss.labels >= loss.vocab_size, math.nan)
    return ce, torch.where(has_label, log_sum + maxima[0], 0.0)


def sparse_kl(
    sums: torch.Tensor, maxima: torch.Tensor, targets: RowTargets, loss: Loss
) -> torch.Tensor:
    """Compute KL(target || student at temperature tau) per token, fp32[T], from all ranks' packed sums and maxima.

    sum_j T_j (log T_j - log q_j), q = softmax(z/tau), over all ids, or over the kept ids and one bucket of the
    others (arXiv 2503.16870, eq. 1, with a target's mass below 1 kept as it is); 0 without targets. NaN where
    an id is at or beyond the vocabulary, as in the kernels.
    """
    floor, probs = targets.floor, targets.probs
    temperature, vocab_size = loss.settings.temperature, loss.vocab_size
    # log q_j = s_j / tau - log_sum with s = z - max, so that sum_j T_j log q_j is the sum of T s / tau less log_sum
    # times the mass of T; t is the part of T at the kept ids, u (the floor) the part at every id.
    log_sum = sums[:, 1].log()
    at_kept = probs
    if floor is not None:
        at_kept = probs + torch.where(targets.kept, floor.unsqueeze(-1), 0.0)
    mass = probs.sum(-1)
    cross = torch.where(mass > 0, sums[:, 5] / temperature - mass * log_sum, 0.0)
    # T log T at the kept ids, of which 0 log 0 is 0; below that of u at the others. torch.special.entr and xlogy take
    # three to four times as long on CPUs, where they are not vectorised.
    logs = at_kept.clamp(min=torch.finfo(at_kept.dtype).tiny).log_()
    kl: torch.Tensor = logs.mul_(at_kept).sum(-1) - cross
    if floor is not None:
        others = vocab_size - targets.kept.sum(-1)
        all_log_probs = sums[:, 3] / temperature - vocab_size * log_sum
        kl = kl + others * torch.special.xlogy(floor, floor)
        kl = kl - torch.where(floor > 0, floor * all_log_probs, 0.0)
    if targets.bucket is not None:
        # R (log R - log(1 - P_K)); 1 - P_K is the sum outside, exp((m_o - m) / tau) O, over the whole: no difference.
        bucket = targets.bucket
        log_outside = _distance(maxima) / temperature + sums[:, 2].log()
        kl = kl + torch.special.xlogy(bucket, bucket)
        kl = kl - torch.where(bucket > 0, bucket * (log_outside - log_sum), 0.0)
    # The largest id of a row says it; a row's maximum costs an eighth of what comparing each and asking for any does.
    if targets.ids.size(-1):
        kl = kl.masked_fill(targets.ids.amax(-1) >= vocab_size, math.nan)
    return kl


def loss_and_terms(
    sums: torch.Tensor, maxima: torch.Tensor, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the weighted loss fp32[T], the unweighted `settings.TERMS` fp32[3, T], and lse fp32[T].

    Args:
        sums: packed, over all ranks.
        maxima: fp32[1 or 2, T], over all ranks.
        loss: of the rows.
    """
    settings, targets = loss.settings, loss.targets
    ce, lse = label_terms(sums, maxima, loss)
    losses = settings.ce_weight * ce
    kl = torch.zeros_like(ce)
    if targets is not None:
        assert loss.kd_scale is not None
        kl = sparse_kl(sums, maxima, targets, loss)
        losses = losses + loss.kd_scale * kl
    if settings.z_loss:
        losses = losses + settings.z_loss * lse.square()
    return losses, torch.stack((ce, kl, lse.square())), lse


def row_scalars(
    sums: torch.Tensor, maxima: torch.Tensor, lse: torch.Tensor, loss: Loss
) -> RowScalars:
    """Compute the gradient's coefficients of each row.

    Args:
        sums: packed, over all ranks.
        maxima: fp32[1 or 2, T], over all ranks.
        lse: fp32[T], 0 without a label.
        loss: of the rows.
    """
    settings, targets = loss.settings, loss.targets
    at_label = (loss.labels >= 0).float() * settings.ce_weight
    at_one = at_label + 2.0 * settings.z_loss * lse if settings.z_loss else at_label
    if targets is None:
        return RowScalars(
            at_one=at_one,
            at_tau=torch.zeros_like(at_label),
            at_tau_kept=None,
            floor=None,
            at_label=at_label,
            at_target=None,
        )
    assert loss.kd_scale is not None
    # dKL/dz_j = (q_j sum T - T_j) / tau: the derivative of -sum_i T_i log q_i at logits that enter as z / tau.
    weight = loss.kd_scale / settings.temperature
    mass, floor, at_tau_kept = targets.probs.sum(-1), None, None
    if targets.floor is not None:
        mass = mass + loss.vocab_size * targets.floor
        floor = weight * targets.floor
    at_tau = weight * mass
    if targets.bucket is not None:
        lowered = _lowered(maxima, settings.temperature)
        at_tau_kept = weight * (mass + targets.bucket)
        # P_K / (1 - P_K) is I / (exp((m_o - m) / tau) O), and q_j outside has that exponential as a factor: it cancels
        # in R's term, so that no small number divides. Where there are other columns, one of them is exp(0) of O.
        odds = (sums[:, 1] - sums[:, 2] * lowered) / sums[:, 2].clamp(min=1.0)
        at_tau = at_tau * lowered - weight * targets.bucket * odds
    return RowScalars(
        at_one=at_one,
        at_tau=at_tau,
        at_tau_kept=at_tau_kept,
        floor=floor,
        at_label=at_label,
        at_target=weight,
    )


def coarse_scalars(
    sums: torch.Tensor, outside: torch.Tensor, lse: torch.Tensor, loss: Loss
) -> RowScalars:
    """Return the coefficients of a loss over kept ids and a bucket, whose slopes stand in the place of `probs`.

    Args:
        sums: packed, over all ranks.
        outside: fp32[T], slope of the loss by the log of the sum outside.
        lse: fp32[T], 0 without a label.
        loss: of the rows.
    """
    at_label = (loss.labels >= 0).float() * loss.settings.ce_weight
    return RowScalars(
        at_one=at_label + 2.0 * loss.settings.z_loss * lse,
        # Of exp(s) / sum outside; `gradient_` divides by the sum of the row.
        at_tau=outside * sums[:, 1] / sums[:, 2].clamp(min=1.0),
        at_tau_kept=torch.zeros_like(at_label),
        floor=None,
        at_label=at_label,
        at_target=-torch.ones_like(at_label),
    )


def gradient_(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    labels: torch.Tensor,
    targets: RowTargets | None,
    picked: torch.Tensor,
    probs: torch.Tensor,
    scalars: RowScalars,
    grad_output: torch.Tensor,
    *,
    first_column: int,
    temperature: float,
    cap: float = 0.0,
) -> None:
    """Compute the gradient of the loss by the logits [T, n] in fp32, and write it over them.

    dL/dz_j = A1 softmax(z)_j + A2 softmax(z/tau)_j - U - label - targets, times the incoming gradient fp32[T] of the
    row. Arguments as of `row_sums` and what that returned, summed over all ranks.
    """
    num_columns = logits.size(-1)
    if num_columns == 0:
        return
    # The coefficients of exp(s) and exp(s / tau): A1 and A2 over the sums that make probabilities of them.
    base = _base(maxima)
    at_one = scalars.at_one * grad_output / sums[:, 0]
    at_tau = scalars.at_tau * grad_output / sums[:, 1]
    label = pick_columns(labels.unsqueeze(-1), first_column=first_column, num_columns=num_columns)
    at_label = label.owned * (-scalars.at_label * grad_output).unsqueeze(-1)
    if targets is not None:
        assert scalars.at_target is not None
        picks = pick_columns(targets.ids, first_column=first_column, num_columns=num_columns)
        at_targets = (-scalars.at_target * grad_output).unsqueeze(-1) * probs[:, 1:]
        if scalars.at_tau_kept is not None:
            at_tau_kept = scalars.at_tau_kept * grad_output / sums[:, 1]
            shifted = picked[:, 1:]
            inside = at_one.unsqueeze(-1) * shifted.exp()
            inside += at_tau_kept.unsqueeze(-1) * (shifted / temperature).exp()
            at_targets += torch.where(picks.owned, inside, 0.0)
            # Relative to the other columns' maximum the targets may be infinite: they start from exp(-inf).
            without = removed(picks)
            at_one = at_one * _lowered(maxima)
    at_both = (at_one + at_tau).unsqueeze(-1)
    for rows in _row_chunks(logits):
        chunk = logits[rows]
        in_place = chunk.dtype == torch.float32 and not cap
        shifted = (
            chunk.sub_(base[rows].unsqueeze(-1)) if in_place else _shifted(chunk, base[rows], cap)
        )
        if scalars.at_tau_kept is not None:
            shifted.scatter_add_(-1, picks.columns[rows], without[rows])
        if temperature == 1.0:
            gradient = shifted.exp_().mul_(at_both[rows])
        else:
            plain = shifted.exp().mul_(at_one[rows].unsqueeze(-1))
            gradient = shifted.div_(temperature).exp_().mul_(at_tau[rows].unsqueeze(-1)).add_(plain)
        if scalars.floor is not None:
            gradient.sub_((scalars.floor[rows] * grad_output[rows]).unsqueeze(-1))
        gradient.scatter_add_(-1, label.columns[rows], at_label[rows])
        if targets is not None:
            gradient.scatter_add_(-1, picks.columns[rows], at_targets[rows])
        if cap:
            gradient.mul_(cap_slope(soft_capped(chunk, cap), cap))
        if not in_place:
            chunk.copy_(gradient)


def _shifted(logits: torch.Tensor, maxima: torch.Tensor, cap: float) -> torch.Tensor:
    """Logits minus their row's maximum in fp32, a new tensor."""
    return torch.sub(soft_capped(logits, cap), maxima.unsqueeze(-1))


def _sum(exponentials: torch.Tensor, without: Picks | None) -> torch.Tensor:
    """fp32[T]: sum of [T, n], where the picks' columns that this rank owns become zero: a difference would cancel."""
    if without is not None:
        taken = exponentials.gather(-1, without.columns).mul_(without.owned).neg_()
        exponentials.scatter_add_(-1, without.columns, taken)
    return exponentials.sum(-1)


def _base(maxima: torch.Tensor) -> torch.Tensor:
    """fp32[T]: what the logits outside the targets are relative to; 0 where there are none."""
    last = maxima[-1]
    return last if len(maxima) == 1 else last.masked_fill(last == -math.inf, 0.0)


def _distance(maxima: torch.Tensor) -> torch.Tensor:
    """fp32[T]: how far the largest logit outside the targets is from the row's, at most 0."""
    return maxima[-1] - maxima[0]


def _lowered(maxima: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """fp32[T]: takes sums relative to the largest logit outside the targets to the row's maximum."""
    return (_distance(maxima) / temperature).exp()


def _row_chunks(rows: torch.Tensor) -> Iterator[slice[int]]:
    """Slices of [T, n] along T whose temporaries stay small."""
    size = max(1, CHUNK_ELEMENTS // max(1, rows.size(-1)))
    return (slice(first, first + size) for first in range(0, len(rows), size))
