"""Synthetic caches: tokens, labels and targets of every sequence, from noisy Zipf logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import distill_pretrain
from distill_pretrain.cache import CachePlan, CacheWriter
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.registry import CodecName, codec_number
from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets
from distill_pretrain.sampling.philox import RNG_NAME
from distill_pretrain.sampling.samplers import sample_targets


@dataclass(frozen=True)
class Sample:
    """A synthetic cache to be written: tokens, labels and targets of every sequence."""

    plan: CachePlan
    tokens: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    targets: tuple[RaggedTargets, ...]

    def writer(self, folder: Path) -> CacheWriter:
        """One process's hand in a folder."""
        return CacheWriter.create_or_resume(
            folder,
            self.plan,
            make_tables=self.tables,
            labels_of=lambda sequence: self.labels[sequence],
            sync_every=4,
        )

    def tables(self) -> HcTables:
        """Of the entropy codec, from the first half of the targets."""
        plan = self.plan
        return build_tables(
            self.targets[: len(self.targets) // 2],
            kind=plan.kind,
            num_draws=plan.num_draws,
            vocab_size=plan.vocab_size,
        )

    def block(self, sequence: int, offset: int, size: int) -> RaggedTargets:
        """Targets of some positions of a sequence."""
        whole = self.targets[sequence]
        ends = np.concatenate([[0], np.cumsum(whole.entries_per_token)])
        entries = slice(int(ends[offset]), int(ends[offset + size]))
        return replace(
            whole,
            entries_per_token=whole.entries_per_token[offset : offset + size],
            ids=whole.ids[entries],
            values=whole.values[entries],
        )


def make_sample(
    codec: CodecName,
    sampler: str,
    *,
    vocab_size: int,
    num_draws: int,
    num_sequences: int,
    **layout: Any,
) -> Sample:
    """Targets drawn by the package's samplers from noisy Zipf logits, some peaked, some flat."""
    seq_len = layout["seq_len"]
    tokens, labels, targets = [], [], []
    for sequence in range(num_sequences):
        draw = np.random.Generator(np.random.Philox(key=sequence))
        scale = draw.uniform(0.5, 6.0, (seq_len, 1))
        noise = draw.standard_normal((seq_len, vocab_size))
        logits = (scale * noise - np.log1p(np.arange(vocab_size))).astype(np.float32)
        row = draw.integers(vocab_size, size=seq_len + 1).astype(np.int32)
        label = row[1:].copy()
        if sequence == num_sequences - 1:
            label[-seq_len // 4 :] = IGNORED_LABEL  # the end of a corpus is padding
        found = sample_targets(
            logits,
            np.arange(sequence * seq_len, (sequence + 1) * seq_len, dtype=np.uint64),
            sampler=sampler,
            num_draws=num_draws,
            seed=1,
            valid=label != IGNORED_LABEL,
        )
        tokens.append(row[:-1])
        labels.append(label)
        targets.append(found)
    plan = CachePlan(
        sequence_plan_id="a" * 64,
        tokens={"bin_sha256": "b" * 64, "idx_sha256": "c" * 64},
        tokenizer_sha256="d" * 64,
        vocab_size=vocab_size,
        num_sequences=num_sequences,
        sampler={
            "name": sampler,
            "num_draws": num_draws,
            "temperature": 1.0,
            "seed": 1,
            "rng": RNG_NAME,
        },
        teacher={"kind": "synthetic"},
        micro_batch_size=1,
        codec=codec_number(codec, sampler),
        software={"distill-pretrain": distill_pretrain.__version__},
        **layout,
    )
    return Sample(plan, tuple(tokens), tuple(labels), tuple(targets))


def writers_sample(codec: CodecName, sampler: str) -> Sample:
    """Five shards of some 4 KiB pages, the last one shorter: enough to be killed in."""
    return make_sample(
        codec,
        sampler,
        vocab_size=2000,
        num_draws=50,
        num_sequences=18,
        seq_len=256,
        block_tokens=64,
        shard_sequences=4,
    )


def readers_sample(codec: CodecName, sampler: str) -> Sample:
    """Two shards of about 1 KiB: small enough for every bit."""
    return make_sample(
        codec,
        sampler,
        vocab_size=300,
        num_draws=20,
        num_sequences=3,
        seq_len=24,
        block_tokens=10,
        shard_sequences=2,
    )
