"""Reading a finished cache, with every check on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.files import CodecFiles, tables_name
from distill_pretrain.cache.manifest import Manifest, extent_from
from distill_pretrain.cache.names import (
    EXTENT_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    extent_of,
    missing_ranges,
    ranges_text,
    record_name,
    sequence_ranges,
    shard_name,
    shards_in,
)
from distill_pretrain.cache.open_shards import OpenShards
from distill_pretrain.cache.own_plan import require_own_plan
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.requests import require_readable
from distill_pretrain.cache.shard import ShardFile, ShardSpec, token_hash
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from distill_pretrain.files.closing import Closing
from distill_pretrain.files.storage import Storage, open_storage


@dataclass(frozen=True, kw_only=True)
class CacheHead:
    """What one process read of a cache, for others to open it without reading that again.

    Attributes:
        location: folder or URL.
        plan: what the cache holds, with the extent that the manifest states.
        manifest_bytes: of manifest.json, found sound.
    """

    location: str
    plan: CachePlan
    manifest_bytes: bytes


class CacheReader(Closing):
    """A finished cache; several threads may read it at once, and the last of them closes it.

    Attributes:
        location: folder or URL of the cache.
        plan: what it holds.
        head: what `of` takes in other processes.
        bytes_read: of blocks, by all calls of `read`.
    """

    def __init__(self, storage: Storage, head: CacheHead, max_open: int) -> None:
        """Use `CacheReader.open` or `CacheReader.of`."""
        self.location = storage.location
        self.head = head
        self.plan = head.plan
        self._storage = storage
        self._codecs = CodecFiles(storage, self.plan)
        self.bytes_read = 0
        self._lock = Lock()
        self._shards = OpenShards(self._open_shard, most=max_open)

    @classmethod
    def open(cls, location: str | Path, *, max_open: int = 256) -> CacheReader:
        """Open a cache; one listing of the folder, however many shards there are: `read` checks their sizes.

        Args:
            location: its folder, or a URL that fsspec reads (s3://bucket/cache).
            max_open: most shard files kept open.

        Raises:
            CacheIncomplete: no plan, no manifest, or a shard file is missing; names the sequences.
            CacheCorrupt: plan, manifest or codec tables are damaged.
            CacheError: the store cannot be read.
        """
        storage = open_storage(location)
        plan = load_plan(storage)
        names = storage.names()
        try:
            data = storage.read(MANIFEST_NAME)
        except FileNotFoundError:
            raise _unfinished(storage.location, plan, names) from None
        try:
            manifest = Manifest.from_json_bytes(data, plan)
        except CacheCorrupt:
            require_own_plan(storage, plan)
            raise
        _require_files(storage, manifest, names)
        head = CacheHead(location=str(location), plan=manifest.plan, manifest_bytes=data)
        reader = cls(storage, head, max_open)
        reader.manifest = manifest
        reader._codecs.get(reader.plan.codec_sha256)
        return reader

    @classmethod
    def of(cls, head: CacheHead, *, max_open: int = 256) -> CacheReader:
        """Open a cache that another process has opened; reads nothing before the first `read`."""
        return cls(open_storage(head.location), head, max_open)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest: the records of the shards."""
        return Manifest.from_json_bytes(self.head.manifest_bytes, self.plan, is_checked=True)

    @cached_property
    def manifest_sha256(self) -> str:
        """The hex digest of manifest.json, the cache's identity."""
        return hashlib.sha256(self.head.manifest_bytes).hexdigest()

    def check_matches(
        self,
        *,
        sequence_plan_id: str | None = None,
        vocab_size: int | None = None,
        seq_len: int | None = None,
        tokenizer_sha256: str | None = None,
        tokens: dict[str, Any] | None = None,
        num_sequences: int | None = None,
    ) -> None:
        """Raise CacheMismatch, listing every difference, unless the run fits the cache.

        Args:
            sequence_plan_id: SequencePlan.plan_id of the run.
            vocab_size: V of the run.
            seq_len: L of the run.
            tokenizer_sha256: of the run's tokenizer; not compared when either side has none, or the tokens are equal.
            tokens: the run's {"bin_sha256", "idx_sha256"}; other keys are not compared.
            num_sequences: sequences the run wants to read.
        """
        plan = self.plan
        lines = []
        if tokens is not None:
            for key in ("bin_sha256", "idx_sha256"):
                lines += _differ(
                    f"another corpus (tokens.{key})",
                    plan.tokens.get(key),
                    tokens.get(key),
                    "set data.tokens to the corpus the teacher saw, or recapture",
                )
        # Equal ids are equal ids, whatever the files of their tokenizers say.
        same_ids = tokens is not None and not lines
        if not same_ids and None not in (tokenizer_sha256, plan.tokenizer_sha256):
            lines += _differ(
                "another tokenizer (tokenizer_sha256)",
                plan.tokenizer_sha256,
                tokenizer_sha256,
                "use the tokenizer the teacher saw, or recapture",
            )
        remedy = "set {} to the cache's value, or recapture"
        if vocab_size is not None:
            advice = remedy.format("data.vocab_size")
            lines += _differ("another vocabulary (vocab_size)", plan.vocab_size, vocab_size, advice)
        if seq_len is not None:
            advice = remedy.format("data.seq_len")
            lines += _differ("another seq_len", plan.seq_len, seq_len, advice)
        if sequence_plan_id is not None and not lines:
            # With the same corpus and seq_len only these are left to differ.
            lines += _differ(
                "another order of documents, joined ones for separate ones, or another packing (sequence_plan_id)",
                plan.sequence_plan_id,
                sequence_plan_id,
                "set data.seed, data.documents and data.packing to the values of the capture, or recapture",
            )
        if num_sequences is not None and num_sequences > plan.num_sequences:
            lines.append(
                f"too few sequences (num_sequences): the cache has {plan.num_sequences}, the run "
                f"needs {num_sequences}; lower data.num_sequences, or recapture"
            )
        if lines:
            raise CacheMismatch(
                "the cache was made from something else than this run uses",
                where=self.location,
                found="\n  " + "\n  ".join(lines) + "\n",
                remedy="as listed, or set data.cache to another cache",
            )

    def read(
        self,
        sequence: int,
        tokens: npt.NDArray[np.int32],
        start: int = 0,
        stop: int | None = None,
    ) -> RaggedTargets:
        """Read the targets of one sequence, if its tokens are those the teacher saw.

        Only the blocks that overlap the positions asked for are read and checked.

        Args:
            sequence: number in the plan.
            tokens: int32[L] inputs of that sequence.
            start: first position wanted.
            stop: one after the last; None for L.

        Returns:
            Targets of the positions from `start` to `stop`.

        Raises:
            CacheMismatch: there is no such sequence or position; the tokens are no int32[L]; or the tokens of a block
                differ: names shard, block and sequence.
            CacheIncomplete: the shard's file is not there; names its sequences.
            CacheCorrupt: the shard has not the size that the manifest states, or bytes of the block are damaged.
            CacheUnreadable: disk, network or store failed; another call opens the file anew.
        """
        plan = self.plan
        stop = plan.seq_len if stop is None else stop
        require_readable(plan, self.location, sequence, tokens, start, stop)
        shard, row = divmod(sequence, plan.shard_sequences)
        first_part, last_part = start // plan.block_tokens, (stop - 1) // plan.block_tokens
        first = row * plan.blocks_per_sequence + first_part
        with self._shards.use(shard) as file:
            frames = file.frames(first, last_part - first_part + 1)
        with self._lock:
            self.bytes_read += sum(frame.length for frame in frames)
        parts = []
        offset = first_part * plan.block_tokens
        for block, frame in enumerate(frames, start=first):
            size = frame.num_tokens
            if token_hash(tokens[offset : offset + size]) != frame.token_hash:
                raise CacheMismatch(
                    "the tokens differ from those the teacher saw",
                    where=file.spec.where(block),
                    remedy="set data.tokens to the corpus of the capture, or recapture",
                )
            parts.append(file.spec.decode(frame, block))
            offset += size
        joined = parts[0] if len(parts) == 1 else concatenate_targets(parts)
        begin = first_part * plan.block_tokens
        if (start, stop) == (begin, begin + len(joined.entries_per_token)):
            return joined
        return _slice_targets(joined, start - begin, stop - begin)

    def close(self) -> None:
        """Close every shard file."""
        self._shards.close()

    def _open_shard(self, shard: int) -> ShardFile:
        name = shard_name(self.plan, shard)
        where = f"{self.location}/{name}, sequences {sequence_ranges(self.plan, [shard])}"
        with self._lock:  # a cached property has no lock of its own from Python 3.12 on
            record = self.manifest.shards[shard]
        codec = self._codecs.get(record.codec_sha256)
        try:
            data = self._storage.open(name)
        except FileNotFoundError:
            raise CacheIncomplete(
                "a shard file vanished after the cache was opened, or this node does not see it",
                where=where,
                remedy="copy the file again, or run `distill-pretrain capture` again",
            ) from None
        if data.size != record.size:
            data.close()
            raise CacheCorrupt(
                "a shard has the wrong size",
                where=where,
                found=f"{data.size} bytes",
                expected=f"{record.size} bytes",
                remedy="copy the shard again, or recapture its sequences",
            )
        return ShardFile(data, ShardSpec(self.plan, shard, codec), f"{self.location}/{name}")


def concatenate_targets(parts: list[RaggedTargets]) -> RaggedTargets:
    """Join the targets of consecutive positions into one record."""
    return RaggedTargets(
        kind=parts[0].kind,
        num_draws=parts[0].num_draws,
        entries_per_token=np.concatenate([part.entries_per_token for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        values=np.concatenate([part.values for part in parts]),
    )


def _slice_targets(targets: RaggedTargets, start: int, stop: int) -> RaggedTargets:
    lengths = targets.entries_per_token
    first = int(lengths[:start].sum(dtype=np.int64))
    last = first + int(lengths[start:stop].sum(dtype=np.int64))
    return RaggedTargets(
        kind=targets.kind,
        num_draws=targets.num_draws,
        entries_per_token=lengths[start:stop],
        ids=targets.ids[first:last],
        values=targets.values[first:last],
    )


def load_plan(storage: Storage) -> CachePlan:
    """Load the plan of a cache; its extent is that of extent.json, and 1 without one.

    Raises:
        CacheIncomplete: there is none.
        CacheCorrupt: it is damaged.
    """
    try:
        data = storage.read(PLAN_NAME)
    except FileNotFoundError:
        raise CacheIncomplete(
            "no cache here",
            where=storage.location,
            found=f"no {PLAN_NAME}",
            remedy="run `distill-pretrain capture`, or correct data.cache",
        ) from None
    try:
        extent = extent_from(storage.read(EXTENT_NAME))
    except FileNotFoundError:
        extent = None
    return CachePlan.from_json_bytes(data, num_sequences=extent or 1)


def load_plan_of_extent(storage: Storage) -> CachePlan:
    """Load the plan with the largest extent known: its own, the manifest's, or else that of the shards' names."""
    plan = load_plan(storage)
    try:
        known = Manifest.from_json_bytes(storage.read(MANIFEST_NAME), plan).plan.num_sequences
    except (FileNotFoundError, CacheCorrupt):
        known = extent_of(plan, storage.sizes())
    return plan.with_extent(max(known, plan.num_sequences))


def _require_files(storage: Storage, manifest: Manifest, names: Collection[str]) -> None:
    """Raise unless every shard of a manifest and its tables are among the names of a folder's files."""
    plan = manifest.plan
    missing = [r.shard for r in manifest.shards if shard_name(plan, r.shard) not in names]
    if missing:
        named = [shard_name(plan, shard) for shard in missing[:4]]
        raise CacheIncomplete(
            "shard files of the cache are missing",
            where=storage.location,
            found=f"no {', '.join(named)}"
            f"{' ...' if len(missing) > 4 else ''}: sequences {sequence_ranges(plan, missing)}",
            remedy="copy the files again, or run `distill-pretrain capture` again",
        )
    for digest in sorted({record.codec_sha256 or "" for record in manifest.shards}):
        if digest and tables_name(digest) not in names:
            raise CacheCorrupt(
                "the tables of the cache's codec are missing",
                where=f"{storage.location}/{tables_name(digest)}",
                remedy="copy the file again from a sound copy of the cache",
            )


def _unfinished(location: str, plan: CachePlan, names: Collection[str]) -> CacheIncomplete:
    done = [shard for shard in shards_in(plan, names) if record_name(plan, shard) in names]
    missing = missing_ranges(plan, done)
    if missing:
        found = f"{plan.num_shards - len(done)} of {plan.num_shards} shards missing: sequences "
        found += ranges_text(missing)
    else:
        found = f"every shard, but no {MANIFEST_NAME}"
    return CacheIncomplete(
        "the cache is not finished",
        where=location,
        found=found,
        remedy="run `distill-pretrain capture` again; finished shards are kept",
    )


def _differ(what: str, cached: object, run: object, remedy: str) -> list[str]:
    if cached == run:
        return []
    return [f"{what}: the cache has {cached}, the run {run}; {remedy}"]
