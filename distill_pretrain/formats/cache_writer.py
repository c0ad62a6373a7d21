"""Writing a cache: any number of processes, killed and restarted at will, one sequence of bytes.

A shard is owned through an exclusive POSIX record lock on its `.part` file, which the kernel drops
when the owner dies. Such locks belong to a process and vanish when it closes *any* descriptor of
the file, so this module opens a `.part` it already owns never a second time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch
from distill_pretrain.formats.atomic import (
    fsync_path,
    publish_bytes,
    publish_bytes_once,
    sha256_fd,
    write_all,
)
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.closing import Closing
from distill_pretrain.formats.manifest import Manifest, ShardRecord
from distill_pretrain.formats.shard import (
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    INDEX_DTYPE,
    ShardFile,
    claimed_length,
    closing_bytes,
    decode_frame,
    frame_bytes,
    header_bytes,
    parse_frame,
    read_exactly,
    shard_name,
    token_hash,
)

PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
LabelsOf = Callable[[int], npt.NDArray[np.int32]]


class CacheWriter:
    """One process's hand in a cache folder."""

    def __init__(self, folder: Path, plan: CachePlan, labels_of: LabelsOf | None, sync_every: int):
        """Use `CacheWriter.create_or_resume`."""
        self.folder = folder
        self.plan = plan
        self._labels_of = labels_of
        self._sync_every = sync_every

    @classmethod
    def create_or_resume(
        cls,
        folder: Path,
        plan: CachePlan,
        *,
        labels_of: LabelsOf | None = None,
        sync_every: int = 64,
    ) -> CacheWriter:
        """Start a cache, or join the one in `folder` when its plan is the same.

        Args:
            folder: of the cache; created.
            plan: of the cache.
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
            if not path.exists():
                publish_bytes_once(path, plan.to_json_bytes())
            stored = path.read_bytes()
        found = CachePlan.from_json_bytes(stored)
        if found != plan:
            raise CacheMismatch(
                "the folder holds a cache made from something else",
                where=folder,
                found="\n  " + "\n  ".join(found.differences(plan)) + "\n",
                remedy="set capture.output_dir to a new folder, or undo the change of the recipe",
            )
        return cls(folder, plan, labels_of, sync_every)

    def pending(self) -> list[int]:
        """Shards that are not finished, whether or not someone is writing them."""
        return [shard for shard in range(self.plan.num_shards) if self._record(shard) is None]

    def claim(self, shard: int) -> ShardWriter | None:
        """Ownership of a shard, or None when it is finished or a live process owns it.

        A finished file without its done record is verified in full and gets the record (None), or
        is set aside as `.bad` and written anew.

        Raises:
            CacheError: the folder cannot be written.
        """
        part = self._path(shard, ".part")
        with _io_errors(part):
            while self._record(shard) is None:
                owner = _Ownership.take(part)
                if owner is None:
                    return None
                try:
                    # The owner before us may have finished between our two looks.
                    unfinished = owner.is_current() and self._record(shard) is None
                    if unfinished and not self._adopt(shard):
                        return ShardWriter(self, shard, owner)
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
            if not (path.exists() and path.read_bytes() == data):
                publish_bytes(path, data)
        return manifest

    def _path(self, shard: int, suffix: str) -> Path:
        name = shard_name(shard)
        return self.folder / (name + ".part" if suffix == ".part" else name[:-4] + suffix)

    def _record(self, shard: int) -> ShardRecord | None:
        """The done record of a finished shard whose file has the recorded size."""
        try:
            data = self._path(shard, ".json").read_bytes()
            record = ShardRecord.from_json_bytes(data, self.plan, shard)
            size = self._path(shard, ".dpt").stat().st_size
        except (FileNotFoundError, CacheCorrupt):
            return None
        return record if size == record.size else None

    def _set_aside(self, shard: int) -> None:
        final = self._path(shard, ".dpt")
        if final.exists():
            os.replace(final, self._path(shard, ".bad"))
            fsync_path(self.folder)

    def _adopt(self, shard: int) -> bool:
        """Whether a finished file without record is sound; its record is written if so."""
        final = self._path(shard, ".dpt")
        if not final.exists():
            return False
        try:
            with ShardFile(final, self.plan, shard) as file:
                self._publish_record(shard, file.fd, file.index)
        except CacheCorrupt:
            self._set_aside(shard)
            return False
        return True

    def _publish_record(self, shard: int, fd: int, index: npt.NDArray[np.void]) -> None:
        """Decode every frame once more, as read back from the file, then write the done record."""
        first, count = self.plan.shard_range(shard)
        labelled, hits = self._canary(shard, fd, index)
        record = ShardRecord(
            plan_id=self.plan.plan_id,
            shard=shard,
            first_sequence=first,
            num_sequences=count,
            size=os.fstat(fd).st_size,
            sha256=sha256_fd(fd),
            blocks=len(index),
            tokens=count * self.plan.seq_len,
            entries=int(index["entries"].sum(dtype=np.int64)),
            labelled=None if self._labels_of is None else labelled,
            label_hits=None if self._labels_of is None else hits,
        )
        publish_bytes(self._path(shard, ".json"), record.to_json_bytes())

    def _canary(self, shard: int, fd: int, index: npt.NDArray[np.void]) -> tuple[int, int]:
        """(labelled positions, of those with the label among the stored ids)."""
        labelled = hits = 0
        labels = np.empty(0, np.int32)
        for block, row in enumerate(index):
            data = memoryview(read_exactly(fd, int(row["length"]), int(row["offset"])))
            targets = decode_frame(
                parse_frame(data, self.plan, shard, block), self.plan, shard, block
            )
            if self._labels_of is None:
                continue
            sequence, offset, size = self.plan.block_place(shard, block)
            if offset == 0:
                labels = self._labels_of(sequence)
                assert labels.shape == (self.plan.seq_len,), labels.shape
            wanted = labels[offset : offset + size]
            labelled += int(np.count_nonzero((wanted >= 0) & (targets.entries_per_token > 0)))
            hits += int(
                np.count_nonzero(np.repeat(wanted, targets.entries_per_token) == targets.ids)
            )
        return labelled, hits


class ShardWriter(Closing):
    """The owner of one unfinished shard; leaving it unfinished keeps every block written so far.

    Attributes:
        shard: number.
        num_blocks: blocks of the whole shard.
        next_block: the block that `append` takes next; > 0 after a resume.
    """

    def __init__(self, cache: CacheWriter, shard: int, owner: _Ownership) -> None:
        """Use `CacheWriter.claim`."""
        self.shard = shard
        self.num_blocks = cache.plan.shard_blocks(shard)
        self.next_block = 0
        self._cache = cache
        self._plan = cache.plan
        self._owner = owner
        self._index = np.zeros(self.num_blocks, INDEX_DTYPE)
        self._end = HEADER_BYTES
        self._durable = 0
        self._resume()

    def place(self, block: int) -> tuple[int, int, int]:
        """(sequence, offset of the first position, positions) of a block."""
        return self._plan.block_place(self.shard, block)

    def append(self, targets: RaggedTargets, tokens: npt.NDArray[np.int32]) -> None:
        """Write the next block.

        Args:
            targets: of T positions, as many as `place(next_block)` says.
            tokens: int32[T], the inputs the teacher saw at these positions.

        Raises:
            CacheError: the write failed (disk full, ...); earlier blocks are kept.
        """
        block, size = self.next_block, self.place(self.next_block)[2]
        assert tokens.shape == targets.entries_per_token.shape == (size,), (tokens.shape, size)
        hashed = token_hash(tokens)
        frame = frame_bytes(self._plan, block, targets, hashed)
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
                self._cache._publish_record(self.shard, self._owner.fd, self._index)
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
        fd, header = self._owner.fd, header_bytes(self._plan, self.shard)
        if read_exactly(fd, HEADER_BYTES, 0) != header:
            os.ftruncate(fd, 0)
            write_all(fd, header, 0)
            return
        try:
            while self.next_block < self.num_blocks:
                length = claimed_length(read_exactly(fd, FRAME_HEAD_BYTES, self._end), self._plan)
                data = memoryview(read_exactly(fd, length, self._end))
                frame = parse_frame(data, self._plan, self.shard, self.next_block)
                decode_frame(frame, self._plan, self.shard, self.next_block)
                self._add(frame.length, frame.num_entries, frame.token_hash)
        except CacheCorrupt:
            pass
        os.ftruncate(fd, self._end)


class _Ownership:
    """An exclusively locked `.part` file."""

    _held: ClassVar[set[tuple[int, Path]]] = set()

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._key = (os.getpid(), path.absolute())
        self._held.add(self._key)

    @classmethod
    def take(cls, path: Path) -> _Ownership | None:
        """Create and lock the file; None when it is owned, by this process or by another one."""
        if (os.getpid(), path.absolute()) in cls._held:
            return None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def is_current(self) -> bool:
        """Whether the locked file still is the one under its name (not renamed or removed)."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self.fd)
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        if self.fd >= 0:
            self._held.discard(self._key)
            os.close(self.fd)
            self.fd = -1


def sequence_ranges(plan: CachePlan, shards: list[int]) -> str:
    """The sequences of some ascending shards, neighbours joined: "0 to 511, 1024 to 1535"."""
    return ", ".join(f"{first} to {last}" for first, last in merged_ranges(plan, shards))


def merged_ranges(plan: CachePlan, shards: list[int]) -> list[tuple[int, int]]:
    """(first, last) sequence of every run of neighbouring shards."""
    ranges: list[tuple[int, int]] = []
    for shard in shards:
        first, count = plan.shard_range(shard)
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
            count = plan.shard_range(shard)[0] + count - first
        ranges.append((first, first + count - 1))
    return ranges


@contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            "the cache cannot be written",
            where=error.filename or path,
            found=error.strerror or str(error),
            remedy="free space or correct permissions and run again; finished blocks are kept",
        ) from error
