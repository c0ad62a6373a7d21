"""Checking every byte of a cache, and reporting everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.files import CodecFiles, tables_name
from distill_pretrain.cache.manifest import Manifest, ShardRecord
from distill_pretrain.cache.names import (
    MANIFEST_NAME,
    merged_ranges,
    missing_ranges,
    ranges_text,
    record_name,
    shard_name,
    shards_in,
)
from distill_pretrain.cache.own_plan import require_own_plan
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.reader import load_plan_of_extent
from distill_pretrain.cache.shard import ShardFile, ShardSpec, token_hash
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.errors import CacheError
from distill_pretrain.files.atomic import publish_bytes_once
from distill_pretrain.files.storage import RangeFile, Storage, open_storage

# Where the header of a shard has the sha256 of its tables, see FORMAT.md.
_TABLES_AT, _TABLES_BYTES = 88, 32

TokensOf = Callable[[int], npt.NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What `verify_cache` found.

    Attributes:
        problems: one line each; empty for a sound cache.
        notes: one line each: what is unfinished, but no problem.
        damaged: (plan of the extent under which the shard has its name, shard) of what to capture again.
        recapture: (first, last) sequences of those shards, neighbours of one extent joined.
        shards_checked: shards looked at.
        blocks_checked: blocks whose bytes, targets and (if given) tokens were checked.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    damaged: tuple[tuple[CachePlan, int], ...]
    recapture: tuple[tuple[int, int], ...]
    shards_checked: int
    blocks_checked: int

    @property
    def damaged_shards(self) -> tuple[int, ...]:
        """The numbers of the shards to capture again, ascending."""
        return tuple(sorted({shard for _, shard in self.damaged}))


def verify_cache(
    location: str | Path,
    plan_tokens: TokensOf | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    quick: bool = False,
) -> VerifyResult:
    """Check plan, manifest, done records, and every byte of every shard.

    First the shards that the manifest lists, then those that a capture has added since. That it has not finished is a
    note where a sound manifest makes the cache usable as it is, else a problem.

    Args:
        location: folder or URL of the cache.
        plan_tokens: sequence -> int32[L] inputs, to compare the token hashes with; None skips that.
        progress: called with (shards done, shards in all).
        quick: of each shard check only its size, header, index and first and last block.

    Raises:
        CacheError: plan.json is missing, damaged or of another cache, so nothing else can be judged.
    """
    storage = open_storage(location)
    plan = load_plan_of_extent(storage)
    require_own_plan(storage, plan)
    check = _Check(storage, plan, plan_tokens, quick)
    shards = check.shards()
    damaged = []
    for done, (plan, shard) in enumerate(shards, start=1):
        known = len(check.problems)
        check.shard(plan, shard)
        if len(check.problems) > known:
            damaged.append((plan, shard))
        if progress is not None:
            progress(done, len(shards))
    recapture = []
    for _, group in groupby(damaged, key=lambda place: place[0].num_sequences):
        places = list(group)
        recapture += merged_ranges(places[0][0], [shard for _, shard in places])
    return VerifyResult(
        problems=tuple(check.problems),
        notes=tuple(check.notes),
        damaged=tuple(damaged),
        recapture=tuple(recapture),
        shards_checked=len(shards),
        blocks_checked=check.blocks,
    )


def repair_cache(folder: Path, result: VerifyResult) -> None:
    """Set the damaged shards of a folder aside, so that the next capture makes them anew.

    The manifest goes with a shard that it lists, and stays where all of those are sound.

    Raises:
        CacheError: the folder cannot be written.
    """
    path = folder / MANIFEST_NAME
    for plan, shard in result.damaged:
        writer = CacheWriter.create_or_resume(folder, plan)
        data = path.read_bytes() if path.exists() else None
        writer.discard(shard)
        if data is not None and not _lists(data, plan, shard):
            publish_bytes_once(path, data)


def _lists(data: bytes, plan: CachePlan, shard: int) -> bool:
    """Whether a manifest is damaged or lists the file that a shard has under the plan's extent."""
    try:
        shards = Manifest.from_json_bytes(data, plan).shards
    except CacheError:
        return True
    return shard < len(shards) and shards[shard].num_sequences == plan.shard_range(shard)[1]


class _Check:
    """One pass over a cache; `problems`, `notes` and `blocks` grow."""

    def __init__(
        self, storage: Storage, plan: CachePlan, plan_tokens: TokensOf | None, quick: bool
    ) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.blocks = 0
        self._plan = plan
        self._storage = storage
        self._plan_tokens = plan_tokens
        self._quick = quick
        self._codecs = CodecFiles(storage, plan)
        self._manifest = self._read_manifest()
        self._sizes = storage.sizes()

    def _read_manifest(self) -> Manifest | None:
        try:
            return Manifest.from_json_bytes(self._storage.read(MANIFEST_NAME), self._plan)
        except FileNotFoundError:
            self.problems.append(f"{MANIFEST_NAME} is missing: the capture has not finished")
        except CacheError as error:
            self.problems.append(str(error))
        return None

    def shards(self) -> list[tuple[CachePlan, int]]:
        """(plan of the extent that names the file, shard) of all to check; says what is not captured."""
        plan, manifest = self._plan, self._manifest
        present = shards_in(plan, self._sizes)
        absent = ranges_text(missing_ranges(plan, present))
        if manifest is None:
            if absent:
                self.problems.append(f"not captured: sequences {absent}")
            return [(plan, shard) for shard in present]
        finished = [(manifest.plan, record.shard) for record in manifest.shards]
        covered = manifest.plan.num_sequences
        if covered >= plan.num_sequences:
            return finished
        self.notes.append(
            f"{MANIFEST_NAME} covers {covered} of {plan.num_sequences} sequences: the capture that extends the cache "
            "has not finished" + (f"; not captured: sequences {absent}" if absent else "")
        )
        full = covered // plan.shard_sequences
        return finished + [(plan, shard) for shard in present if shard >= full]

    def _listed(self, plan: CachePlan, shard: int) -> ShardRecord | None:
        if self._manifest is None or plan.num_sequences > self._manifest.plan.num_sequences:
            return None
        return self._manifest.shards[shard]

    def shard(self, plan: CachePlan, shard: int) -> None:
        """Check one shard."""
        known = len(self.problems)
        record, listed = self._record(plan, shard), self._listed(plan, shard)
        if record is not None and listed is not None and record != listed:
            self.problems.append(f"shard {shard}: the done record and the manifest differ")
        name = shard_name(plan, shard)
        try:
            with closing(self._storage.open(name)) as data:
                coded = record or listed
                tables = coded.codec_sha256 if coded else self._tables_of(data)
                spec = ShardSpec(plan, shard, self._codecs.get(tables))
                file = ShardFile(data, spec, f"{self._storage.location}/{name}")
                self._compare_digests(file, record, listed)
                self._check_blocks(file)
        except FileNotFoundError:
            self.problems.append(f"shard {shard}: {self._storage.location}/{name} is missing")
        except CacheError as error:
            self.problems.append(str(error))
        if record is None and len(self.problems) == known:
            self.notes.append(
                f"shard {shard}: no done record, but the file is sound: it was just finished, or its writer was "
                "killed, and the next capture writes the record"
            )

    def _record(self, plan: CachePlan, shard: int) -> ShardRecord | None:
        try:
            data = self._storage.read(record_name(plan, shard))
            return ShardRecord.from_json_bytes(data, plan, shard)
        except FileNotFoundError:
            pass
        except CacheError as error:
            self.problems.append(str(error))
        return None

    def _tables_of(self, data: RangeFile) -> str | None:
        """Tables that a shard without a record names in its header, if the cache has them, else the plan's."""
        named = data.read(_TABLES_BYTES, _TABLES_AT).hex()
        return named if tables_name(named) in self._sizes else self._plan.codec_sha256

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
            sequence, offset, size = spec.plan.block_place(spec.shard, block)
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
