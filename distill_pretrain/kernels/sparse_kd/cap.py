"""Logits of a model that caps them, cap tanh(z / cap), in plain PyTorch."""

from __future__ import annotations

import math

import torch


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap tanh(z / cap) in fp32, or z itself where there is no cap (None or 0).

    A logit of -inf, which is a column that does not count, stays.
    """
    logits = logits.float()
    if not cap:
        return logits
    return torch.where(logits == -math.inf, logits, torch.tanh(logits / cap) * cap)


def cap_slope(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """Return the derivative 1 - (z' / cap)^2 of capped logits z' by z, fp32; 0 at -inf."""
    return (1.0 - (capped / cap).square_()).clamp_(min=0.0)
