"""Held-out figures of a student while it trains, under whatever layout it trains in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from distill_pretrain.data.batches import BatchSource, StudentBatches, micro_batches
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import (
    SequenceData,
    open_cache_of,
    open_sequences,
    open_together,
    require_one_tokenizer,
)
from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig

_log = logging.getLogger(__name__)


def require_held_out(data: DataConfig, train: TrainConfig) -> None:
    """Raise ConfigError where evaluation while training is asked for, or a cache for it named, and no text for it."""
    if train.eval_interval is not None and data.held_out_tokens is None:
        raise ConfigError(
            "there is no held-out text to evaluate on while training",
            where="data.held_out_tokens",
            expected="prefix of a .bin/.idx pair, for train.eval_interval",
            remedy="`distill-pretrain tokenize` writes one, held_out, beside train; or leave train.eval_interval out",
        )
    if data.held_out_cache is not None and data.held_out_tokens is None:
        raise ConfigError(
            "a cache of held-out text needs that text",
            where="data.held_out_cache",
            found=data.held_out_cache,
            expected="data.held_out_tokens, too",
            remedy="set it, or leave data.held_out_cache out",
        )


def evaluated_sequences(train: TrainConfig, available: int) -> int:
    """Return how many held-out sequences an evaluation scores: whole global batches, so that it runs as a step does.

    Raises:
        ConfigError: the held-out text is shorter than one global batch.
    """
    batch = train.global_batch_size
    if available < batch:
        raise ConfigError(
            "the held-out text is too short to evaluate on while training",
            where="data.held_out_tokens",
            found=f"{available} sequences",
            expected=f"a global batch of {batch} at least",
            remedy="hold out more text, or leave train.eval_interval out and use `distill-pretrain eval`",
        )
    return max(batch, min(train.eval_sequences, available) // batch * batch)


@contextmanager
def open_held_out(
    data: DataConfig, train: TrainConfig, trained_on: SequenceData
) -> Iterator[BatchSource | None]:
    """Open what an evaluation reads, for as long as the block lasts; None where there is none. Every rank calls it.

    Args:
        data: names the held-out corpus and, perhaps, its cache.
        train: how much of it is scored.
        trained_on: the first corpus of the training; its tokenizer decides.

    Raises:
        ConfigError: the held-out text is shorter than one global batch.
        TokenizerMismatch: it has another vocabulary or tokenizer.
        CacheMismatch: the cache is of other text, or does not cover what is scored.
    """
    if train.eval_interval is None:
        yield None
        return
    sequences = open_sequences(data, data.held_out_tokens)
    require_one_tokenizer(
        trained_on,
        data.tokens,
        sequences,
        what="training text and held-out text",
        where=f"data.held_out_tokens, {data.held_out_tokens}",
    )
    count = evaluated_sequences(train, sequences.num_sequences)
    with ExitStack() as caches:
        cache = None
        if data.held_out_cache is not None:
            open_first = partial(
                open_cache_of,
                data.held_out_cache,
                sequences,
                num_sequences=count,
                key="data.held_out_cache",
                corpus_key="data.held_out_tokens",
            )
            cache = caches.enter_context(open_together(open_first))
        yield BatchSource(
            plan=sequences.plan,
            cache=cache,
            num_sequences=count,
            document_end=sequences.plan.document_end,
        )


class HeldOutEvaluation(Callback):
    """Scores the student every `train.eval_interval` steps and after the last.

    Args:
        student: whose loss function has the terms.
        batches: of the held-out text; one epoch of them is an evaluation.
        term_names: of the student's loss, "ce" among them.
        has_targets: whether "kl" means anything: a cache of the held-out text, or a teacher in the job.
        train: intervals and length.
    """

    def __init__(
        self,
        *,
        student: Student,
        batches: StudentBatches,
        term_names: tuple[str, ...],
        has_targets: bool,
        train: TrainConfig,
    ) -> None:
        self._student = student
        self._batches = batches
        self._num_batches = (
            sum(s.num_sequences for s in batches.sources) // batches.global_batch_size
        )
        self._names = [
            name for name in term_names if name == "ce" or (name == "kl" and has_targets)
        ]
        self._places = [term_names.index(name) for name in self._names]
        self._train = train

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """See `Callback`: `held_out_ce` and, with targets, `held_out_kl`, means over valid tokens in nats.

        Of a student whose weights are averaged, `held_out_ce_ema` and `held_out_kl_ema`, too.
        """
        interval = self._train.eval_interval
        if interval is None or (step % interval and step != self._train.steps):
            return {}
        figures = self._score(step, doing)
        if self._student.average is not None:
            with self._student.average.in_place():
                averaged = self._score(step, doing)
            figures |= {f"{name}_ema": figure for name, figure in averaged.items()}
        shown = "  ".join(
            f"{k.removeprefix('held_out_')} {v:.4f}" for k, v in figures.items() if v is not None
        )
        _log.info(f"step {step}/{self._train.steps}  held out: {shown}")
        return figures

    def _score(self, step: int, doing: Callable[[str], None]) -> dict[str, float | None]:
        """Return the figures of the weights that the student has now."""
        total, num_tokens = torch.zeros(len(self._places), dtype=torch.float64), 0.0
        for batch in range(self._num_batches):
            doing(f"step {step}: evaluating, batch {batch + 1} of {self._num_batches}")
            read = self._batches.host_batches(batch, self._student.is_last_stage)
            sums, tokens = self._student.evaluate(
                micro_batches(read, self._batches.device, readers=len(self._student.chunks))
            )
            total += sums[self._places]
            num_tokens += tokens
        means = (total / max(1, num_tokens)).tolist()
        return {
            f"held_out_{name}": mean if math.isfinite(mean) else None
            for name, mean in zip(self._names, means, strict=True)
        }
