"""Cross-entropy + sparse forward KL from vocab-parallel logits: the local stages, in plain PyTorch.

The maths is in README.md beside this file. Collectives between the stages belong to `losses`.

Shapes: T tokens, K kept entries, V/tp local vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill_pretrain.contracts import SparseTargets


@dataclass(frozen=True, kw_only=True)
class Picks:
    """The 1 + K columns of each row that the loss reads: the label's first, then the targets'.

    Attributes:
        columns: int64[T, 1+K], local column, 0 where this rank does not own it.
        owned: bool[T, 1+K].
        weights: fp32[T, 1+K], what each pick subtracts from the gradient.
    """

    columns: torch.Tensor
    owned: torch.Tensor
    weights: torch.Tensor


def pick_columns(
    labels: torch.Tensor,
    targets: SparseTargets | None,
    *,
    ce_weight: float,
    kd_weight: float,
    first_column: int,
    num_columns: int,
) -> Picks:
    """Columns of this rank's slice [first_column, first_column + num_columns) that labels and targets name.

    Args:
        labels: int64[T]; negative means no label.
        targets: ids int64[T, K] padded with -1, probs fp32[T, K]; None for K = 0.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the KL.
        first_column: global id of the slice's first column.
        num_columns: real (unpadded) columns in the slice.
    """
    ids = labels.unsqueeze(-1)
    weights = (labels >= 0).unsqueeze(-1).float() * ce_weight
    if targets is not None:
        ids = torch.cat((ids, targets.ids), dim=-1)
        weights = torch.cat((weights, targets.probs * kd_weight), dim=-1)
    columns = ids - first_column
    owned = (columns >= 0) & (columns < num_columns)  # no id at all is negative, so never owned
    return Picks(columns=columns.masked_fill(~owned, 0), owned=owned, weights=weights)


def row_max(logits: torch.Tensor) -> torch.Tensor:
    """fp32[T]: largest logit of each row of [T, n]; -inf where n = 0."""
    if logits.size(-1) == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"), dtype=torch.float32)
    return logits.amax(dim=-1).float()


def shifted_sums(
    logits: torch.Tensor, maxima: torch.Tensor, picks: Picks
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(z - max) fp32[T, n], and its local sum beside the picked z - max, packed fp32[T, 2+K].

    The packed rows of all ranks add up: a pick is 0 where it is not owned.
    """
    shifted = logits.float() - maxima.unsqueeze(-1)
    if logits.size(-1) == 0:
        picked = torch.zeros_like(picks.weights)
    else:
        picked = shifted.gather(-1, picks.columns).masked_fill_(~picks.owned, 0.0)
    exponentials = shifted.exp_()
    return exponentials, torch.cat((exponentials.sum(-1, keepdim=True), picked), dim=-1)


def per_token_terms(
    sums: torch.Tensor, labels: torch.Tensor, targets: SparseTargets | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and KL per token, fp32[T] each, from the packed sums over all ranks.

    CE = lse - z_y, 0 without a label. KL = sum_i t_i (log t_i - log p_i), 0 without targets (METHOD: arXiv
    2503.16870, eq. 1, with the target's mass M <= 1 kept as it is).
    """
    log_sum = sums[:, 0].log()
    ce = torch.where(labels >= 0, log_sum - sums[:, 1], 0.0)
    if targets is None:
        return ce, torch.zeros_like(ce)
    log_probs = sums[:, 2:] - log_sum.unsqueeze(-1)
    kept = targets.ids >= 0
    entropy_term = torch.special.xlogy(targets.probs, targets.probs)
    cross_term = torch.where(kept, targets.probs * log_probs, 0.0)
    return ce, (entropy_term - cross_term).sum(-1)


def gradient_(
    exponentials: torch.Tensor,
    sum_exp: torch.Tensor,
    picks: Picks,
    grad_output: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the loss by the logits, fp32[T, n], written over `exponentials`.

    dL/dz_j = (w_ce [label] + w_kd M) p_j - w_ce [j = y] - w_kd t_j, times the incoming gradient of the row.
    """
    mass = picks.weights.sum(-1)
    exponentials.mul_((mass * grad_output / sum_exp).unsqueeze(-1))
    if exponentials.size(-1):
        at_picks = torch.where(picks.owned, -picks.weights * grad_output.unsqueeze(-1), 0.0)
        exponentials.scatter_add_(-1, picks.columns, at_picks)
    return exponentials
