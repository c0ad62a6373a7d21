"""Several teachers of one tokenizer as one: the weighted mean of their distributions.

What is drawn from it is drawn without bias, as from any teacher's distribution.

Shapes: B sequences, L positions, T positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.errors import ConfigError


class MixtureEngine:
    """A `LogitsEngine` and `TeacherEngine` of several, each whole in this process.

    Its logits are log sum_m w_m softmax(z_m), normalised, in fp32; a term whose weight is lost beside the others' in
    fp32 is below what the samplers tell from 0.

    Args:
        engines: the teachers, each a `LogitsEngine` and `TeacherEngine`, of the same vocabulary.
        weights: of each, above 0; their sum counts as 1.
    """

    def __init__(self, engines: Sequence[Any], weights: Sequence[float]) -> None:
        assert len(engines) == len(weights) > 1 and min(weights) > 0, weights
        if any(getattr(engine, "replica", Replica()).group is not None for engine in engines):
            raise ConfigError(
                "the teachers of a mixture are whole in each process",
                where="teacher.mixture",
                found="a teacher that several processes hold together",
            )
        self._engines = list(engines)
        self._weights = [weight / math.fsum(weights) for weight in weights]
        self.vocab_size: int = engines[0].vocab_size
        self.device: torch.device = engines[0].device
        assert {engine.vocab_size for engine in engines} == {self.vocab_size}

    @property
    def replica(self) -> Replica:
        """The replica of the engines: this process."""
        replica: Replica = self._engines[0].replica
        return replica

    @property
    def identity(self) -> dict[str, Any]:
        """The identities and shares of all teachers, in the recipe's order."""
        teachers = [
            {"share": weight, **engine.identity}
            for weight, engine in zip(self._weights, self._engines, strict=True)
        ]
        return {"kind": "mixture", "teachers": teachers}

    @property
    def has_chunks(self) -> bool:
        """Whether all of them have chunks."""
        return all(getattr(one, "has_chunks", hasattr(one, "chunks")) for one in self._engines)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `LogitsEngine`."""
        return self._mixed(engine.logits(tokens) for engine in self._engines)

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`. Every teacher has the same chunks of positions, whose logits exist at once."""
        for parts in zip(*(engine.chunks(tokens) for engine in self._engines), strict=True):
            spans = {(part.first, part.first_id, tuple(part.logits.shape)) for part in parts}
            assert len(spans) == 1, spans
            first = parts[0]
            yield LogitsChunk(
                first=first.first,
                first_id=first.first_id,
                logits=self._mixed(part.logits for part in parts),
            )

    def _mixed(self, every: Iterator[torch.Tensor]) -> torch.Tensor:
        """Log of the weighted mean of the softmaxes of logits [..., V], fp32."""
        terms = (
            torch.log_softmax(logits.float(), dim=-1).add_(math.log(weight))
            for weight, logits in zip(self._weights, every, strict=True)
        )
        return reduce(torch.logaddexp, terms)
