"""The checkpoints of one run: published whole or not at all, hashed, described, pruned.

checkpoints/
  step-00000400/     weights and optimizer (megatron-core dist_checkpointing), rng-*.pt
    checkpoint.json  step, identity, sha256 of every other file; written last
  step-00000800.tmp/ a save that did not finish, or has not yet; ignored and replaced
  step-00000600.old/ about to be replaced by a save of the same step; taken back if that did not happen
  step-00000600.bad/ set aside: found damaged when a run was to go on from it
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill_pretrain import __version__
from distill_pretrain.checkpoint.lineage import phase_folders
from distill_pretrain.checkpoint.record import RECORD, Checkpoint, hash_files, on_first_rank
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import (
    canonical_json,
    discard_stale_temporaries,
    fsync_path,
    publish_bytes,
)
from distill_pretrain.files.disk import free_bytes, require_room
from distill_pretrain.files.folders import replace_folder

_log = logging.getLogger(__name__)

_REASON_LENGTH = 300
_ASIDE = ".old"
_STEP_FOLDER = re.compile(r"step-\d{8,}")


def find_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in a folder, or the newest one of a run folder, of the last phase that has one."""
    if (path / RECORD).exists():
        return Checkpoint.open(path)
    phases = [folder / "checkpoints" for folder in reversed(phase_folders(path))]
    for root in (path / "checkpoints", path, *phases):
        newest = CheckpointStore(root).newest() if root.is_dir() else None
        if newest is not None:
            return newest
    raise CheckpointError(
        "no checkpoint found",
        where=path,
        expected="a run folder with checkpoints/step-*, or one such folder",
        remedy="train first, or correct the path",
    )


def find_checkpoints(run: Path, count: int) -> list[Checkpoint]:
    """Open the newest checkpoints of a run folder, oldest first.

    Raises:
        CheckpointError: there are fewer.
    """
    root = run / "checkpoints"
    folders = CheckpointStore(root).complete() if root.is_dir() else []
    if len(folders) < count:
        raise CheckpointError(
            "the run does not have so many checkpoints",
            where=run,
            found=", ".join(folder.name for folder in folders) or "none",
            expected=f"{count} in {root}",
            remedy="ask for fewer, or train with a larger train.keep_checkpoints",
        )
    return [Checkpoint.open(folder) for folder in folders[-count:]]


def drop_unfinished(run: Path) -> None:
    """Remove what killed processes left half-written in a run folder; for its owner alone, before it writes.

    On a full disk it is what fills it.
    """
    for pattern in ("checkpoints/step-*.tmp", "hf/step-*.tmp", "hf-ema/step-*.tmp"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    discard_stale_temporaries(run, min_age_s=0.0)


class BackgroundFiles(Protocol):
    """This rank's files of a checkpoint, on their way to the disk; see `mcore.background_save`."""

    @property
    def moves(self) -> int:
        """A number that grows while files are being written."""

    @property
    def writing(self) -> bool:
        """Whether this rank's files are still being written."""

    def wait(self, seconds: float) -> None:
        """Wait for this rank's files, not longer than that."""

    def cancel(self) -> None:
        """Stop writing soon."""

    def finish(self) -> dict[str, str]:
        """Complete the files, on every rank once none is writing; the sha256 of those that are durable already."""


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A checkpoint that nobody sees before every rank calls `publish`.

    Attributes:
        step: optimizer steps done.
        files: this rank's; none of them may be still being written when `publish` is called.
        publish: gives the checkpoint its name; raises CheckpointError where files could not be written.
    """

    step: int
    files: BackgroundFiles
    publish: Callable[[], None]


class CheckpointStore:
    """Checkpoints below one folder.

    Attributes:
        num_bytes: about what one takes, for messages; None where that is not known.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_bytes: int | None = None

    def complete(self) -> list[Path]:
        """List the folders of complete checkpoints, oldest first."""
        found = [p for p in self.root.glob("step-*") if _STEP_FOLDER.fullmatch(p.name)]
        return sorted(p for p in found if (p / RECORD).exists())

    def newest(self) -> Checkpoint | None:
        """Open the complete checkpoint of the highest step."""
        folders = self.complete()
        return Checkpoint.open(folders[-1]) if folders else None

    def begin_save(
        self,
        step: int,
        identity: dict[str, Any],
        start: Callable[[Path], BackgroundFiles],
        *,
        keep: int,
        progress: dict[str, Any] | None = None,
    ) -> PendingSave:
        """Begin a checkpoint; what is returned publishes it and drops all but the newest `keep`. Every rank calls both.

        Args:
            step: optimizer steps done.
            identity: recorded beside it.
            start: begins to put this rank's files into the given empty folder.
            keep: checkpoints to keep, this one included.
            progress: see `Checkpoint`.

        Raises:
            CheckpointError: it could not be written, on every rank that found so; what was written of it is dropped.
        """
        temporary = self._temporary(step)
        with self._whole_or_nothing(temporary):
            self._make(temporary)
            files = start(temporary)
        record = {"step": step, "identity": identity, "progress": progress or {}}

        def publish() -> None:
            with self._whole_or_nothing(temporary):
                self._publish(temporary, record, keep=keep, known=files.finish())

        return PendingSave(step=step, files=files, publish=publish)

    def require_room(self, num_bytes: int, *, keep: int) -> None:
        """Raise StorageError where the next checkpoint will not fit; warn where as many as are kept will not.

        Args:
            num_bytes: about what one takes.
            keep: checkpoints that are kept.
        """
        self.num_bytes = num_bytes
        remedy = "set train.output_dir to a folder on another disk"
        require_room(self.root, num_bytes, what="a checkpoint", remedy=remedy)
        # The oldest goes once the newest is there.
        coming = max(1, keep + 1 - len(self.complete()))
        free = free_bytes(self.root)
        if free < coming * num_bytes:
            _log.warning(
                f"{free:,} bytes are free in {self.root}; {coming} checkpoints more, until the oldest goes, "
                f"take about {coming * num_bytes:,} (train.keep_checkpoints={keep})"
            )

    @contextmanager
    def _whole_or_nothing(self, temporary: Path) -> Iterator[None]:
        """What an error leaves of a checkpoint is dropped: on a full disk it is what fills it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._unwritten(temporary, error) from error

    def _unwritten(self, temporary: Path, error: BaseException) -> CheckpointError:
        """A failed save in words. On a full disk torch raises whatever follows from a write cut short."""
        free = free_bytes(self.root)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif isinstance(error, CheckpointError):  # of the ranks that wrote
            reason = str(error.found or error)
        else:
            # What C++ says comes before its frames, what another rank said after a traceback.
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0 if isinstance(error, Exception) else -1]}"
        reason = " ".join(reason.split())
        is_short = self.num_bytes is not None and free < self.num_bytes
        return CheckpointError(
            f"a checkpoint could not be written{': the disk is full' if is_short else ''}",
            where=temporary.with_suffix(""),
            found=f"{free:,} bytes free without what was written of it ({reason[:_REASON_LENGTH]})",
            expected=None if self.num_bytes is None else f"about {self.num_bytes:,} bytes free",
            remedy="free space or mend the file system, and start again: the run goes on from the checkpoint before",
        )

    def _temporary(self, step: int) -> Path:
        return self.root / f"step-{step:08d}.tmp"

    def _make(self, temporary: Path) -> None:
        def make() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        on_first_rank(make)

    def _publish(
        self, temporary: Path, record: dict[str, Any], *, keep: int, known: dict[str, str]
    ) -> None:
        """Hash the files whose hash is not known, and give the folder its name."""
        final = temporary.with_suffix("")

        def publish() -> None:
            described = {**record, "files": files, "code_version": __version__}
            publish_bytes(temporary / RECORD, canonical_json(described))
            replace_folder(final, temporary, aside=final.with_suffix(_ASIDE))
            for old in self.complete()[:-keep]:
                shutil.rmtree(old, ignore_errors=True)

        names = on_first_rank(
            lambda: sorted(p.name for p in temporary.iterdir() if p.name not in known)
        )
        files = known | hash_files(temporary, names, durable=True)
        on_first_rank(publish)

    def find(self, identity: dict[str, Any], *, reads_files: bool = True) -> Checkpoint | None:
        """Find the newest sound checkpoint, if it belongs to this run; None where there is none yet.

        Every file is compared with its hash. A damaged checkpoint is set aside under another name, and the one
        before is taken. Every rank calls it and gets the same answer.

        Args:
            identity: what the checkpoint must share with this run.
            reads_files: whether files but the record are compared; not where nobody will read them.

        Raises:
            CheckpointError: it belongs to another run, or every checkpoint is damaged.
        """
        while True:
            newest = on_first_rank(lambda: self._newest_readable(identity))
            damage = newest.damage() if newest is not None and reads_files else None
            if newest is None or damage is None:
                return newest
            on_first_rank(partial(self._set_aside, newest.folder, damage))

    def _newest_readable(self, identity: dict[str, Any]) -> Checkpoint | None:
        """The newest whose record can be read, required to be of this run."""
        for aside in self.root.glob(f"step-*{_ASIDE}"):
            # A kill came between the two renames of `_publish`, or after them.
            if aside.with_suffix("").exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(aside, aside.with_suffix(""))
        for folder in reversed(self.complete()):
            try:
                newest = Checkpoint.open(folder)
            except CheckpointError as error:
                self._set_aside(folder, error)
                continue
            require_same_run(newest, identity)
            return newest
        damaged = sorted(p.name for p in self.root.glob("step-*.bad"))
        if damaged:
            raise CheckpointError(
                "no sound checkpoint is left",
                where=self.root,
                found=", ".join(damaged),
                remedy="restore one from a copy, or remove these folders to train from the start",
            )
        return None

    def _set_aside(self, folder: Path, why: CheckpointError) -> None:
        aside = folder.with_suffix(".bad")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        fsync_path(self.root)
        _log.warning(f"{why}\n  set aside as {aside.name}; going on from the checkpoint before it")


def require_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise CheckpointError listing every key of the recipe in which a checkpoint and this run differ."""
    from distill_pretrain.checkpoint.identity import differences

    found = differences(checkpoint.identity, identity, checkpoint.folder, step=checkpoint.step)
    if found:
        raise CheckpointError(
            "the checkpoint belongs to another run:\n" + "\n".join(f"  - {line}" for line in found),
            where=checkpoint.folder,
            remedy="restore the recipe, or set another train.output_dir",
        )
