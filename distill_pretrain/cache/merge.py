"""One cache of the shards that captures in several places have finished; nothing is coded anew."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.finished_shards import FinishedShards, require_same_plan
from distill_pretrain.cache.manifest import Manifest
from distill_pretrain.cache.names import (
    MANIFEST_NAME,
    PLAN_NAME,
    extent_of,
    missing_ranges,
    sequence_ranges,
    shard_name,
)
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.reader import load_plan_of_extent
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch
from distill_pretrain.files.atomic import fsync_path, write_all
from distill_pretrain.files.disk import problem
from distill_pretrain.files.storage import Storage, is_remote, open_storage

RECIPE_NAME = "recipe.yaml"

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What `merge_caches` did.

    Attributes:
        plan: of the merged cache, with the extent that was asked for.
        manifest: as published; None while shards are missing.
        missing: (first, last) sequences of the shards that no cache has finished, neighbours joined.
        missing_shards: number of those shards.
        linked: shards that share their bytes on disk with a source.
        copied: shards that were copied.
    """

    plan: CachePlan
    manifest: Manifest | None
    missing: tuple[tuple[int, int], ...]
    missing_shards: int
    linked: int
    copied: int


def merge_caches(
    dest: Path,
    sources: Sequence[str | Path],
    *,
    num_sequences: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeResult:
    """Bring the finished shards of caches with one plan together in a folder.

    The folder may hold a cache of that plan already, finished or not, and captures may be writing to it. Killed and
    run again, it goes on. Shard files are hard-linked where the file system can, else copied and compared with their
    sha256; a linked file is as sound as the source's.

    Args:
        dest: folder of the merged cache.
        sources: folders or URLs of caches, finished or not; of equal shards the first is taken.
        num_sequences: extent of the merged cache; None for the largest that a manifest states or a finished shard
            reaches. What a capture was only asked for does not count.
        progress: called with (shards done, shards to do).

    Raises:
        CacheMismatch: plans differ, or two caches hold a shard with different bytes; nothing was written.
        CacheIncomplete: a source is no cache.
        CacheCorrupt: a plan, tables or a copied shard is damaged.
        CacheError: a source is the destination, a source cannot be read, or the folder cannot be written.
    """
    storages = [open_storage(source) for source in sources]
    for storage in storages:
        require_another_folder(dest, storage.location)
    if (dest / PLAN_NAME).exists():
        storages.insert(0, open_storage(dest))
    plan = _common_plan(storages, num_sequences)
    holders = [FinishedShards(storage, plan) for storage in storages]
    _require_same_shards(holders)
    writer = CacheWriter.create_or_resume(
        dest,
        replace(plan, codec_sha256=None),
        make_tables=lambda: _tables(holders[0], plan.codec_sha256),
    )
    first = {shard: holder for holder in reversed(holders) for shard in holder.records}
    wanted = sorted(first.keys() - _done(writer))
    counts = {"linked": 0, "copied": 0}
    for number, shard in enumerate(wanted, start=1):
        _take(writer, first[shard], shard, counts)
        progress(number, len(wanted))
    finished = _done(writer)
    missing = missing_ranges(writer.plan, finished)
    return MergeResult(
        plan=writer.plan,
        manifest=None if missing else writer.publish_manifest(),
        missing=tuple(missing),
        missing_shards=writer.plan.num_shards - len(finished),
        **counts,
    )


def require_another_folder(dest: Path, source: str) -> None:
    """Raise CacheError if a cache would be written over the one it is made from."""
    if not is_remote(source) and Path(source).resolve() == dest.resolve():
        raise CacheError(
            "the cache to write is also one to read",
            where=dest,
            remedy="name another folder as DEST",
        )


def copy_file(storage: Storage, name: str, target: Path, sha256: str | None = None) -> None:
    """Copy a file of a cache; it is durable, or not there.

    Raises:
        FileNotFoundError: there is none.
        CacheCorrupt: its sha256 is another one than given.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    digest, offset = hashlib.sha256(), 0
    with closing(storage.open(name)) as file:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            while data := file.read(min(_CHUNK_BYTES, file.size - offset), offset):
                write_all(fd, data, offset)
                digest.update(data)
                offset += len(data)
            os.fsync(fd)
            if sha256 not in (None, digest.hexdigest()):
                raise CacheCorrupt(
                    "a shard is not what its done record says",
                    where=f"{storage.location}/{name}",
                    found=f"sha256 {digest.hexdigest()[:12]}",
                    expected=sha256,
                    remedy="run `distill-pretrain verify --repair` on that cache, or leave it out",
                )
            os.replace(temporary, target)
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)
    fsync_path(target.parent)


def copy_recipe(source: str | Path, dest: Path) -> None:
    """Copy the recipe that a cache was captured with into another folder, if it is there.

    Raises:
        CacheError: it cannot be read or written.
    """
    target = dest / RECIPE_NAME
    try:
        copy_file(open_storage(source), RECIPE_NAME, target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheError(
            "the recipe of the cache cannot be copied",
            where=target,
            found=problem(error, target),
            remedy="free space or correct permissions and run again; finished shards are kept",
        ) from error


def _done(writer: CacheWriter) -> list[int]:
    return FinishedShards(open_storage(writer.folder), writer.plan).done()


def _reach(storage: Storage, plan: CachePlan) -> int:
    """Sequences up to the end of a cache's manifest or of its last finished shard, at least 1."""
    try:
        manifest = Manifest.from_json_bytes(storage.read(MANIFEST_NAME), plan)
        stated = manifest.plan.num_sequences
    except (FileNotFoundError, CacheCorrupt):
        stated = 1
    names = storage.sizes().keys()
    recorded = (n for n in names if n.endswith(".dpt") and n.removesuffix("dpt") + "json" in names)
    return max(stated, extent_of(plan, recorded))


def _common_plan(storages: list[Storage], num_sequences: int | None) -> CachePlan:
    plans = [load_plan_of_extent(storage) for storage in storages]
    for storage, plan in zip(storages[1:], plans[1:], strict=True):
        require_same_plan(
            plan,
            plans[0],
            where=f"{storage.location}; expected: that of {storages[0].location}",
            remedy="merge caches captured with one recipe, teacher and codec tables "
            "(capture.codec_tables), or name another folder as DEST",
        )
    if num_sequences is None:
        num_sequences = max(map(_reach, storages, plans))
    return plans[0].with_extent(num_sequences)


def _require_same_shards(holders: list[FinishedShards]) -> None:
    first: dict[int, FinishedShards] = {}
    for holder in holders:
        for shard, record in holder.records.items():
            other = first.setdefault(shard, holder)
            if other.records[shard].sha256 != record.sha256:
                raise CacheMismatch(
                    "two caches hold the same shard with different bytes",
                    where=f"shard {shard} (sequences {sequence_ranges(holder.plan, [shard])})",
                    found=f"sha256 {other.records[shard].sha256[:12]} in {other.storage.location}, "
                    f"{record.sha256[:12]} in {holder.storage.location}",
                    expected="one plan gives one sequence of bytes on equal hardware and libraries",
                    remedy="leave one of the two caches out, or remove that shard's .dpt and .json from it "
                    "(both are sound if `distill-pretrain verify` says so)",
                )


def _tables(holder: FinishedShards, sha256: str | None) -> HcTables:
    codec = holder.codecs.get(sha256)
    assert isinstance(codec, HcCodec), sha256
    return codec.tables


def _take(writer: CacheWriter, holder: FinishedShards, shard: int, counts: dict[str, int]) -> None:
    """Put one shard into the merged cache, unless it is finished by now or a live process owns it."""
    record = holder.records[shard]
    own = None if record.codec_sha256 == writer.plan.codec_sha256 else record.codec_sha256
    claimed = writer.claim(
        shard,
        canary=(record.labelled, record.label_hits),
        choose_tables=None if own is None else lambda: _tables(holder, own),
    )
    if claimed is None:
        return
    name = shard_name(holder.plan, shard)

    def place(target: Path) -> None:
        if _link(holder.storage, name, target):
            counts["linked"] += 1
            return
        try:
            copy_file(holder.storage, name, target, record.sha256)
        except FileNotFoundError:
            raise CacheIncomplete(
                "a shard file vanished while caches were merged",
                where=f"{holder.storage.location}/{name}",
                remedy="run `distill-pretrain merge` again; finished shards are kept",
            ) from None
        counts["copied"] += 1

    with claimed:
        claimed.finish_with(place, record)


def _link(storage: Storage, name: str, target: Path) -> bool:
    """Whether the target is now a second name of a source's file."""
    if is_remote(storage.location):
        return False
    try:
        os.link(os.path.realpath(Path(storage.location) / name), target)
    except OSError:
        return False
    fsync_path(target)
    fsync_path(target.parent)
    return True
