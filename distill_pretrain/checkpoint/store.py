"""The checkpoints of one run: published whole or not at all, hashed, described, pruned.

checkpoints/
  step-00000400/     weights and optimizer (megatron-core dist_checkpointing), rng-*.pt
    checkpoint.json  step, identity, sha256 of every other file; written last
  step-00000800.tmp/ a save that did not finish; ignored and replaced
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill_pretrain import __version__
from distill_pretrain.errors import CheckpointError, DistillPretrainError
from distill_pretrain.formats.atomic import canonical_json, fsync_dir, publish_bytes, sha256_file

RECORD = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it is.
        step: optimizer steps done.
        identity: what a run must share with it to go on from it.
        files: sha256 of every file by name.
        sha256: of the record, and so of everything in the folder.
    """

    folder: Path
    step: int
    identity: dict[str, Any]
    files: dict[str, str]
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the record; raises CheckpointError where there is none or it is damaged."""
        path = folder / RECORD
        try:
            raw = json.loads(path.read_bytes())
            return cls(
                folder=folder,
                step=int(raw["step"]),
                identity=dict(raw["identity"]),
                files=dict(raw["files"]),
                sha256=sha256_file(path),
            )
        except FileNotFoundError:
            raise CheckpointError(
                "not a checkpoint",
                where=folder,
                expected=f"a folder with {RECORD}",
                remedy="name a run folder or a folder checkpoints/step-*",
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "the checkpoint's record is damaged", where=path, found=error
            ) from None

    def verify(self) -> None:
        """Compare every file with its hash; raises CheckpointError naming the first that differs."""
        for name, expected in self.files.items():
            path = self.folder / name
            found = sha256_file(path) if path.exists() else "missing"
            if found != expected:
                raise CheckpointError(
                    "a checkpoint file is not what was saved",
                    where=path,
                    found=found,
                    expected=expected,
                    remedy="remove this step's folder to go on from the one before",
                )


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or the newest of a run folder."""
    if (path / RECORD).exists():
        return Checkpoint.open(path)
    for root in (path / "checkpoints", path):
        newest = CheckpointStore(root).newest() if root.is_dir() else None
        if newest is not None:
            return newest
    raise CheckpointError(
        "no checkpoint found",
        where=path,
        expected="a run folder with checkpoints/step-*, or one such folder",
        remedy="train first, or correct the path",
    )


def _on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; its result, or its error, reaches every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (DistillPretrainError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class CheckpointStore:
    """Checkpoints below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        found = [p for p in self.root.glob("step-*") if (p / RECORD).exists()]
        return sorted(p for p in found if p.suffix != ".tmp")

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint of the highest step."""
        folders = self.complete()
        return Checkpoint.open(folders[-1]) if folders else None

    def save(
        self, step: int, identity: dict[str, Any], write: Callable[[Path], None], *, keep: int
    ) -> None:
        """Publish a checkpoint and drop all but the newest `keep`. Every rank calls it.

        Args:
            step: optimizer steps done.
            identity: recorded beside it.
            write: puts this rank's files into the given empty folder.
            keep: checkpoints to keep, this one included.
        """
        final = self.root / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def publish() -> None:
            files = {p.name: sha256_file(p) for p in sorted(temporary.iterdir())}
            record = {
                "step": step,
                "identity": identity,
                "files": files,
                "code_version": __version__,
            }
            publish_bytes(temporary / RECORD, canonical_json(record))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            fsync_dir(self.root)
            for old in self.complete()[:-keep]:
                shutil.rmtree(old)

        _on_first_rank(prepare)
        write(temporary)
        dist.barrier()
        _on_first_rank(publish)

    def restore_newest(self, read: Callable[[Path], Any]) -> int:
        """Verify and load the newest checkpoint; return its step, 0 where there is none.

        Every rank calls it, after `require_same_run`.
        """

        def check() -> Checkpoint | None:
            checkpoint = self.newest()
            if checkpoint is not None:
                checkpoint.verify()
            return checkpoint

        checkpoint = _on_first_rank(check)
        if checkpoint is None:
            return 0
        read(checkpoint.folder)
        return int(checkpoint.step)


def require_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise CheckpointError listing every field in which a checkpoint and this run differ."""
    fields = sorted(set(identity) | set(checkpoint.identity))
    differences = [
        f"  - {field}: checkpoint {checkpoint.identity.get(field)!r}, this run {identity.get(field)!r}"
        for field in fields
        if checkpoint.identity.get(field) != identity.get(field)
    ]
    if differences:
        raise CheckpointError(
            "the checkpoint belongs to another run:\n" + "\n".join(differences),
            where=checkpoint.folder,
            remedy="restore the recipe, or set another train.output_dir",
        )
