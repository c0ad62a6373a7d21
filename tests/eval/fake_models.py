"""Models, plans and caches of a few numbers, and what their figures are, position by position in float64."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from distill_pretrain.contracts import LogitsChunk, RaggedTargets

VOCAB = 37
SEQ_LEN = 12
NUM_DRAWS = 20


class TableEngine:
    """Bigram logits: row `token` of a fixed table; optionally NaN in some sequences, or chunk by chunk."""

    device = torch.device("cpu")

    def __init__(
        self,
        seed: int,
        *,
        vocab_size: int = VOCAB,
        nan_at: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.table = (3 * rng.standard_normal((vocab_size, vocab_size))).astype(np.float32)
        self.nan_at = nan_at
        self.calls = 0
        self.has_chunks = chunk_tokens is not None
        self.chunk_tokens = chunk_tokens
        self.most_alive = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "table", "first": float(self.table[0, 0])}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        result = torch.from_numpy(self.table)[tokens]
        if self.nan_at is not None:
            result[tokens[:, 0] == self.nan_at, 1, 2] = float("nan")
        return result

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """The same rows; notes how many chunks are there at once."""
        self.calls += 1
        made: list[weakref.ref[torch.Tensor]] = []
        flat = tokens.flatten()
        for first in range(0, len(flat), self.chunk_tokens or 0):
            logits = torch.from_numpy(self.table)[flat[first : first + self.chunk_tokens]]
            made.append(weakref.ref(logits))
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in made))
            chunk = LogitsChunk(first=first, first_id=0, logits=logits)
            del logits
            yield chunk
            del chunk

    def probs(self, token: int) -> np.ndarray:
        """float64[V]."""
        z = np.exp(self.table[token].astype(np.float64))
        return z / z.sum()


class RandomPlan:
    """Random sequences with some ignored labels; the last is all padding but three."""

    seq_len = SEQ_LEN

    def __init__(self, num_sequences: int = 11) -> None:
        rng = np.random.default_rng(5)
        self.num_sequences = num_sequences
        self.tokens = rng.integers(0, VOCAB, (num_sequences, SEQ_LEN)).astype(np.int32)
        self.labels = rng.integers(0, VOCAB, (num_sequences, SEQ_LEN)).astype(np.int32)
        self.labels[rng.random(self.labels.shape) < 0.2] = -100
        self.labels[-1, 3:] = -100
        self.tokens[:, 0] = (
            np.arange(num_sequences) % VOCAB
        )  # a sequence can be told by its first token

    def read(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[sequences], self.labels[sequences]

    def places(self) -> list[tuple[int, int]]:
        """(sequence, position) of every label."""
        return [(int(s), int(i)) for s, i in zip(*np.nonzero(self.labels >= 0), strict=True)]


class DrawnCache:
    """Draws from a teacher at every labelled position but those of one in five, where nothing is stored."""

    def __init__(self, plan: RandomPlan, teacher: TableEngine, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.counts = np.zeros((*plan.labels.shape, VOCAB), dtype=np.int64)
        for sequence, place in plan.places():
            if rng.random() > 0.2:
                probs = teacher.probs(plan.tokens[sequence, place])
                self.counts[sequence, place] = rng.multinomial(NUM_DRAWS, probs)

    def read(
        self, sequence: int, tokens: np.ndarray, start: int = 0, stop: int | None = None
    ) -> RaggedTargets:
        rows = self.counts[sequence, start:stop]
        return RaggedTargets(
            kind="counts",
            num_draws=NUM_DRAWS,
            entries_per_token=(rows > 0).sum(1).astype(np.int32),
            ids=np.nonzero(rows)[1].astype(np.int32),
            values=rows[rows > 0].astype(np.int32),
        )


def dense_reference(plan: RandomPlan, model: TableEngine, teacher: TableEngine) -> dict[str, float]:
    """The figures in float64, position by position."""
    terms: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            terms.setdefault(name, []).append(value)

    for sequence, place in plan.places():
        token, label = plan.tokens[sequence, place], plan.labels[sequence, place]
        p, t = model.probs(token), teacher.probs(token)
        add(
            ce=-np.log(p[label]),
            kl=sum(a * np.log(a / b) for a, b in zip(t, p, strict=True)),
            teacher_entropy=-(t * np.log(t)).sum(),
            top1_accuracy=p.argmax() == label,
            top1_agreement=p.argmax() == t.argmax(),
            acceptance=sum(min(a, b) for a, b in zip(t, p, strict=True)),
        )
    return {"num_positions": len(terms["ce"]), **{k: np.mean(v) for k, v in terms.items()}}


def accepted_reference(
    plan: RandomPlan, model: TableEngine, teacher: TableEngine, k: int
) -> float | None:
    """Mean number of drafts accepted until the first rejection, over all runs of k labelled positions."""
    places, found = set(plan.places()), []
    for sequence, first in sorted(places):
        run = [(sequence, first + i) for i in range(k)]
        if not set(run) <= places:
            continue
        rates = [
            np.minimum(model.probs(plan.tokens[at]), teacher.probs(plan.tokens[at])).sum()
            for at in run
        ]
        # Exactly j accepted: the first j, and then a rejection unless the round is over.
        exactly = [np.prod(rates[:j]) * (1 - rates[j] if j < k else 1.0) for j in range(k + 1)]
        assert abs(sum(exactly) - 1) < 1e-12
        found.append(sum(j * chance for j, chance in enumerate(exactly)))
    return float(np.mean(found)) if found else None


def cache_reference(plan: RandomPlan, model: TableEngine, cache: DrawnCache) -> dict[str, float]:
    """Figures against a cache in float64, position by position."""
    cross, kl = [], []
    for at in plan.places():
        drawn = cache.counts[at] / NUM_DRAWS
        if drawn.any():
            p = model.probs(plan.tokens[at])
            kept = [(a, b) for a, b in zip(drawn, p, strict=True) if a > 0]
            cross.append(-sum(a * np.log(b) for a, b in kept))
            kl.append(sum(a * np.log(a / b) for a, b in kept))
    return {
        "num_cache_positions": len(cross),
        "cross_entropy_cache": np.mean(cross),
        "kl_cache": np.mean(kl),
    }
