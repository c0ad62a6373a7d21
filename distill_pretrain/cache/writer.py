"""Writing a cache: any number of processes, killed and restarted at will, one sequence of bytes.

A shard is owned through an exclusive lock on its `.part` file (see `ownership`), which this module never opens a
second time while it owns it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.files import CodecFiles, tables_name
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.manifest import Manifest, ShardRecord, extent_bytes, extent_from
from distill_pretrain.cache.names import (
    EXTENT_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    record_name,
    sequence_ranges,
    shard_name,
)
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard import (
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    INDEX_DTYPE,
    ShardFile,
    ShardSpec,
    closing_bytes,
    token_hash,
)
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch
from distill_pretrain.files.atomic import (
    discard_stale_temporaries,
    fsync_path,
    publish_bytes,
    publish_bytes_once,
    write_all,
)
from distill_pretrain.files.closing import Closing
from distill_pretrain.files.disk import problem
from distill_pretrain.files.ownership import FileLock
from distill_pretrain.files.storage import LocalFile, open_storage, read_exactly

_PUBLISH_LOCK = ".publish.lock"
LabelsOf = Callable[[int], npt.NDArray[np.int32]]
Canary = tuple[int | None, int | None]


class CacheWriter:
    """One process's hand in a cache folder.

    Attributes:
        folder: of the cache.
        plan: what it holds, the codec's tables included.
    """

    def __init__(self, folder: Path, plan: CachePlan, labels_of: LabelsOf | None, sync_every: int):
        """Use `CacheWriter.create_or_resume`."""
        self.folder = folder
        self.plan = plan
        self._labels_of = labels_of
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
        with _io_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
        if is_new:
            made = plan
            if plan.has_tables and make_tables is not None:
                tables = make_tables()
                with _io_errors(folder):
                    made = plan.with_tables(publish_tables(folder, tables))
            with _io_errors(path):
                publish_bytes_once(path, made.to_json_bytes())
        with _io_errors(path):
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
        with _io_errors(folder):
            if _known_extent(folder / EXTENT_NAME) < plan.num_sequences:
                with _publishing(folder):
                    _raise_extent(folder / EXTENT_NAME, plan.num_sequences)
            discard_stale_temporaries(folder)
        return cls(folder, plan, labels_of, sync_every)

    def pending(self) -> list[int]:
        """Shards that are not finished, whether or not someone is writing them."""
        return [shard for shard in range(self.plan.num_shards) if self._record(shard) is None]

    def claim(
        self,
        shard: int,
        *,
        canary: Canary | None = None,
        choose_tables: Callable[[], HcTables | None] | None = None,
    ) -> ShardWriter | None:
        """Ownership of a shard, or None when it is finished or a live process owns it.

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
        part = self._path(shard, ".part")
        with _io_errors(part):
            while self._record(shard) is None:
                owner = FileLock.take(part)
                if owner is None:
                    return None
                try:
                    # The owner before us may have finished between our two looks.
                    if owner.is_current() and self._record(shard) is None:
                        spec = self._spec(shard, choose_tables() if choose_tables else None)
                        if not self._adopt(spec, canary):
                            return ShardWriter(self, spec, owner, canary)
                    if owner.is_current():
                        part.unlink()
                except BaseException:
                    owner.release()
                    raise
                owner.release()
        return None

    def discard(self, shard: int) -> None:
        """Set a finished shard aside as `.bad`, so that the next capture writes it anew."""
        with _io_errors(self._path(shard, ".dpt")):
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
            self._path(shard, ".json").unlink(missing_ok=True)
            self._set_aside(shard)

    def publish_manifest(self) -> Manifest:
        """Write manifest.json once every shard is finished; whoever does it writes the same bytes.

        A manifest of more sequences than this writer's plan asks for is left as it is.

        Raises:
            CacheIncomplete: a shard is not finished, naming the sequences.
        """
        records = [self._record(shard) for shard in range(self.plan.num_shards)]
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
        with _io_errors(path):
            # A finished cache, which may be kept read-only, is only looked at.
            published = path.read_bytes() if path.exists() else b""
            larger = self._larger_manifest(published)
            if (larger is not None or published == data) and not any(self._parts()):
                return larger or manifest
        with _io_errors(path), _publishing(self.folder):
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
            part = self._path(shard, ".part")
            if part.exists():
                yield part

    def _larger_manifest(self, published: bytes) -> Manifest | None:
        try:
            found = Manifest.from_json_bytes(published, self.plan)
        except CacheCorrupt:
            return None
        return found if found.plan.num_sequences > self.plan.num_sequences else None

    def _path(self, shard: int, suffix: str) -> Path:
        name = shard_name(self.plan, shard)
        if suffix == ".part":
            return self.folder / f"{name}.part"
        return self.folder / (name.removesuffix(".dpt") + suffix)

    def _record(self, shard: int) -> ShardRecord | None:
        """The done record of a finished shard whose file has the recorded size."""
        path = self._path(shard, ".json")
        try:
            with _io_errors(path, besides=FileNotFoundError):
                record = ShardRecord.from_json_bytes(path.read_bytes(), self.plan, shard)
                size = self._path(shard, ".dpt").stat().st_size
        except (FileNotFoundError, CacheCorrupt):
            return None
        return record if size == record.size else None

    def _spec(self, shard: int, tables: HcTables | None) -> ShardSpec:
        sha256 = self.plan.codec_sha256 if tables is None else publish_tables(self.folder, tables)
        return ShardSpec(self.plan, shard, self._codecs.get(sha256))

    def _set_aside(self, shard: int) -> None:
        final = self._path(shard, ".dpt")
        if final.exists():
            os.replace(final, self._path(shard, ".bad"))
            fsync_path(self.folder)

    def _adopt(self, spec: ShardSpec, canary: Canary | None) -> bool:
        """Whether a finished file without record is sound; its record is written if so."""
        final = self._path(spec.shard, ".dpt")
        if not final.exists():
            return False
        try:
            with ShardFile(LocalFile.open(final), spec, str(final)) as file:
                counts = self._canary(spec, file, canary)
                self._publish_record(spec, file.sha256(), file.size, counts)
        except CacheCorrupt:
            self._set_aside(spec.shard)
            return False
        return True

    def _publish_record(self, spec: ShardSpec, sha256: str, size: int, counts: _Counts) -> None:
        first, count = self.plan.shard_range(spec.shard)
        record = ShardRecord(
            plan_id=self.plan.plan_id,
            shard=spec.shard,
            first_sequence=first,
            num_sequences=count,
            size=size,
            sha256=sha256,
            blocks=spec.num_blocks,
            tokens=count * self.plan.seq_len,
            entries=counts.entries,
            labelled=counts.labelled,
            label_hits=counts.label_hits,
            codec_sha256=spec.codec.tables_sha256,
        )
        publish_bytes(self.folder / record_name(self.plan, spec.shard), record.to_json_bytes())

    def _canary(self, spec: ShardSpec, file: ShardFile, known: Canary | None) -> _Counts:
        """Decode every block once more, as read back from the file; count what is not known."""
        labels_of = self._labels_of if known is None else None
        entries = labelled = hits = 0
        labels = np.empty(0, np.int32)
        for block in range(spec.num_blocks):
            targets = spec.decode(file.frames(block, 1)[0], block)
            entries += len(targets.ids)
            if labels_of is None:
                continue
            sequence, offset, size = self.plan.block_place(spec.shard, block)
            if offset == 0:
                labels = labels_of(sequence)
                assert labels.shape == (self.plan.seq_len,), labels.shape
            wanted = labels[offset : offset + size]
            labelled += int(np.count_nonzero((wanted >= 0) & (targets.entries_per_token > 0)))
            hits += int(
                np.count_nonzero(np.repeat(wanted, targets.entries_per_token) == targets.ids)
            )
        if labels_of is None:
            return _Counts(entries, *(known or (None, None)))
        return _Counts(entries, labelled, hits)


class _Counts(NamedTuple):
    """What a done record says of a shard's targets."""

    entries: int
    labelled: int | None
    label_hits: int | None


class ShardWriter(Closing):
    """The owner of one unfinished shard; leaving it unfinished keeps every block written so far.

    Attributes:
        shard: number.
        num_blocks: blocks of the whole shard.
        next_block: the block that `append` takes next; > 0 after a resume.
        codec: what the shard is coded with.
    """

    def __init__(
        self, cache: CacheWriter, spec: ShardSpec, owner: FileLock, canary: Canary | None
    ) -> None:
        """Use `CacheWriter.claim`."""
        self.shard = spec.shard
        self.num_blocks = spec.num_blocks
        self.next_block = 0
        self.codec = spec.codec
        self._canary = canary
        self._cache = cache
        self._spec = spec
        self._owner = owner
        self._index = np.zeros(self.num_blocks, INDEX_DTYPE)
        self._end = HEADER_BYTES
        self._durable = 0
        self._resume()

    def place(self, block: int) -> tuple[int, int, int]:
        """(sequence, offset of the first position, positions) of a block."""
        return self._spec.plan.block_place(self.shard, block)

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._end

    def append(self, targets: RaggedTargets, tokens: npt.NDArray[np.int32]) -> None:
        """Write the next block.

        Args:
            targets: of T positions, as many as `place(next_block)` says.
            tokens: int32[T], the inputs the teacher saw at these positions.

        Raises:
            CacheError: the write failed (disk full, ...); earlier blocks are kept.
        """
        assert tokens.shape == targets.entries_per_token.shape, tokens.shape
        self.append_hashed(targets, token_hash(tokens))

    def append_hashed(self, targets: RaggedTargets, hashed: int) -> None:
        """As `append`, for tokens of which only the `token_hash` is known."""
        block, size = self.next_block, self.place(self.next_block)[2]
        assert targets.entries_per_token.shape == (size,), (targets.entries_per_token.shape, size)
        frame = self._spec.frame_bytes(block, targets, hashed)
        try:
            with _io_errors(self._owner.path):
                write_all(self._owner.fd, frame, self._end)
                self._add(len(frame), len(targets.ids), hashed)
                if (block + 1) % self._cache._sync_every == 0:
                    self._sync()
        except CacheError:
            self.close()
            raise

    def finish(self) -> None:
        """Write index and footer, make the file durable, rename it, publish the done record.

        Raises:
            CacheError: a write failed; a later run continues.
        """
        assert self.next_block == self.num_blocks, (self.next_block, self.num_blocks)
        final = self._cache._path(self.shard, ".dpt")
        try:
            with _io_errors(self._owner.path):
                write_all(self._owner.fd, closing_bytes(self._index), self._end)
                self._sync()
                os.replace(self._owner.path, final)
                fsync_path(final.parent)
                # As read back.
                opened = LocalFile(self._owner.fd, str(final), owned=False)
                file = ShardFile(opened, self._spec, str(final))
                counts = self._cache._canary(self._spec, file, self._canary)
                self._cache._publish_record(self._spec, file.sha256(), file.size, counts)
        finally:
            self.close()

    def finish_with(self, place: Callable[[Path], None], record: ShardRecord) -> None:
        """Finish with a file from elsewhere instead; blocks written here so far are dropped.

        Args:
            place: puts the whole file, durable, under the name it is given.
            record: of that file.

        Raises:
            CacheError: a write failed; a later run continues.
        """
        final = self._cache._path(self.shard, ".dpt")
        try:
            with _io_errors(final):
                place(final)
                self._owner.path.unlink()
                publish_bytes(final.with_suffix(".json"), record.to_json_bytes())
        finally:
            self.close()

    def close(self) -> None:
        """Give the shard up; unfinished work is picked up by the next owner."""
        self._owner.release()

    def _add(self, length: int, entries: int, hashed: int) -> None:
        self._index[self.next_block] = (self._end, length, entries, 0, hashed)
        self._end += length
        self.next_block += 1

    def _sync(self) -> None:
        """Make the file durable; on failure keep only what an earlier fsync confirmed.

        After a failed fsync the kernel may have dropped the pages, so reading them back proves
        nothing and calling it again would report success.
        """
        try:
            os.fsync(self._owner.fd)
        except OSError:
            os.ftruncate(self._owner.fd, self._durable)
            raise
        self._durable = self._end

    def _resume(self) -> None:
        """Keep the sound frames at the start of the file, cut off the rest."""
        fd, spec = self._owner.fd, self._spec
        if read_exactly(fd, HEADER_BYTES, 0) != spec.header:
            os.ftruncate(fd, 0)
            write_all(fd, spec.header, 0)
            return
        try:
            while self.next_block < self.num_blocks:
                length = spec.claimed_length(read_exactly(fd, FRAME_HEAD_BYTES, self._end))
                frame = spec.parse(memoryview(read_exactly(fd, length, self._end)), self.next_block)
                spec.decode(frame, self.next_block)
                self._add(frame.length, frame.num_entries, frame.token_hash)
        except CacheCorrupt:
            pass
        os.ftruncate(fd, self._end)


def publish_tables(folder: Path, tables: HcTables) -> str:
    """Write codec tables into a cache folder under their sha256, which is returned."""
    path = folder / tables_name(tables.sha256)
    if not path.exists():
        publish_bytes(path, tables.to_bytes())
    return tables.sha256


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


@contextmanager
def _io_errors(path: Path, besides: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    try:
        yield
    except besides:
        raise
    except OSError as error:
        raise CacheError(
            "the cache cannot be written",
            where=error.filename or path,
            found=problem(error, path),
            remedy="free space or correct permissions and run again; finished blocks are kept",
        ) from error
