"""Targets of this project, in its own format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.cache import CacheReader
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.registry import codec_number
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.batches import pad_targets
from distill_pretrain.sampling.samplers import Sampler, sample_sets
from rivals.kept import Chunk, Kept, Use


class Ours:
    """A cache as `capture` writes it, codec `hc`, one shard; its tables are made from the first eighth.

    Args:
        sampler: of the targets.
        folder: of the cache.
        plan: of any cache of these sequences; sampler and codec are replaced.
        use: what the loss does about missing mass.

    Attributes:
        table_bytes: of the tables, of which there is one file however long the cache is; not among the bytes that
            `finish` gives. Known then.
    """

    basis = "this project"

    def __init__(self, sampler: Sampler, folder: Path, plan: CachePlan, use: Use) -> None:
        top = "" if sampler.top_p is None else f" {sampler.top_p}"
        self.name = f"{sampler.name} {sampler.num_draws}{top}"
        self.use = use
        self.sampler = sampler
        self._plan = replace(
            plan,
            sampler={
                **plan.sampler,
                "name": sampler.name,
                "num_draws": sampler.num_draws,
                **({} if sampler.top_p is None else {"top_p": sampler.top_p}),
            },
            codec=codec_number("hc", sampler.name),
            block_tokens=max(16, plan.seq_len),
            shard_sequences=plan.num_sequences,
        )
        self._folder = folder
        self._tokens: list[Chunk] = []
        self._pilot: list[RaggedTargets] = []
        self._shard: ShardWriter | None = None
        self._writer: CacheWriter | None = None
        self._cache: CacheReader | None = None
        self.table_bytes = 0

    def write(self, chunk: Chunk) -> None:
        """See `Layout`."""
        (targets,) = sample_sets(chunk.logits, chunk.positions, [self.sampler])
        self._tokens.append(replace(chunk, logits=chunk.logits[:0]))
        if self._shard is not None:
            self._append(targets, chunk)
            return
        self._pilot.append(targets)
        if 8 * sum(len(c.tokens) for c in self._tokens) >= self._plan.num_sequences:
            self._writer = CacheWriter.create_or_resume(
                self._folder, self._plan, make_tables=self._tables
            )
            self._shard = self._writer.claim(0)
            for waiting, of in zip(self._pilot, self._tokens, strict=True):
                self._append(waiting, of)

    def finish(self) -> int:
        """See `Layout`: headers, hashes, checksums and index counted; the manifest, a few kB, and the tables not."""
        assert self._shard is not None and self._writer is not None
        self._shard.finish()
        self._writer.publish_manifest()
        self.table_bytes = sum(path.stat().st_size for path in self._folder.glob("codec-*.bin"))
        return sum(path.stat().st_size for path in self._folder.glob("*.dpt"))

    def read(self) -> Iterator[tuple[Any, Any]]:
        """See `Layout`: every check on, padded to rectangles."""
        # Opened once, as a job does; a later pass does not pay for it again.
        self._cache = self._cache or CacheReader.open(self._folder)
        sequence = 0
        for chunk in self._tokens:
            parts = []
            for tokens in chunk.tokens:
                parts.append(self._cache.read(sequence, tokens))
                sequence += 1
            yield pad_targets(parts, rows=1)

    def kept(self, read: tuple[Any, Any]) -> Kept:
        """See `Layout`."""
        ids, probs = read
        return Kept(ids[0], probs[0])

    def again(self, chunk: Chunk, rows: slice, seed: int) -> Kept:
        """Targets of some rows of a chunk under another seed."""
        sampler = replace(self.sampler, seed=seed)
        drawn = sample_sets(chunk.logits[rows], chunk.positions[rows], [sampler])
        return self.kept(pad_targets(drawn, rows=1))

    def _tables(self) -> HcTables:
        plan = self._plan
        return build_tables(
            self._pilot, kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size
        )

    def _append(self, targets: RaggedTargets, chunk: Chunk) -> None:
        assert self._shard is not None
        length = chunk.tokens.shape[1]
        ends = np.cumsum(targets.entries_per_token)[length - 1 :: length].tolist()
        for row, tokens in enumerate(chunk.tokens):
            entries = slice(ends[row - 1] if row else 0, ends[row])
            part = replace(
                targets,
                entries_per_token=targets.entries_per_token[row * length : (row + 1) * length],
                ids=targets.ids[entries],
                values=targets.values[entries],
            )
            self._shard.append(part, tokens)
