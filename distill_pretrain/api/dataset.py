"""Sequences of a plan and their cached targets as a map-style dataset of torch.

Shapes: B sequences, L positions, K the most entries of a position.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from distill_pretrain.cache.reader import CacheHead, CacheReader
from distill_pretrain.contracts import NO_ENTRY
from distill_pretrain.corpus.sequence_plan import SequenceOutOfRange, SequencePlan
from distill_pretrain.data.batches import drop_targets, pad_targets
from distill_pretrain.data.retry import read_with_retries
from distill_pretrain.errors import TokenDataError, require_whole


class DistillationDataset(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a plan, in its order, with the targets that a cache has for them.

    An item is one sequence: `tokens` int64[L], `labels` int64[L] (the next tokens, -100 where there is none) and,
    with a cache, `ids` int64[L, K] padded with -1 and `probs` float32[L, K], zero where padded. K differs from item
    to item: give a DataLoader `collate_fn=collate_distillation`. What the corpus leaves out of the loss (PREFIX.loss)
    has label -100. Where its documents differ in weight there is `weights` float32[L], too: of each label in the loss,
    the mean of which is the weighted sum over the sum of the weights.

    It can be pickled, and every worker of a DataLoader opens the cache's files itself. Within a process one thread
    at a time may read it. Every read checks that the tokens are those the teacher saw.

    Args:
        plan: the sequences.
        cache: folder or URL of a finished cache of these sequences; None for the text alone.
        num_sequences: how many of the plan, from the first; None for all of them, or all that the cache has.
        read_retry_s: seconds for which a read that disk, network or store fails is tried again.

    Attributes:
        plan: the sequences.
        vocab_size: of the cache; None without one.

    Raises:
        CacheMismatch: the cache was made from other sequences, or has fewer than asked for.
        CacheIncomplete: there is no finished cache.
        TokenDataError: the plan has fewer sequences than asked for, or PREFIX.loss is damaged.
        TokenizerMismatch: the corpus holds ids outside the cache's vocabulary.
    """

    def __init__(
        self,
        plan: SequencePlan,
        cache: str | Path | None = None,
        *,
        num_sequences: int | None = None,
        read_retry_s: float = 60.0,
    ) -> None:
        if num_sequences is not None:
            require_whole("num_sequences", num_sequences, least=1)
            _require_sequences(plan, num_sequences)
        plan.index.check_loss()
        self.plan = plan
        self.vocab_size: int | None = None
        self._head: CacheHead | None = None
        self._reader: CacheReader | None = None
        self._owner = 0
        self._read_retry_s = read_retry_s
        self._size = num_sequences or plan.num_sequences
        if cache is not None:
            with CacheReader.open(cache) as reader:
                fingerprint = plan.index.fingerprint
                reader.check_matches(
                    sequence_plan_id=plan.plan_id,
                    seq_len=plan.seq_len,
                    tokens=fingerprint.as_dict(),
                    num_sequences=num_sequences,
                )
                plan.index.check_vocabulary(reader.plan.vocab_size)
                self._head = reader.head
                self.vocab_size = reader.plan.vocab_size
                self._size = num_sequences or reader.plan.num_sequences

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> dict[str, torch.Tensor]:
        """Return one sequence; see the class. Negative indices count from the end.

        Raises:
            SequenceOutOfRange: an IndexError; there is no such item.
            CacheMismatch: the tokens are not those the teacher saw.
            CacheCorrupt: bytes of the cache are damaged.
            CacheUnreadable: disk, network or store failed for `read_retry_s` seconds.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise SequenceOutOfRange(
                "no such item in the dataset",
                where=self.plan.index.prefix,
                found=number,
                expected=f"{-len(self)} to {len(self) - 1}",
            )
        number %= len(self)
        tokens, labels = self.plan.read([number])
        item = {
            "tokens": torch.from_numpy(tokens[0].astype(np.int64)),
            "labels": torch.from_numpy(labels[0].astype(np.int64)),
        }
        if self.plan.is_weighted:
            item["weights"] = torch.from_numpy(self.plan.loss_weights([number])[0])
        if self._head is not None:
            read = partial(self._open(self._head).read, number, tokens[0])
            ids, probs = pad_targets([read_with_retries(read, retry_s=self._read_retry_s)], rows=1)
            drop_targets(ids, probs, labels)
            item["ids"] = torch.from_numpy(ids[0].astype(np.int64))
            item["probs"] = torch.from_numpy(probs[0])
        return item

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files."""
        return {**self.__dict__, "_reader": None}

    def _open(self, head: CacheHead) -> CacheReader:
        """This process's reader: a forked one must not share the files of the process it came from."""
        if self._reader is None or self._owner != os.getpid():
            self._reader, self._owner = CacheReader.of(head), os.getpid()
        return self._reader


def collate_distillation(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch of items of `DistillationDataset`: tokens, labels and weights [B, L], ids and probs [B, L, K].

    K is the largest of the items; without weights an item's are 1.

    Raises:
        TokenDataError: there is no item, some have targets and some none, or they differ in length.
    """
    lengths = {tuple(item["tokens"].shape) for item in items}
    keys = {tuple(sorted(item.keys() - {"weights"})) for item in items}
    if len(lengths) != 1 or len(keys) != 1:
        raise TokenDataError(
            "the items do not make a batch",
            where="items",
            found=f"{len(items)} of shapes {sorted(lengths)}, with {sorted(keys)}",
            expected="at least one, all of one length, all with targets or all without",
        )
    batch = {name: torch.stack([item[name] for item in items]) for name in ("tokens", "labels")}
    if any("weights" in item for item in items):
        ones = torch.ones(items[0]["tokens"].shape)
        batch["weights"] = torch.stack([item.get("weights", ones) for item in items])
    if "ids" in items[0]:
        width = max(item["ids"].size(-1) for item in items)
        for name, padding in (("ids", NO_ENTRY), ("probs", 0)):
            batch[name] = torch.stack(
                [
                    functional.pad(item[name], (0, width - item[name].size(-1)), value=padding)
                    for item in items
                ]
            )
    return batch


def _require_sequences(plan: SequencePlan, num_sequences: int) -> None:
    if num_sequences > plan.num_sequences:
        raise TokenDataError(
            "the plan has fewer sequences than asked for",
            where="num_sequences",
            found=num_sequences,
            expected=f"at most {plan.num_sequences}",
        )
