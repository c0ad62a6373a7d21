"""Checking every byte of a cache, and reporting everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import CacheError
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_reader import load_plan_of_extent
from distill_pretrain.formats.codec_files import CodecFiles
from distill_pretrain.formats.manifest import Manifest, ShardRecord
from distill_pretrain.formats.names import (
    MANIFEST_NAME,
    merged_ranges,
    missing_ranges,
    ranges_text,
    record_name,
    shard_name,
    shards_in,
)
from distill_pretrain.formats.shard import ShardFile, ShardSpec, token_hash
from distill_pretrain.formats.storage import Storage, open_storage

TokensOf = Callable[[int], npt.NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What `verify_cache` found.

    Attributes:
        problems: one line each; empty for a sound cache.
        damaged_shards: shards to capture again, ascending.
        recapture: (first, last) sequences of those shards, neighbours joined.
        shards_checked: shards looked at.
        blocks_checked: blocks whose bytes, targets and (if given) tokens were checked.
    """

    problems: tuple[str, ...]
    damaged_shards: tuple[int, ...]
    recapture: tuple[tuple[int, int], ...]
    shards_checked: int
    blocks_checked: int


def verify_cache(
    location: str | Path,
    plan_tokens: TokensOf | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    quick: bool = False,
) -> VerifyResult:
    """Check plan, manifest, done records, and every byte of every shard.

    Args:
        location: folder or URL of the cache.
        plan_tokens: sequence -> int32[L] inputs, to compare the token hashes with; None skips that.
        progress: called with (shards done, shards in all).
        quick: of each shard check only its size, header, index and first and last block.

    Raises:
        CacheError: plan.json is missing or damaged, so nothing else can be judged.
    """
    storage = open_storage(location)
    check = _Check(storage, load_plan_of_extent(storage), plan_tokens, quick)
    plan = check.plan
    shards = sorted(check.listed.keys() | set(shards_in(plan, storage.sizes())))
    absent = missing_ranges(plan, shards)
    if absent:
        check.problems.append(f"not captured: sequences {ranges_text(absent)}")
    damaged = []
    for done, shard in enumerate(shards, start=1):
        known = len(check.problems)
        check.shard(shard)
        if len(check.problems) > known:
            damaged.append(shard)
        if progress is not None:
            progress(done, len(shards))
    return VerifyResult(
        problems=tuple(check.problems),
        damaged_shards=tuple(damaged),
        recapture=tuple(merged_ranges(plan, damaged)),
        shards_checked=len(shards),
        blocks_checked=check.blocks,
    )


class _Check:
    """One pass over a cache; `problems` and `blocks` grow, `listed` has the manifest's records."""

    def __init__(
        self, storage: Storage, plan: CachePlan, plan_tokens: TokensOf | None, quick: bool
    ) -> None:
        self.plan = plan
        self.problems: list[str] = []
        self.blocks = 0
        self._storage = storage
        self._plan_tokens = plan_tokens
        self._quick = quick
        self._codecs = CodecFiles(storage, plan)
        self.listed = self._manifest_records()

    def _manifest_records(self) -> dict[int, ShardRecord]:
        try:
            manifest = Manifest.from_json_bytes(self._storage.read(MANIFEST_NAME), self.plan)
        except FileNotFoundError:
            self.problems.append(f"{MANIFEST_NAME} is missing: the capture has not finished")
            return {}
        except CacheError as error:
            self.problems.append(str(error))
            return {}
        if manifest.plan.num_sequences < self.plan.num_sequences:
            self.problems.append(
                f"{MANIFEST_NAME} covers {manifest.plan.num_sequences} of {self.plan.num_sequences} sequences: the "
                "capture that extends the cache has not finished"
            )
        records = manifest.shards
        return {r.shard: r for r in records if self._is_in_plan(r)}

    def _is_in_plan(self, record: ShardRecord) -> bool:
        """Whether this run of the check meets the shard: a short last one may have been replaced."""
        return self.plan.shard_range(record.shard)[1] == record.num_sequences

    def shard(self, shard: int) -> None:
        """Check one shard."""
        record, listed = self._record(shard), self.listed.get(shard)
        if record is not None and listed is not None and record != listed:
            self.problems.append(f"shard {shard}: the done record and the manifest differ")
        name = shard_name(self.plan, shard)
        known = record or listed
        try:
            codec = self._codecs.get(known.codec_sha256 if known else self.plan.codec_sha256)
            where = f"{self._storage.location}/{name}"
            spec = ShardSpec(self.plan, shard, codec)
            with ShardFile(self._storage.open(name), spec, where) as file:
                self._compare_digests(file, record, listed)
                self._check_blocks(file)
        except FileNotFoundError:
            self.problems.append(f"shard {shard}: {self._storage.location}/{name} is missing")
        except CacheError as error:
            self.problems.append(str(error))

    def _record(self, shard: int) -> ShardRecord | None:
        try:
            data = self._storage.read(record_name(self.plan, shard))
            return ShardRecord.from_json_bytes(data, self.plan, shard)
        except FileNotFoundError:
            self.problems.append(f"shard {shard}: no done record")
        except CacheError as error:
            self.problems.append(str(error))
        return None

    def _compare_digests(
        self, file: ShardFile, record: ShardRecord | None, listed: ShardRecord | None
    ) -> None:
        digest = None if self._quick else file.sha256()
        for name, known in (("done record", record), ("manifest", listed)):
            if known is None or (digest in (None, known.sha256) and known.size == file.size):
                continue
            self.problems.append(
                f"shard {known.shard}: sha256 {digest and digest[:12]} and {file.size} bytes; the {name} "
                f"says {known.sha256[:12]} and {known.size} bytes"
            )

    def _check_blocks(self, file: ShardFile) -> None:
        spec = file.spec
        tokens = np.empty(0, np.int32)
        blocks = range(spec.num_blocks)
        for block in sorted({0, spec.num_blocks - 1}) if self._quick else blocks:
            sequence, offset, size = self.plan.block_place(spec.shard, block)
            self.blocks += 1
            if self._plan_tokens is not None and (offset == 0 or self._quick):
                tokens = self._plan_tokens(sequence)
            try:
                frame = file.frames(block, 1)[0]
                spec.decode(frame, block)
            except CacheError as error:
                self.problems.append(str(error))
                continue
            if self._plan_tokens is None:
                continue
            if token_hash(tokens[offset : offset + size]) != frame.token_hash:
                where = spec.where(block)
                self.problems.append(
                    f"the tokens differ from those the teacher saw; where: {where}"
                )
