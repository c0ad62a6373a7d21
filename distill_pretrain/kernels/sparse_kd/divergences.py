"""Divergences of a student's distribution q from a target t, and their slopes by the student's logits.

Shapes: R rows, n categories.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# With u = z / tau, d log q_i / du_j = [i = j] - q_j. A sum over i of q_i f_i thus has the derivative
# q_j (f_j - sum_i q_i f_i) by the q in front, and what f brings: below sum_i q_i df_i / du_j is 0 or cancels.
RowSum = Callable[[torch.Tensor], torch.Tensor]


def forward_kl(
    log_q: torch.Tensor, log_t: torch.Tensor, row_sum: RowSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D = sum t (log t - log q) and dD/du = q - t, u = z / tau."""
    t = log_t.exp()
    values = row_sum(torch.where(t > 0, t * (log_t - log_q), 0.0))
    return values, log_q.exp() - t


def reverse_kl(
    log_q: torch.Tensor, log_t: torch.Tensor, row_sum: RowSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D = sum q (log q - log t) and dD/du = q (log q - log t - D), u = z / tau."""
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_t), 0.0)
    values = row_sum(terms)
    return values, terms - q * values.unsqueeze(-1)


def jensen_shannon(
    log_q: torch.Tensor, log_t: torch.Tensor, row_sum: RowSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D = (KL(t || m) + KL(q || m)) / 2, m = (q + t) / 2, and dD/du = q (log q - log m - KL(q || m)) / 2."""
    log_m = torch.logaddexp(log_q, log_t) - math.log(2.0)
    q, t = log_q.exp(), log_t.exp()
    from_student = torch.where(q > 0, q * (log_q - log_m), 0.0)
    from_teacher = torch.where(t > 0, t * (log_t - log_m), 0.0)
    of_student = row_sum(from_student)
    values = 0.5 * (of_student + row_sum(from_teacher))
    return values, 0.5 * (from_student - q * of_student.unsqueeze(-1))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""Name -> value fp32[R] and slope fp32[R, n] of log q, log t fp32[R, n] and what sums a row over all ranks."""
