"""A model that every process holds whole, beside one that is spread over processes.

Megatron-core keeps its process groups in one module; here the module's state is exchanged while the whole model works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch

from distill_pretrain.contracts import LogitsChunk, LogitsEngine
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.mcore.runtime.parallel import model_parallel


class WholeEngine:
    """A `LogitsEngine` opened, and run, under process groups in which every process is alone.

    Open it before the layout of the other model exists. Every rank of the job does so together, since loading
    communicates; scoring does not, and any rank may do it.

    Args:
        open_engine: opens the engine.
    """

    def __init__(self, open_engine: Callable[[], LogitsEngine]) -> None:
        # The seed decides nothing: the weights are loaded, and nothing is dropped while scoring.
        with model_parallel(ParallelConfig(), seed=0):
            self._engine = open_engine()
            self._groups = _groups_in_use()
        self.vocab_size = self._engine.vocab_size
        self.device = self._engine.device

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the engine inside."""
        return self._engine.identity

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute next-token logits, float32[B, L, V], for tokens int64[B, L]."""
        with _using(self._groups):
            return self._engine.logits(tokens)

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`; of an engine that has them."""
        engine: Any = self._engine
        chunks = engine.chunks(tokens)
        while True:
            # Not around the `yield`: the other model works between two chunks.
            with _using(self._groups):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
            del chunk


def _groups_in_use() -> dict[str, Any]:
    """Megatron-core's process groups and ranks: all plain values of its module's private names."""
    from distill_pretrain.mcore.runtime.core import parallel_state

    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_")
        and not name.startswith("__")
        and not isinstance(value, FunctionType | ModuleType | type)
    }


@contextmanager
def _using(groups: dict[str, Any]) -> Iterator[None]:
    from distill_pretrain.mcore.runtime.core import parallel_state

    others = _groups_in_use()
    vars(parallel_state).update(groups)
    try:
        yield
    finally:
        vars(parallel_state).update(others)
