"""Losses over the kept ids and one bucket of all others: decoupled KL, reverse KL, Jensen-Shannon.

They need nothing of a row but the logits of its kept ids, and the sum of exponentials outside: what the stages over
[T, V/tp] give with a bucket. So all of this is [T, K + 1], in plain PyTorch on any device, and the gradient is one
number for all columns outside and one for every kept id. The maths is in README.md beside this file.

Shapes: T tokens, K kept entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from distill_pretrain.kernels.sparse_kd.divergences import DIVERGENCES
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.targets import MASS_ROUNDING


class Coarse(NamedTuple):
    """The distillation term of some rows.

    Attributes:
        losses: fp32[T], weighted.
        values: fp32[T], what is reported.
        kept: fp32[T, K], slope of `losses` by the logit of every kept id; 0 where there is none.
        outside: fp32[T], slope by the log of the sum of exponentials outside.
    """

    losses: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor
    outside: torch.Tensor


def compare(logits: torch.Tensor, log_outside: torch.Tensor, loss: Loss) -> Coarse:
    """Compare student and target over kept ids and bucket.

    Args:
        logits: fp32[T, K] of the kept ids, less any number that is the same in a row; not read where there is no id.
        log_outside: fp32[T], log of the sum of the exponentials of all other logits, less the same; -inf for none.
        loss: of the rows; its targets have a bucket.
    """
    targets, scale = loss.targets, loss.kd_scale
    assert targets is not None and targets.bucket is not None and scale is not None
    has_target = (targets.probs.sum(-1) > 0).unsqueeze(-1)
    kept = targets.kept & has_target
    # Rows without a target compare the bucket with itself.
    every = torch.cat((logits.masked_fill(~kept, -math.inf), log_outside.unsqueeze(-1)), -1)
    every[:, -1:] = torch.where(has_target, every[:, -1:], 0.0)
    log_q = every.log_softmax(-1)
    if loss.form == "decoupled":
        found = _decoupled(logits.masked_fill(~kept, -math.inf), log_q, loss)
    else:
        found = _divergence(log_q, loss)
    found = Coarse(*(torch.where(has_target.view(-1, *[1] * (x.ndim - 1)), x, 0.0) for x in found))
    is_wrong = (targets.ids >= loss.vocab_size).any(-1)
    return found._replace(
        losses=found.losses.masked_fill(is_wrong, math.nan),
        values=found.values.masked_fill(is_wrong, math.nan),
    )


def _divergence(log_q: torch.Tensor, loss: Loss) -> Coarse:
    """Reverse KL or Jensen-Shannon of K + 1 categories."""
    targets, scale = loss.targets, loss.kd_scale
    assert targets is not None and targets.bucket is not None and scale is not None
    probs, bucket = targets.probs, targets.bucket
    if loss.form == "reverse_kl":
        # Of a target that lacks less than fp32 tells there is something left all the same: log 0 would be infinite.
        bucket = bucket.clamp(min=MASS_ROUNDING)
        probs = probs.clamp(min=torch.finfo(probs.dtype).tiny)
    log_t = torch.cat((probs, bucket.unsqueeze(-1)), -1).log()
    values, slope = DIVERGENCES[loss.form](log_q, log_t, lambda terms: terms.sum(-1))
    slope = slope * scale.unsqueeze(-1)
    return Coarse(scale * values, values, slope[:, :-1], slope[:, -1])


def _decoupled(logits: torch.Tensor, log_q: torch.Tensor, loss: Loss) -> Coarse:
    """Kept or not, untempered; and which of the kept ids, tempered."""
    targets, scale, settings = loss.targets, loss.kd_scale, loss.settings
    assert targets is not None and targets.bucket is not None and scale is not None
    probs, bucket, tau = targets.probs, targets.bucket, settings.temperature
    mass = probs.sum(-1)
    log_inside, log_outside = log_q[:, :-1].logsumexp(-1), log_q[:, -1]
    binary = torch.special.xlogy(mass, mass) - mass * log_inside
    binary += torch.special.xlogy(bucket, bucket)
    binary -= torch.where(bucket > 0, bucket * log_outside, 0.0)
    target, student = (probs.log() / tau).log_softmax(-1), (logits / tau).log_softmax(-1)
    shares = target.exp()
    among_kept = mass * torch.where(shares > 0, shares * (target - student), 0.0).sum(-1)

    tail = settings.tail_weight
    at_tail = scale * (tail / tau**2 if settings.temperature_squared else tail)
    # What is missing outside, R - (1 - P_K): exact where both are small, as M - P_K is not.
    lacking = at_tail * (bucket - log_outside.exp() * (mass + bucket))
    slope = (student.exp() - shares) * (scale * mass / tau).unsqueeze(-1)
    slope += (log_q[:, :-1] - log_inside.unsqueeze(-1)).exp() * lacking.unsqueeze(-1)
    return Coarse(
        at_tail * binary + scale * among_kept, tail * binary + among_kept, slope, -lacking
    )
