"""Writing one shard of a cache, from wherever its last owner was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.manifest import ShardRecord
from distill_pretrain.cache.shard import (
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    INDEX_DTYPE,
    ShardFile,
    ShardSpec,
    closing_bytes,
    token_hash,
)
from distill_pretrain.cache.shard_files import Canary, ShardFiles, io_errors
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheError
from distill_pretrain.files.atomic import fsync_path, publish_bytes, write_all
from distill_pretrain.files.closing import Closing
from distill_pretrain.files.ownership import FileLock
from distill_pretrain.files.storage import LocalFile, read_exactly


class ShardWriter(Closing):
    """The owner of one unfinished shard; leaving it unfinished keeps every block written so far.

    Attributes:
        shard: number.
        num_blocks: blocks of the whole shard.
        next_block: the block that `append` takes next; > 0 after a resume.
        codec: what the shard is coded with.
    """

    def __init__(
        self,
        files: ShardFiles,
        spec: ShardSpec,
        owner: FileLock,
        canary: Canary | None,
        sync_every: int,
    ) -> None:
        """Use `CacheWriter.claim`."""
        self.shard = spec.shard
        self.num_blocks = spec.num_blocks
        self.next_block = 0
        self.codec = spec.codec
        self._canary = canary
        self._files = files
        self._sync_every = sync_every
        self._spec = spec
        self._owner = owner
        self._index = np.zeros(self.num_blocks, INDEX_DTYPE)
        self._end = HEADER_BYTES
        self._durable = 0
        self._resume()

    def place(self, block: int) -> tuple[int, int, int]:
        """Return (sequence, offset of the first position, number of positions) of a block."""
        return self._spec.plan.block_place(self.shard, block)

    @property
    def size(self) -> int:
        """The bytes of the file so far."""
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
        """Write the next block, as `append` does, for tokens of which only the `token_hash` is known."""
        block, size = self.next_block, self.place(self.next_block)[2]
        assert targets.entries_per_token.shape == (size,), (targets.entries_per_token.shape, size)
        frame = self._spec.frame_bytes(block, targets, hashed)
        try:
            with io_errors(self._owner.path):
                write_all(self._owner.fd, frame, self._end)
                self._add(len(frame), len(targets.ids), hashed)
                if (block + 1) % self._sync_every == 0:
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
        final = self._files.path(self.shard, ".dpt")
        try:
            with io_errors(self._owner.path):
                write_all(self._owner.fd, closing_bytes(self._index), self._end)
                self._sync()
                os.replace(self._owner.path, final)
                fsync_path(final.parent)
                # As read back.
                opened = LocalFile(self._owner.fd, str(final), owned=False)
                file = ShardFile(opened, self._spec, str(final))
                counts = self._files.counts(self._spec, file, self._canary)
                self._files.publish_record(self._spec, file.sha256(), file.size, counts)
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
        final = self._files.path(self.shard, ".dpt")
        try:
            with io_errors(final):
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
