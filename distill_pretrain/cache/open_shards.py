"""The shard files that a reader keeps open, shared by threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from distill_pretrain.cache.shard import ShardFile
from distill_pretrain.errors import CacheUnreadable
from distill_pretrain.files.closing import Closing


@dataclass(eq=False)
class _Entry:
    """A shard's file: None until its first user has opened it."""

    file: ShardFile | None = None
    users: int = 0
    is_dropped: bool = False
    opening: Lock = field(default_factory=Lock)


class OpenShards(Closing):
    """Files of the shards used last; safe to use from several threads.

    A file is opened once, whoever asks for it first; different files are opened at the same time. One that is given
    up while threads read it is closed by the last of them: the number of a closed file may already be another file's.

    Args:
        open_shard: opens the file of a shard.
        most: files kept open that nobody uses at the moment.
    """

    def __init__(self, open_shard: Callable[[int], ShardFile], *, most: int) -> None:
        self._open_shard = open_shard
        self._most = most
        self._lock = Lock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    @contextmanager
    def use(self, shard: int) -> Iterator[ShardFile]:
        """Lend the file of a shard for as long as the block lasts; after a failed read it is opened anew next time."""
        with self._lock:
            entry = self._entries.setdefault(shard, _Entry())
            self._entries.move_to_end(shard)
            entry.users += 1
            if len(self._entries) > self._most:
                self._drop(*self._entries.popitem(last=False))
        try:
            yield self._file(shard, entry)
        except CacheUnreadable:
            # A file handle that went stale stays so.
            with self._lock:
                self._drop(shard, entry)
            raise
        finally:
            with self._lock:
                entry.users -= 1
                if entry.is_dropped:
                    self._close_unused(entry)

    def close(self) -> None:
        """Close every file; those in use once their users are done."""
        with self._lock:
            while self._entries:
                self._drop(*self._entries.popitem())

    def _file(self, shard: int, entry: _Entry) -> ShardFile:
        with entry.opening:
            if entry.file is None:
                try:
                    entry.file = self._open_shard(shard)
                except BaseException:
                    with self._lock:
                        self._drop(shard, entry)
                    raise
            return entry.file

    def _drop(self, shard: int, entry: _Entry) -> None:
        if self._entries.get(shard) is entry:
            del self._entries[shard]
        entry.is_dropped = True
        self._close_unused(entry)

    @staticmethod
    def _close_unused(entry: _Entry) -> None:
        if entry.users == 0 and entry.file is not None:
            entry.file.close()
            entry.file = None
