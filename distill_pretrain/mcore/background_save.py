"""A student's state written by a thread while training goes on: the files of `state.save_student`, byte for byte.

The thread writes a copy of the state in host memory, and takes part in no collective.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.errors import CheckpointError
from distill_pretrain.formats.atomic import sha256_file
from distill_pretrain.mcore.core import FileSystemWriterAsync
from distill_pretrain.mcore.schedule import Student
from distill_pretrain.mcore.state import plan_save

# Without megatron-core's decorator, which would turn off garbage collection while the model trains.
_write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


class BackgroundSave:
    """This rank's files of a checkpoint, on their way to the disk.

    Every rank makes one: it returns when the state is copied, and training may change it again.

    Args:
        student: what is saved.
        folder: existing and empty.

    Attributes:
        moves: tensors and files written so far.
    """

    def __init__(self, student: Student, folder: Path) -> None:
        self.moves = 0
        self._folder = folder
        self._request = plan_save(student, folder)
        self._results: dict[int, list[Any]] = {}
        self._hashes: dict[str, str] = {}
        self._failure: str | None = None
        self._given_up = False
        # Nothing is left to write on a rank that holds copies only.
        nothing = self._request.async_fn is None
        self._files: list[Any] = [] if nothing else self._request.async_fn_args[1]
        self._copy_state()
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for this rank's files, not longer than that."""
        self._thread.join(seconds)

    def give_up(self) -> None:
        """Stop writing, after the tensor that is being written."""
        self._given_up = True

    def finish(self) -> dict[str, str]:
        """Write what describes the files of all ranks; the sha256 of every file that the threads wrote, by name.

        Every rank calls it, once none is writing.

        Raises:
            CheckpointError: the files of some rank could not be written; every rank raises it.
        """
        self._thread.join()
        shares: list[Any] = [None] * dist.get_world_size()
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
            self._request.async_fn_args[2].put(self._results)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for finalize in self._request.finalize_fns:
                finalize()
        return {name: digest for _, hashes in shares for name, digest in hashes.items()}

    def _copy_state(self) -> None:
        """Replace the tensors, one file's after another's, by copies that training will not change."""
        for number, (path, name, (objects, tensors)) in enumerate(self._files):
            copies = [
                (item, tensor.to("cpu", non_blocking=True, copy=True)) for item, tensor in tensors
            ]
            torch.cuda.synchronize()
            self._files[number] = (path, name, (objects, copies))

    def _write(self) -> None:
        try:
            for number, (path, name, _) in enumerate(self._files):
                self._results[number] = self._write_one(number)
                self._hashes[name] = sha256_file(Path(path))
                self.moves += 1
        except Exception as error:  # a thread has nobody to raise it to
            self._failure = f"{type(error).__name__}: {error}"

    def _write_one(self, number: int) -> list[Any]:
        """Write and fsync one file, and let go of its tensors; what megatron-core notes of each."""
        path, name, (objects, tensors) = self._files[number]
        results: Queue[Any] = Queue()
        unfinished: Queue[int] = Queue()
        unfinished.put(number)
        ((transforms, _),) = (self._request.async_fn.args,)
        _write_file(
            transforms,
            number,
            (path, name, (objects, self._counted(tensors))),
            results,
            unfinished,
            use_fsync=True,
        )
        self._files[number] = (path, name, ([], []))
        _, found = results.get_nowait()
        if isinstance(found, Exception):
            raise found
        written: list[Any] = found
        return written

    def _counted(self, tensors: Iterable[Any]) -> Iterator[Any]:
        for tensor in tensors:
            if self._given_up:
                raise InterruptedError("given up")
            yield tensor
            self.moves += 1
