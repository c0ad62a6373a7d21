"""The same targets under another codec: decode every block of a cache, encode it anew, compare.

Legend: T positions of the block, E entries in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distill_pretrain.cache.codec.files import CodecFiles
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.registry import CODECS, BlockCodec, CodecName, codec_number
from distill_pretrain.cache.codec.target_checks import order_problem
from distill_pretrain.cache.finished_shards import FinishedShards, require_same_plan
from distill_pretrain.cache.manifest import Manifest
from distill_pretrain.cache.merge import require_another_folder
from distill_pretrain.cache.names import PLAN_NAME
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.reader import CacheReader, load_plan
from distill_pretrain.cache.shard import frame_length
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheError
from distill_pretrain.files.storage import open_storage

_BLOCKS_PER_READ = 16

Progress = Callable[[int], None]
"""Called with the number of positions just written."""


@dataclass(frozen=True, kw_only=True)
class RecompressResult:
    """What `recompress_cache` did.

    Attributes:
        source: manifest of the cache that was read.
        written: manifest of the new cache; None while other processes still write to it.
    """

    source: Manifest
    written: Manifest | None


def recompress_cache(
    source: str | Path,
    dest: Path,
    *,
    pilot_tokens: int,
    codec: CodecName = "hc",
    shard_tables: bool = False,
    share: tuple[int, int] = (0, 1),
    progress: Progress = lambda positions: None,
) -> RecompressResult:
    """Write the targets of a finished cache into a folder with another codec.

    Killed and run again, or run by several processes at once, it goes on and yields the same bytes. Everything of
    the plan but the codec stays, and so do `labelled` and `label_hits` of the shards.

    Args:
        source: folder or URL of the cache.
        dest: folder of the new one.
        pilot_tokens: positions that tables are fitted to; whole sequences are used, spread evenly.
        codec: of the new one.
        shard_tables: give a shard tables of its own where its file and theirs are together smaller than its file
            with the cache's tables.
        share: (number of this process, of how many), so that processes started together begin at different shards.
        progress: told of positions written.

    Raises:
        CacheIncomplete: the source is not finished, or no cache, or a shard of it vanished.
        CacheCorrupt: a block of the source is damaged.
        CacheMismatch: the folder holds another cache.
        CacheError: the two are one folder, the codec would stay raw, or the folder cannot be written.
    """
    require_another_folder(dest, str(source))
    with CacheReader.open(source) as reader:
        manifest = reader.manifest
    plan = _new_plan(manifest.plan, codec, str(source))
    if (dest / PLAN_NAME).exists():
        stored = load_plan(open_storage(dest))
        require_same_plan(
            stored,
            plan.joining(stored),
            where=str(dest),
            remedy="name a new folder as DEST, or the one of an earlier `recompress` of this cache",
        )
    shards = FinishedShards(open_storage(source), manifest.plan)
    # Opening a cache compares no sizes: found out here, before hours of work.
    for shard in range(manifest.plan.num_shards):
        shards.record(shard)
    writer = CacheWriter.create_or_resume(
        dest,
        plan,
        make_tables=lambda: _fit(shards, range(plan.num_sequences), pilot_tokens),
    )
    _Recompression(shards, writer, pilot_tokens if shard_tables else None, progress).run(share)
    written = None if writer.pending() else writer.publish_manifest()
    return RecompressResult(source=manifest, written=written)


def ascending(targets: RaggedTargets) -> RaggedTargets:
    """Return the same targets with the ids of every position in ascending order."""
    lengths, ids = targets.entries_per_token, targets.ids
    if order_problem(lengths, ids) is None:
        return targets
    order = np.lexsort((ids, np.repeat(np.arange(len(lengths)), lengths)))
    return replace(targets, ids=ids[order], values=targets.values[order])


def _new_plan(plan: CachePlan, codec: CodecName, where: str) -> CachePlan:
    if codec == "raw" and CODECS[plan.codec].name == "raw":
        raise CacheError(
            "the cache has that codec already",
            where=where,
            found="codec raw",
            remedy="copy the folder, or choose codec hc",
        )
    number = codec_number(codec, plan.sampler["name"])
    return replace(plan, codec=number, codec_sha256=None)


def _blocks(
    shards: FinishedShards, shard: int, first: int, stop: int
) -> Iterator[tuple[RaggedTargets, int]]:
    """(targets, token hash) of some blocks of a shard, every check on."""
    with shards.open(shard) as file:
        for start in range(first, stop, _BLOCKS_PER_READ):
            frames = file.frames(start, min(_BLOCKS_PER_READ, stop - start))
            for block, frame in enumerate(frames, start):
                yield ascending(file.spec.decode(frame, block)), frame.token_hash


def _fit(shards: FinishedShards, sequences: range, num_tokens: int) -> HcTables:
    """Tables fitted to at least so many positions of some sequences, spread over them evenly."""
    plan = shards.plan
    per_sequence = plan.blocks_per_sequence

    def pilot() -> Iterator[RaggedTargets]:
        wanted = min(-(-num_tokens // plan.seq_len), len(sequences))
        for number in range(wanted):
            sequence = sequences[number * len(sequences) // wanted]
            shard, row = divmod(sequence, plan.shard_sequences)
            first = row * per_sequence
            for targets, _ in _blocks(shards, shard, first, first + per_sequence):
                yield targets

    return build_tables(
        pilot(), kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size
    )


class _Recompression:
    """One process's work on a new cache; `pilot_tokens` is None where shards get no tables of their own."""

    def __init__(
        self,
        shards: FinishedShards,
        writer: CacheWriter,
        pilot_tokens: int | None,
        progress: Progress,
    ) -> None:
        self._shards, self._writer = shards, writer
        self._pilot_tokens, self._progress = pilot_tokens, progress
        codecs = CodecFiles(open_storage(writer.folder), writer.plan)
        self._codec = codecs.get(writer.plan.codec_sha256)

    def run(self, share: tuple[int, int]) -> None:
        """Write every shard that no other process owns, until a pass finds none."""
        start = share[0] * self._writer.plan.num_shards // share[1]
        worked = True
        while worked:
            worked = False
            pending = self._writer.pending()
            for shard in sorted(pending, key=lambda shard: (shard < start, shard)):
                worked |= self._shard(shard)

    def _shard(self, shard: int) -> bool:
        record = self._shards.record(shard)
        claimed = self._writer.claim(
            shard,
            canary=(record.labelled, record.label_hits),
            choose_tables=lambda: self._own_tables(shard),
        )
        if claimed is None:
            return False
        with claimed:
            first = claimed.next_block
            for targets, hashed in _blocks(self._shards, shard, first, claimed.num_blocks):
                _append_checked(claimed, targets, hashed)
                self._progress(len(targets.entries_per_token))
            claimed.finish()
        return True

    def _own_tables(self, shard: int) -> HcTables | None:
        """Tables fitted to the shard, if they save more bytes than they have."""
        if self._pilot_tokens is None:
            return None
        plan = self._shards.plan
        first, count = plan.shard_range(shard)
        own = HcCodec(_fit(self._shards, range(first, first + count), self._pilot_tokens))
        saved = -len(own.tables.to_bytes())
        for targets, _ in _blocks(self._shards, shard, 0, plan.shard_blocks(shard)):
            saved += _frame_bytes(self._codec, targets) - _frame_bytes(own, targets)
        return own.tables if saved > 0 else None


def _frame_bytes(codec: BlockCodec, targets: RaggedTargets) -> int:
    return frame_length(len(codec.encode(targets)))


def _append_checked(shard: ShardWriter, targets: RaggedTargets, hashed: int) -> None:
    """Append a block after seeing that its payload says the same."""
    codec, sizes = shard.codec, (len(targets.entries_per_token), len(targets.ids))
    found = ascending(codec.decode(codec.encode(targets), *sizes))
    same = all(
        np.array_equal(getattr(found, name), getattr(targets, name))
        for name in ("entries_per_token", "ids", "values")
    )
    if not same:
        raise CacheError(
            "the new codec does not give back what it was given",
            where=f"shard {shard.shard}, block {shard.next_block}",
            remedy="report this as a bug of distill-pretrain, or check this machine's memory; the source is untouched",
        )
    shard.append_hashed(targets, hashed)
