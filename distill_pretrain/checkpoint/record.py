"""A complete checkpoint on disk, as its record `checkpoint.json` describes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import fsync_path, sha256_file

Result = TypeVar("Result")

RECORD = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it is.
        step: optimizer steps done.
        identity: what a run must share with it to go on from it.
        progress: of the run besides its steps, JSON-able; what it holds is the trainer's.
        files: sha256 of every file by name.
        sha256: of the record, and so of everything in the folder.
    """

    folder: Path
    step: int
    identity: dict[str, Any]
    progress: dict[str, Any]
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
                progress=dict(raw.get("progress", {})),
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

    def damage(self) -> CheckpointError | None:
        """Return the first file that is not what was saved, or None; in a job every rank calls it and gets the same."""
        found = hash_files(self.folder, sorted(self.files))
        for name, expected in self.files.items():
            if found[name] != expected:
                return CheckpointError(
                    "a checkpoint file is not what was saved",
                    where=self.folder / name,
                    found=found[name],
                    expected=expected,
                    remedy="remove this step's folder to go on from the one before",
                )
        return None

    def verify(self) -> None:
        """Compare every file with its hash; raises CheckpointError naming the first that differs.

        In a job every rank calls it.
        """
        damage = self.damage()
        if damage is not None:
            raise damage


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Call `processes.on_first_rank`, which brings torch: `inspect` looks at checkpoints without it."""
    from distill_pretrain.processes import process

    return process.on_first_rank(action)


def hash_files(folder: Path, names: list[str], *, durable: bool = False) -> dict[str, str]:
    """Return the sha256 of files by name ("missing" for none).

    The ranks of a job share the work, and all get the result.

    Args:
        folder: where they are.
        names: the same list on every rank.
        durable: also fsync each file.
    """
    import torch.distributed as dist

    from distill_pretrain.processes.watchdog import alive

    grouped = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    mine = {}
    for name in names[rank::size]:
        path = folder / name
        if durable and path.exists():
            fsync_path(path)
        mine[name] = sha256_file(path, alive) if path.exists() else "missing"
    shares: list[Any] = [mine]
    if grouped:
        shares = [None] * size
        dist.all_gather_object(shares, mine)
    return {name: digest for share in shares for name, digest in share.items()}
