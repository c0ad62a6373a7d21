"""Memory of one process of an evaluation, by formula; estimates for llama-like models without fused kernels.

Shapes: T positions of a micro-batch, C of a chunk of logits, H hidden, F feed-forward, V vocabulary, K target entries
of a position, t processes that split a layer, e bytes of a number of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLICE_ELEMENTS = 1 << 23
"""Of the temporaries that are made of logits: `CHUNK_ELEMENTS` of `eval/chunks.py`."""

_SUMS_PER_POSITION = 10
_FP32, _FP64, _INT64 = 4, 8, 8


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """What of a model decides the memory of a process that scores with it.

    Attributes:
        parameters: on the process that has most.
        hidden_size: H.
        inner_size: F over t; what an MLP is wide on a process.
        bytes_per_number: e.
        chunk_tokens: C.
        columns: of the LM head on a process, V over t.
        is_split: whether other processes have the other columns.
    """

    parameters: float
    hidden_size: int
    inner_size: int
    bytes_per_number: int
    chunk_tokens: int
    columns: int
    is_split: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationMemory:
    """Bytes of a process of an evaluation when they are most.

    Attributes:
        weights: of all models.
        hidden: their last hidden states of a micro-batch, and what is kept of every position until it is summed.
        logits: one chunk of every model.
        temporaries: the largest on top of these: of a layer, or of scoring some rows.
        whole_logits: what the logits of the micro-batch would take whole, of all models; they are never made.
    """

    weights: int
    hidden: int
    logits: int
    temporaries: int
    whole_logits: int

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        return self.weights + self.hidden + self.logits + self.temporaries


def evaluation_memory(
    models: Sequence[ScoredModel],
    *,
    positions: int,
    vocab_size: int,
    has_teacher: bool,
    entries: int = 0,
) -> EvaluationMemory:
    """Compute the memory of a process.

    Args:
        models: those scored, the teacher among them.
        positions: T.
        vocab_size: V.
        has_teacher: whether they are compared with one.
        entries: K of a cache that they are compared with; 0 without one.
    """
    numbers = [model.bytes_per_number for model in models]
    hidden = sum(positions * m.hidden_size * m.bytes_per_number for m in models)
    per_position = (
        2 * _INT64 + entries * (_INT64 + _FP32) + len(models) * _SUMS_PER_POSITION * _FP64
    )
    rows = min(positions, max(m.chunk_tokens for m in models))
    some = min(SLICE_ELEMENTS, rows * vocab_size)
    # Rows with a label, their log-probabilities, the teacher's two, and a difference.
    scoring = some * (max(numbers) + _FP32 * (4 if has_teacher else 1))
    # Of a model in parts the ranks' columns of some rows are gathered, and whole rows kept.
    split = [model.bytes_per_number for model in models if model.is_split]
    gathering = 3 * some * max(split, default=0)
    chunks = [min(positions, m.chunk_tokens) * m.columns * m.bytes_per_number for m in models]
    return EvaluationMemory(
        weights=round(sum(m.parameters * m.bytes_per_number for m in models)),
        hidden=hidden + positions * per_position,
        logits=sum(chunks) + some * sum(split),
        temporaries=max([scoring, gathering, *(_layer(model, positions) for model in models)]),
        whole_logits=sum(positions * vocab_size * size for size in numbers),
    )


def _layer(model: ScoredModel, positions: int) -> int:
    """The stream, its norm, and the feed-forward block's inputs and output of both halves."""
    return positions * model.bytes_per_number * (3 * model.hidden_size + 4 * model.inner_size)
