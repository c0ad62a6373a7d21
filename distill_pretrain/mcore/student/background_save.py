"""A student's state written by threads: behind training's back from a copy in host memory, or while it waits.

The threads take part in no collective. No helper process is started, by us or by megatron-core: one would die of the
signals that end a job's process group, before the job's last save, or outlive a job that is killed.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import fsync_path, sha256_file
from distill_pretrain.mcore.runtime.core import FileSystemWriterAsync
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.mcore.student.state import plan_save

# Without megatron-core's decorator, which would turn off garbage collection while the model trains.
_write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)

_Tensors = Iterable[tuple[WriteItem, torch.Tensor]]
_File = tuple[str, str, tuple[list[tuple[WriteItem, BinaryIO]], _Tensors]]
"""Where megatron-core writes a file, its name, and what it puts there: objects, and tensors."""

FSYNC_BYTES = 256 << 20
"""What is written between two fsyncs: a slow disk then shows that it moves, and the last one has little left to do."""


class BackgroundSave:
    """This rank's files of a checkpoint, on their way to the disk.

    Every rank makes one: it returns when the state is copied, and training may change it again.

    Args:
        student: what is saved.
        folder: existing and empty.
        behind: one thread writes a copy while training goes on; otherwise one thread per file, and the student must
            stay as it is until none is writing.

    Attributes:
        moves: grows with every tensor written and every piece of a file hashed.
    """

    def __init__(self, student: Student, folder: Path, *, behind: bool = True) -> None:
        self.moves = 0
        self._folder = folder
        self._request = plan_save(student, folder)
        self._results: dict[int, list[WriteResult]] = {}
        self._hashes: dict[str, str] = {}
        self._failure: str | None = None
        self._cancelled = False
        # Nothing is left to write on a rank that holds copies only.
        nothing = self._request.async_fn is None
        self._files: list[_File] = [] if nothing else self._request.async_fn_args[1]
        self._copy_state(in_any_case=behind)
        numbers = list(range(len(self._files)))
        shares = [numbers] if behind else [[number] for number in numbers]
        self._threads = [
            threading.Thread(target=self._write, args=(share,), name="checkpoint")
            for share in shares
        ]
        for thread in self._threads:
            thread.start()

    @property
    def writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return any(thread.is_alive() for thread in self._threads)

    def wait(self, seconds: float) -> None:
        """Wait for this rank's files, not longer than that."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def cancel(self) -> None:
        """Stop writing, after the tensor that is being written."""
        self._cancelled = True

    def finish(self) -> dict[str, str]:
        """Write what describes the files of all ranks; the sha256 of every file that the threads wrote, by name.

        Every rank calls it, once none is writing.

        Raises:
            CheckpointError: the files of some rank could not be written; every rank raises it.
        """
        for thread in self._threads:
            thread.join()
        shares: list[tuple[str | None, dict[str, str]]] = [(None, {})] * dist.get_world_size()
        dist.all_gather_object(shares, (self._failure, self._hashes))
        failures = [f"rank {rank}: {why}" for rank, (why, _) in enumerate(shares) if why]
        if failures:
            raise CheckpointError(
                "a checkpoint could not be written",
                where=self._folder,
                found="; ".join(failures),
                remedy="look at the file system, and start the job again to go on from the checkpoint before",
            )
        if self._results:
            # In one order, whichever thread was first.
            self._request.async_fn_args[2].put(dict(sorted(self._results.items())))
        for finalize in self._request.finalize_fns:
            finalize()
        return {name: digest for _, hashes in shares for name, digest in hashes.items()}

    def _copy_state(self, *, in_any_case: bool) -> None:
        """Replace the tensors, one file's after another's, by those of host memory, copies even if they are there."""
        for number, (path, name, (objects, tensors)) in enumerate(self._files):
            copies = [
                (item, tensor.to("cpu", non_blocking=True, copy=in_any_case))
                for item, tensor in tensors
            ]
            torch.cuda.synchronize()
            self._files[number] = (path, name, (objects, copies))

    def _write(self, numbers: Sequence[int]) -> None:
        try:
            for number in numbers:
                path, name, _ = self._files[number]
                self._results[number] = self._write_one(number)
                self._hashes[name] = sha256_file(Path(path), self._move)
        except Exception as error:  # a thread has nobody to raise it to
            self._failure = f"{type(error).__name__}: {error}"

    def _move(self) -> None:
        if self._cancelled:
            raise InterruptedError("given up")
        self.moves += 1

    def _write_one(self, number: int) -> list[WriteResult]:
        """Write and fsync one file, and let go of its tensors; what megatron-core notes of each."""
        path, name, (objects, tensors) = self._files[number]
        results: Queue[tuple[int, list[WriteResult] | Exception]] = Queue()
        unfinished: Queue[int] = Queue()
        unfinished.put(number)
        ((transforms, _),) = (self._request.async_fn.args,)
        _write_file(
            transforms,
            number,
            (path, name, (objects, self._told(Path(path), tensors))),
            results,
            unfinished,
            use_fsync=True,
        )
        self._files[number] = (path, name, ([], []))
        _, found = results.get_nowait()
        if isinstance(found, Exception):
            raise found
        return found

    def _told(self, path: Path, tensors: _Tensors) -> Iterator[tuple[WriteItem, torch.Tensor]]:
        """The tensors of a file, each followed by a sign of life once it is written."""
        unsynced = 0
        for item, tensor in tensors:
            yield item, tensor
            unsynced += tensor.nbytes
            if unsynced >= FSYNC_BYTES:
                fsync_path(path)
                unsynced = 0
            self._move()
