"""Writing a cache: any number of processes, killed and restarted at will, one sequence of bytes.

A shard is owned through an exclusive lock on its `.part` file (see `files.ownership`), which neither this module nor
`shard_writer` opens a second time while it is owned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pretrain.cache.codec.files import CodecFiles
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.manifest import Manifest, extent_bytes, extent_from
from distill_pretrain.cache.names import (
    EXTENT_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    sequence_ranges,
)
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard import (
    ShardSpec,
)
from distill_pretrain.cache.shard_files import (
    Canary,
    LabelsOf,
    ShardFiles,
    io_errors,
    publish_tables,
)
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from distill_pretrain.files.atomic import (
    discard_stale_temporaries,
    publish_bytes,
    publish_bytes_once,
)
from distill_pretrain.files.ownership import FileLock
from distill_pretrain.files.storage import open_storage

_PUBLISH_LOCK = ".publish.lock"


class CacheWriter:
    """The writer of a cache in one process; any number of processes may write one cache.

    Attributes:
        folder: of the cache.
        plan: what it holds, the codec's tables included.
    """

    def __init__(self, folder: Path, plan: CachePlan, labels_of: LabelsOf | None, sync_every: int):
        """Use `CacheWriter.create_or_resume`."""
        self.folder = folder
        self.plan = plan
        self._files = ShardFiles(folder, plan, labels_of)
        self._sync_every = sync_every
        self._codecs = CodecFiles(open_storage(folder), plan)
        self._codecs.get(plan.codec_sha256)

    @classmethod
    def create_or_resume(
        cls,
        folder: Path,
        plan: CachePlan,
        *,
        make_tables: Callable[[], HcTables] | None = None,
        labels_of: LabelsOf | None = None,
        sync_every: int = 64,
    ) -> CacheWriter:
        """Start a cache, or join the one in `folder` when its plan is the same.

        A cache grows: a plan that differs only in `num_sequences` keeps the full shards there are.

        Args:
            folder: of the cache; created.
            plan: of the cache. With `codec_sha256` None and a codec that needs tables, the tables are those that
                the folder has by then, whoever made them; a plan that names its tables accepts no others.
            make_tables: makes the tables of a new cache; called only where the folder has no plan yet.
            labels_of: sequence number -> int32[L] next tokens (-100 for none), for the canary; all
                writers of a cache give it, or none does.
            sync_every: blocks between two fsyncs.

        Raises:
            CacheMismatch: the folder holds another cache; nothing in it was touched.
            CacheError: the folder cannot be written.
        """
        folder = Path(folder)
        path = folder / PLAN_NAME
        with io_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
        if is_new:
            made = plan
            if plan.has_tables and make_tables is not None:
                tables = make_tables()
                with io_errors(folder):
                    made = plan.with_tables(publish_tables(folder, tables))
            with io_errors(path):
                publish_bytes_once(path, made.to_json_bytes())
        with io_errors(path):
            stored = path.read_bytes()
        found = CachePlan.from_json_bytes(stored, num_sequences=plan.num_sequences)
        plan = plan.joining(found)
        if found != plan:
            raise CacheMismatch(
                "the folder holds a cache made from something else",
                where=folder,
                found="\n  " + "\n  ".join(found.differences(plan)) + "\n",
                remedy="set capture.output_dir to a new folder, or undo the change of the recipe",
            )
        with io_errors(folder):
            if _known_extent(folder / EXTENT_NAME) < plan.num_sequences:
                with _publishing(folder):
                    _raise_extent(folder / EXTENT_NAME, plan.num_sequences)
            discard_stale_temporaries(folder)
        return cls(folder, plan, labels_of, sync_every)

    def pending(self) -> list[int]:
        """List the shards that are not finished, whether or not someone is writing them."""
        return [shard for shard in range(self.plan.num_shards) if self._files.record(shard) is None]

    def claim(
        self,
        shard: int,
        *,
        canary: Canary | None = None,
        choose_tables: Callable[[], HcTables | None] | None = None,
    ) -> ShardWriter | None:
        """Take ownership of a shard; None when it is finished or a live process owns it.

        A finished file without its done record is verified in full and gets the record (None), or
        is set aside as `.bad` and written anew.

        Args:
            shard: number.
            canary: `labelled` and `label_hits` of the shard's record where they are known already.
            choose_tables: called once the shard is owned; the tables of its own to code it with, or None for the
                plan's. It must return the same tables every time.

        Raises:
            CacheError: the folder cannot be written.
        """
        part = self._files.path(shard, ".part")
        with io_errors(part):
            while self._files.record(shard) is None:
                owner = FileLock.take(part)
                if owner is None:
                    return None
                try:
                    # The owner before us may have finished between our two looks.
                    if owner.is_current() and self._files.record(shard) is None:
                        spec = self._spec(shard, choose_tables() if choose_tables else None)
                        if not self._files.adopt(spec, canary):
                            return ShardWriter(self._files, spec, owner, canary, self._sync_every)
                    if owner.is_current():
                        part.unlink()
                except BaseException:
                    owner.release()
                    raise
                owner.release()
        return None

    def discard(self, shard: int) -> None:
        """Set a finished shard aside as `.bad`, so that the next capture writes it anew."""
        with io_errors(self._files.path(shard, ".dpt")):
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
            self._files.path(shard, ".json").unlink(missing_ok=True)
            self._files.set_aside(shard)

    def publish_manifest(self) -> Manifest:
        """Write manifest.json once every shard is finished; whoever does it writes the same bytes.

        A manifest of more sequences than this writer's plan asks for is left as it is.

        Raises:
            CacheIncomplete: a shard is not finished, naming the sequences.
        """
        records = [self._files.record(shard) for shard in range(self.plan.num_shards)]
        missing = [shard for shard, record in enumerate(records) if record is None]
        if missing:
            raise CacheIncomplete(
                "the cache is not finished",
                where=self.folder,
                found=f"{len(missing)} of {len(records)} shards missing: "
                + sequence_ranges(self.plan, missing),
                remedy="run `distill-pretrain capture` again; finished shards are kept",
            )
        manifest = Manifest(
            plan=self.plan, shards=tuple(record for record in records if record is not None)
        )
        path = self.folder / MANIFEST_NAME
        data = manifest.to_json_bytes()
        with io_errors(path):
            # A finished cache, which may be kept read-only, is only looked at.
            published = path.read_bytes() if path.exists() else b""
            larger = self._larger_manifest(published)
            if (larger is not None or published == data) and not any(self._parts()):
                return larger or manifest
        with io_errors(path), _publishing(self.folder):
            self._remove_stale_parts()
            published = path.read_bytes() if path.exists() else b""
            larger = self._larger_manifest(published)
            if larger is not None:
                return larger
            if published != data:
                publish_bytes(path, data)
        return manifest

    def _remove_stale_parts(self) -> None:
        """Remove the lock files that processes killed at the wrong moment left beside finished shards."""
        for part in self._parts():
            owner = FileLock.take(part)
            if owner is not None:
                if owner.is_current():
                    part.unlink()
                owner.release()

    def _parts(self) -> Iterator[Path]:
        """The `.part` files there are."""
        for shard in range(self.plan.num_shards):
            part = self._files.path(shard, ".part")
            if part.exists():
                yield part

    def _larger_manifest(self, published: bytes) -> Manifest | None:
        try:
            found = Manifest.from_json_bytes(published, self.plan)
        except CacheCorrupt:
            return None
        return found if found.plan.num_sequences > self.plan.num_sequences else None

    def _spec(self, shard: int, tables: HcTables | None) -> ShardSpec:
        sha256 = self.plan.codec_sha256 if tables is None else publish_tables(self.folder, tables)
        return ShardSpec(self.plan, shard, self._codecs.get(sha256))


def _raise_extent(path: Path, num_sequences: int) -> None:
    if _known_extent(path) < num_sequences:
        publish_bytes(path, extent_bytes(num_sequences))


def _known_extent(path: Path) -> int:
    """Sequences that captures of a cache were asked for so far; 0 where none has said."""
    return (extent_from(path.read_bytes()) or 0) if path.exists() else 0


@contextmanager
def _publishing(folder: Path) -> Iterator[None]:
    """One process at a time looks at what is published and replaces it by something larger."""
    while (lock := FileLock.take(folder / _PUBLISH_LOCK, wait=True)) is None:
        time.sleep(0.01)  # another thread of this process has it
    try:
        yield
    finally:
        lock.release()
