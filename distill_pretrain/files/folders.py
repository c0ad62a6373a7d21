"""Folders that appear whole under their name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pretrain.files.atomic import fsync_path
from distill_pretrain.files.disk import naming


@contextmanager
def building(temporary: Path) -> Iterator[None]:
    """Remove a half-made folder when the block fails: on a full disk it is what fills it.

    Args:
        temporary: the folder that the block makes.

    Raises:
        StorageError: of an error of the operating system in the block, names the folder.
    """
    try:
        with naming(temporary):
            yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(folder: Path, temporary: Path, *, aside: Path | None = None) -> None:
    """Give a finished folder its name, in the place of what had it before.

    What was there is renamed first and removed last: at no moment is there neither the old folder nor the new one on
    the disk. Files inside are not flushed.

    Args:
        folder: the name.
        temporary: the finished folder, beside it.
        aside: name of the old one meanwhile; None is FOLDER.old.tmp.
    """
    aside = aside or folder.with_name(f"{folder.name}.old.tmp")
    fsync_path(temporary)
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    os.replace(temporary, folder)
    fsync_path(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
