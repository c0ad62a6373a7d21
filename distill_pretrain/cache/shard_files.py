"""The files of each shard of a cache that is being written: names, done records, what is counted for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.files import tables_name
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.manifest import ShardRecord
from distill_pretrain.cache.names import record_name, shard_name
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard import ShardFile, ShardSpec
from distill_pretrain.errors import CacheCorrupt, CacheError
from distill_pretrain.files.atomic import fsync_path, publish_bytes
from distill_pretrain.files.disk import problem
from distill_pretrain.files.storage import LocalFile

LabelsOf = Callable[[int], npt.NDArray[np.int32]]
Canary = tuple[int | None, int | None]


class Counts(NamedTuple):
    """What a done record says of a shard's targets."""

    entries: int
    labelled: int | None
    label_hits: int | None


class ShardFiles:
    """Names, records and finished files of the shards in one folder; ownership is the callers' matter."""

    def __init__(self, folder: Path, plan: CachePlan, labels_of: LabelsOf | None) -> None:
        """Takes sequence number -> int32[L] next tokens (-100 for none) as `labels_of`, for the canary."""
        self._folder = folder
        self._plan = plan
        self._labels_of = labels_of

    def path(self, shard: int, suffix: str) -> Path:
        """Return the file of a shard that ends in ".dpt" (finished), ".json" (its record), ".part" or ".bad"."""
        name = shard_name(self._plan, shard)
        if suffix == ".part":
            return self._folder / f"{name}.part"
        return self._folder / (name.removesuffix(".dpt") + suffix)

    def record(self, shard: int) -> ShardRecord | None:
        """Return the done record of a finished shard whose file has the recorded size."""
        path = self.path(shard, ".json")
        try:
            with io_errors(path, besides=FileNotFoundError):
                record = ShardRecord.from_json_bytes(path.read_bytes(), self._plan, shard)
                size = self.path(shard, ".dpt").stat().st_size
        except (FileNotFoundError, CacheCorrupt):
            return None
        return record if size == record.size else None

    def set_aside(self, shard: int) -> None:
        """Rename a finished file, if there is one, to `.bad`."""
        final = self.path(shard, ".dpt")
        if final.exists():
            os.replace(final, self.path(shard, ".bad"))
            fsync_path(self._folder)

    def adopt(self, spec: ShardSpec, canary: Canary | None) -> bool:
        """Say whether a finished file without record is sound, and write its record if so."""
        final = self.path(spec.shard, ".dpt")
        if not final.exists():
            return False
        try:
            with ShardFile(LocalFile.open(final), spec, str(final)) as file:
                counts = self.counts(spec, file, canary)
                self.publish_record(spec, file.sha256(), file.size, counts)
        except CacheCorrupt:
            self.set_aside(spec.shard)
            return False
        return True

    def publish_record(self, spec: ShardSpec, sha256: str, size: int, counts: Counts) -> None:
        """Write the done record of a file of that hash and size in bytes."""
        first, count = self._plan.shard_range(spec.shard)
        record = ShardRecord(
            plan_id=self._plan.plan_id,
            shard=spec.shard,
            first_sequence=first,
            num_sequences=count,
            size=size,
            sha256=sha256,
            blocks=spec.num_blocks,
            tokens=count * self._plan.seq_len,
            entries=counts.entries,
            labelled=counts.labelled,
            label_hits=counts.label_hits,
            codec_sha256=spec.codec.tables_sha256,
        )
        publish_bytes(self._folder / record_name(self._plan, spec.shard), record.to_json_bytes())

    def counts(self, spec: ShardSpec, file: ShardFile, known: Canary | None) -> Counts:
        """Decode every block once more, as read back from the file; count what is not known."""
        labels_of = self._labels_of if known is None else None
        entries = labelled = hits = 0
        labels = np.empty(0, np.int32)
        for block in range(spec.num_blocks):
            targets = spec.decode(file.frames(block, 1)[0], block)
            entries += len(targets.ids)
            if labels_of is None:
                continue
            sequence, offset, size = self._plan.block_place(spec.shard, block)
            if offset == 0:
                labels = labels_of(sequence)
                assert labels.shape == (self._plan.seq_len,), labels.shape
            wanted = labels[offset : offset + size]
            labelled += int(np.count_nonzero((wanted >= 0) & (targets.entries_per_token > 0)))
            hits += int(
                np.count_nonzero(np.repeat(wanted, targets.entries_per_token) == targets.ids)
            )
        if labels_of is None:
            return Counts(entries, *(known or (None, None)))
        return Counts(entries, labelled, hits)


def publish_tables(folder: Path, tables: HcTables) -> str:
    """Write codec tables into a cache folder under their sha256, which is returned."""
    path = folder / tables_name(tables.sha256)
    if not path.exists():
        publish_bytes(path, tables.to_bytes())
    return tables.sha256


@contextmanager
def io_errors(path: Path, besides: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Raise OSErrors but those `besides` as CacheError, which names the file and the remedy."""
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
