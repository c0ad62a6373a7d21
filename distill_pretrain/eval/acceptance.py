"""Speculative decoding with a student that drafts for the teacher, from exact per-position acceptance rates.

Shapes: B sequences, L positions, V vocabulary, R rounds (windows of k consecutive positions).
"""

from __future__ import annotations

import torch


def acceptance_rates(teacher_probs: torch.Tensor, student_probs: torch.Tensor) -> torch.Tensor:
    """Compute the probability that the teacher accepts a token drafted from the student.

    Leviathan et al. 2023, theorem 3.5: it is the mass that the two distributions share.

    Args:
        teacher_probs: float32[T, V].
        student_probs: float32[T, V]; overwritten.

    Returns:
        float64[T]: sum_i min(t_i, p_i).
    """
    torch.minimum(teacher_probs, student_probs, out=student_probs)
    return student_probs.sum(-1, dtype=torch.float64)


def accepted_drafts(rates: torch.Tensor, known: torch.Tensor, k: int) -> torch.Tensor:
    """Sum the expected number of accepted drafts over every round of k drafts that fits into a sequence.

    A round stands at k consecutive positions of the text with rates a_1 .. a_k; it is expected to accept
    sum_{j=1..k} prod_{i<=j} a_i drafts. The drafts follow the held-out text, not text sampled from the student, and
    the token that the teacher adds itself at the end of a round (+1) is not counted.

    Args:
        rates: float64[B, L].
        known: bool[B, L], positions that have a rate; a round of which any has none is left out.
        k: drafts per round.

    Returns:
        float64[B, 2]: accepted drafts, and rounds R of each sequence.
    """
    if k > rates.shape[1]:
        return rates.new_zeros(len(rates), 2)
    rounds = known.unfold(1, k, 1).all(-1)
    accepted = rates.unfold(1, k, 1).cumprod(-1).sum(-1)
    return torch.stack((accepted.where(rounds, 0.0).sum(1), rounds.double().sum(1)), dim=1)
