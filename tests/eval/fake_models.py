"""Models and plans of a few numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

VOCAB = 37
SEQ_LEN = 12


class TableEngine:
    """Bigram logits: row `token` of a fixed table; optionally NaN in some sequences."""

    device = torch.device("cpu")

    def __init__(self, seed: int, *, vocab_size: int = VOCAB, nan_at: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.table = (3 * rng.standard_normal((vocab_size, vocab_size))).astype(np.float32)
        self.nan_at = nan_at
        self.calls = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "table", "first": float(self.table[0, 0])}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        result = torch.from_numpy(self.table)[tokens]
        if self.nan_at is not None:
            result[tokens[:, 0] == self.nan_at, 1, 2] = float("nan")
        return result


class RandomPlan:
    """Random sequences with some ignored labels; the last is all padding but three."""

    def __init__(self, num_sequences: int = 11) -> None:
        rng = np.random.default_rng(5)
        self.num_sequences = num_sequences
        self.tokens = rng.integers(0, VOCAB, (num_sequences, SEQ_LEN)).astype(np.int32)
        self.labels = rng.integers(0, VOCAB, (num_sequences, SEQ_LEN)).astype(np.int32)
        self.labels[rng.random(self.labels.shape) < 0.2] = -100
        self.labels[-1, 3:] = -100
        self.tokens[:, 0] = np.arange(num_sequences)  # a sequence can be told by its first token

    def read(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[sequences], self.labels[sequences]


def dense_reference(plan: RandomPlan, model: TableEngine, teacher: TableEngine) -> dict[str, float]:
    """The figures in float64, position by position."""
    ce, kl, hits, agreements, entropy = [], [], [], [], []
    for tokens, labels in zip(plan.tokens, plan.labels, strict=True):
        for token, label in zip(tokens, labels, strict=True):
            if label < 0:
                continue
            z, t = model.table[token].astype(np.float64), teacher.table[token].astype(np.float64)
            log_p = z - np.log(np.exp(z).sum())
            log_t = t - np.log(np.exp(t).sum())
            ce.append(-log_p[label])
            kl.append(sum(np.exp(a) * (a - b) for a, b in zip(log_t, log_p, strict=True)))
            entropy.append(-(np.exp(log_t) * log_t).sum())
            hits.append(z.argmax() == label)
            agreements.append(z.argmax() == t.argmax())
    return {
        "num_positions": len(ce),
        "ce": np.mean(ce),
        "kl": np.mean(kl),
        "top1_accuracy": np.mean(hits),
        "top1_agreement": np.mean(agreements),
        "teacher_entropy": np.mean(entropy),
    }
