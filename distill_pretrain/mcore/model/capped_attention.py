"""Attention whose scores are soft-capped, s -> cap tanh(s / cap), which no fused kernel of torch computes.

Shapes: b sequences, n query heads, g key/value heads, s queries, S keys, h head width.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BLOCK_ELEMENTS = 1 << 24
"""Scores that are there at a time, of a block of queries: the backward pass computes them again, block by block."""


def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cap: float,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend from the last of the places of the keys, each to its own place and those before, on any device.

    Args:
        q: [b, n, s, h], s at most S.
        k: [b, g, S, h].
        v: [b, g, S, h].
        cap: of the scaled scores.
        scale: of the scores; None means 1 / sqrt(h).
        window: places that a query sees, its own included; None for all before.
        dropout: probability that a weight is dropped.

    Returns:
        [b, n, s, h].
    """
    b, n, s, h = q.shape
    num_keys = k.size(2)
    size = max(1, min(window or s, BLOCK_ELEMENTS // (b * n * num_keys)))
    factor = h**-0.5 if scale is None else scale
    block = partial(_block, cap=cap, scale=factor, window=window, dropout=dropout)
    outputs, first = [], num_keys - s
    for own in q.split(size, dim=2):
        last = first + own.size(2)
        start = 0 if window is None else max(0, first - window + 1)
        seen = (own, k[:, :, start:last], v[:, :, start:last])
        if torch.is_grad_enabled():
            out = checkpoint(block, *seen, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            out = block(*seen)
        outputs.append(out)
        first = last
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cap: float,
    scale: float,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """The same of queries whose scores may all be there at once; in fp32 from scores to weights."""
    (b, n, s, h), (g, num_keys) = q.shape, k.shape[1:3]
    # Heads of a group lie one below the other: a product for each group, and no copies of its keys.
    scores = q.reshape(b, g, n // g * s, h) @ k.transpose(-1, -2)
    scores = torch.tanh(scores.float() * (scale / cap)) * cap
    places = torch.arange(num_keys, device=q.device)
    back = places[num_keys - s :, None] - places
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    scores = scores.view(b, n, s, num_keys).masked_fill(hidden, -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights.to(v.dtype).view(b, g, n // g * s, num_keys) @ v).view(b, n, s, h)
