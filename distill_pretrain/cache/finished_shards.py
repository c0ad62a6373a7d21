"""The finished shards of a cache, whether or not the cache as a whole is finished."""

from __future__ import annotations

from distill_pretrain.cache.codec.files import CodecFiles
from distill_pretrain.cache.manifest import Manifest, ShardRecord
from distill_pretrain.cache.names import (
    MANIFEST_NAME,
    record_name,
    sequence_ranges,
    shard_name,
    shards_in,
)
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard import ShardFile, ShardSpec
from distill_pretrain.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from distill_pretrain.files.storage import Storage


class FinishedShards:
    """Records and files of the shards that a capture has finished so far.

    Attributes:
        storage: where they lie.
        plan: of the cache. Its extent decides which shards there are: a last shard that is shorter under another
            extent is another file.
        manifest: of the cache, of whatever extent; None if there is none that is sound.
        records: by shard number, ascending; of shards whose file has the recorded size.
        codecs: what they are coded with.
    """

    def __init__(self, storage: Storage, plan: CachePlan) -> None:
        """List the shards; no shard is opened.

        Raises:
            CacheError: the storage cannot be read.
        """
        self.storage, self.plan = storage, plan
        self.codecs = CodecFiles(storage, plan)
        self.sizes = storage.sizes()
        self.manifest = self._read_manifest()
        found = self._listed()
        for shard in shards_in(plan, self.sizes):
            if shard not in found and record_name(plan, shard) in self.sizes:
                record = self._done_record(shard)
                if record is not None:
                    found[shard] = record
        self.records = {
            shard: found[shard]
            for shard in sorted(found)
            if self.sizes.get(shard_name(plan, shard)) == found[shard].size
        }

    def open(self, shard: int) -> ShardFile:
        """Open a finished shard for positioned reads.

        Raises:
            CacheCorrupt: header, footer, index or tables are damaged.
            CacheIncomplete: the file is not there, or not as long as recorded.
        """
        name = shard_name(self.plan, shard)
        codec = self.codecs.get(self.record(shard).codec_sha256)
        where = f"{self.storage.location}/{name}"
        try:
            file = self.storage.open(name)
        except FileNotFoundError:
            raise self._vanished(shard) from None
        return ShardFile(file, ShardSpec(self.plan, shard, codec), where)

    def record(self, shard: int) -> ShardRecord:
        """Return the record of a shard that must be finished.

        Raises:
            CacheIncomplete: its file is not there, or not as long as recorded.
        """
        if shard not in self.records:
            raise self._vanished(shard)
        return self.records[shard]

    def done(self) -> list[int]:
        """List the shards with a done record and a file of that size, ascending: those a writer leaves as they are."""
        done = []
        for shard in shards_in(self.plan, self.sizes):
            record = self._done_record(shard)
            if record and self.sizes.get(shard_name(self.plan, shard)) == record.size:
                done.append(shard)
        return done

    def _vanished(self, shard: int) -> CacheIncomplete:
        return CacheIncomplete(
            "a shard file vanished or changed after the cache was opened",
            where=f"{self.storage.location}/{shard_name(self.plan, shard)}, sequences "
            + sequence_ranges(self.plan, [shard]),
            remedy="copy the file again, or run `distill-pretrain capture` again",
        )

    def _read_manifest(self) -> Manifest | None:
        try:
            return Manifest.from_json_bytes(self.storage.read(MANIFEST_NAME), self.plan)
        except (FileNotFoundError, CacheCorrupt):
            return None

    def _listed(self) -> dict[int, ShardRecord]:
        """The manifest's records of shards that this plan has, too."""
        plan = self.plan
        return {
            record.shard: record
            for record in (self.manifest.shards if self.manifest else ())
            if record.shard < plan.num_shards
            and plan.shard_range(record.shard)[1] == record.num_sequences
        }

    def _done_record(self, shard: int) -> ShardRecord | None:
        try:
            data = self.storage.read(record_name(self.plan, shard))
            return ShardRecord.from_json_bytes(data, self.plan, shard)
        except (FileNotFoundError, CacheCorrupt):
            return None


def require_same_plan(found: CachePlan, expected: CachePlan, *, where: str, remedy: str) -> None:
    """Raise CacheMismatch, field by field, unless two plans are the same but for their extent."""
    if found.plan_id != expected.plan_id:
        raise CacheMismatch(
            "this cache was made from something else",
            where=where,
            found="\n  " + "\n  ".join(found.differences(expected)) + "\n",
            remedy=remedy,
        )
