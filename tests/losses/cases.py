"""Random logits, labels and sparse targets with every awkward row."""

from __future__ import annotations

import torch

from distill_pretrain.contracts import SparseTargets


def make_case(seed, *, num_tokens=23, vocab_size=37, padded=48, k=5, mass="full", scale=4.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, padded, generator=g) * scale
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=g)
    labels[torch.rand(num_tokens, generator=g) < 0.2] = -100
    ids = torch.stack([torch.randperm(vocab_size, generator=g)[:k] for _ in range(num_tokens)])
    probs = torch.rand(num_tokens, k, generator=g) + 0.02
    drop = torch.rand(num_tokens, k, generator=g) < 0.3
    drop[0], drop[1] = True, False  # a row without targets, a full row
    ids, probs = ids.masked_fill(drop, -1), probs.masked_fill(drop, 0.0)
    ids[2, 1:][ids[2, 1:] == labels[2]] = -1  # a target may be the label
    ids[2, 0], probs[2, 0] = labels[2].clamp(min=0), 0.5
    probs = probs.masked_fill(ids < 0, 0.0)
    total = probs.sum(-1, keepdim=True).clamp(min=1e-9)
    probs = probs / total * (1.0 if mass == "full" else 0.7)
    return logits, labels, SparseTargets(ids=ids, probs=probs)
