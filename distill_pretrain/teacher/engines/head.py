"""The LM head, applied to a few positions at a time.

Shapes: T positions, H hidden size, V vocabulary, V_own columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.contracts import LogitsChunk

Finish = Callable[[torch.Tensor], torch.Tensor]
"""What a model does to its logits, element by element, such as soft-capping."""


def trunk_name(model: Any) -> str:
    """Return the attribute of a causal LM that holds its trunk.

    It is the one transformers names, else `model` (as in Llama 4).
    """
    prefix: str = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else "model"


def trunk_of(model: Any) -> Any:
    """Return a causal LM's trunk; the model itself where that is no module of its own."""
    return getattr(model, trunk_name(model), model)


class ChunkedHead:
    """This rank's columns of the LM head.

    Args:
        weight: [rows, H], of which the first V_own are ids of the corpus.
        bias: [rows], or None.
        first_id: token id of row 0.
        vocab_size: V of the corpus; rows beyond it are padding.
        chunk_tokens: positions per chunk.
        finish: applied to the logits in the model's arithmetic.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        first_id: int = 0,
        vocab_size: int,
        chunk_tokens: int,
        finish: Finish | None = None,
    ) -> None:
        width = min(len(weight), max(0, vocab_size - first_id))
        self.first_id = min(first_id, vocab_size)
        self._weight = weight[:width]
        self._bias = None if bias is None else bias[:width]
        self._chunk_tokens = chunk_tokens
        self._finish = finish

    @torch.no_grad()
    def chunks(self, hidden: torch.Tensor) -> Iterator[LogitsChunk]:
        """Yield the logits of hidden states [..., H] in the weight's type, chunk by chunk."""
        rows = hidden.reshape(-1, hidden.size(-1))
        for first in range(0, len(rows), self._chunk_tokens):
            # Not kept here: a caller who lets go of a chunk has none while the next is made.
            yield LogitsChunk(
                first=first,
                first_id=self.first_id,
                logits=self._logits(rows[first : first + self._chunk_tokens]),
            )

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        some = rows.to(self._weight.dtype)
        # Some matrix libraries refuse an empty product.
        if not len(self._weight):
            return some.new_empty(len(some), 0)
        logits = F.linear(some, self._weight, self._bias)
        return logits if self._finish is None else self._finish(logits)


def head_rows(total: int, number: int, count: int) -> slice:
    """Return the rows of the LM head that one of `count` ranks holds.

    They are equal stretches; the last ones are shorter, or empty.
    """
    size = -(-total // count)
    return slice(min(number * size, total), min((number + 1) * size, total))
