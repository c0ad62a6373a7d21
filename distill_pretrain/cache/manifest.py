"""Done records (s-000123.json) and manifest.json: what a finished cache consists of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from distill_pretrain.cache.plan import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MOST_SEQUENCES,
    CachePlan,
    is_sha256,
)
from distill_pretrain.errors import CacheCorrupt, CacheError
from distill_pretrain.files.atomic import canonical_json


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        plan_id: of the cache.
        shard: number.
        first_sequence: of the plan.
        num_sequences: in this shard.
        size: bytes of the file.
        sha256: of the file.
        blocks: in this shard.
        tokens: positions, padding of the last sequence included.
        entries: stored (id, value) pairs.
        labelled: positions that have a next token and at least one entry; None if not measured.
        label_hits: of those, positions whose next token is among the stored ids.
        codec_sha256: tables the shard is coded with; None for a codec without.
    """

    plan_id: str
    shard: int
    first_sequence: int
    num_sequences: int
    size: int
    sha256: str
    blocks: int
    tokens: int
    entries: int
    labelled: int | None
    label_hits: int | None
    codec_sha256: str | None

    def to_json_bytes(self) -> bytes:
        """Return the contents of the done record."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json_bytes(cls, data: bytes, plan: CachePlan, shard: int) -> ShardRecord:
        """Parse a done record.

        Raises:
            CacheCorrupt: not the canonical record of this shard of this plan.
        """
        try:
            record = _record(json.loads(data), plan, shard)
        except (ValueError, RecursionError):
            record = None
        if record is None or record.to_json_bytes() != data:
            raise CacheCorrupt(
                "a shard's done record is damaged or of another cache",
                where=f"shard {shard}",
                remedy="delete that .json file and run `distill-pretrain capture` again",
            )
        return record


def extent_bytes(num_sequences: int) -> bytes:
    """Return the contents of extent.json: how many sequences the largest capture so far was asked for."""
    return canonical_json({"num_sequences": num_sequences})


def extent_from(data: bytes) -> int | None:
    """Read the number of sequences that extent.json says; None if it is damaged."""
    try:
        number = json.loads(data)["num_sequences"]
        sound = type(number) is int and 1 <= number <= MOST_SEQUENCES
        return number if sound and extent_bytes(number) == data else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished cache: one record per shard, in order.

    Attributes:
        plan: what the cache holds, with the extent that the manifest states.
        shards: their records.
    """

    plan: CachePlan
    shards: tuple[ShardRecord, ...]

    @property
    def totals(self) -> dict[str, int | float | None]:
        """Sums over the shards; `canary_hit_rate` is the share of labels among the stored ids."""
        tokens = sum(record.tokens for record in self.shards)
        entries = sum(record.entries for record in self.shards)
        size = sum(record.size for record in self.shards)
        labelled = _sum([record.labelled for record in self.shards])
        hits = _sum([record.label_hits for record in self.shards])
        rate = round(hits / labelled, 6) if labelled and hits is not None else None
        return {
            "tokens": tokens,
            "entries": entries,
            "bytes": size,
            "bytes_per_token": round(size / tokens, 4),
            "entries_per_token": round(entries / tokens, 4),
            "labelled": labelled,
            "label_hits": hits,
            "canary_hit_rate": rate,
        }

    @property
    def root_sha256(self) -> str:
        """The hex sha256 over the plan id and the shards' digests, in order."""
        digests = (record.sha256 for record in self.shards)
        return hashlib.sha256("\n".join([self.plan.plan_id, *digests]).encode()).hexdigest()

    def to_json_bytes(self) -> bytes:
        """Return the contents of manifest.json: a pure function of the plan and the shards."""
        return canonical_json(
            {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "plan_id": self.plan.plan_id,
                "num_sequences": self.plan.num_sequences,
                "root_sha256": self.root_sha256,
                "totals": self.totals,
                "shards": [asdict(record) for record in self.shards],
            }
        )

    @classmethod
    def from_json_bytes(cls, data: bytes, plan: CachePlan, *, is_checked: bool = False) -> Manifest:
        """Parse manifest.json.

        Args:
            data: its bytes.
            plan: of the cache, of any extent.
            is_checked: another process has parsed them, so that they are known to be canonical.

        Raises:
            CacheCorrupt: not the canonical manifest of a cache with this plan.
        """
        try:
            values = json.loads(data)
            plan, listed = plan.with_extent(values["num_sequences"]), values["shards"]
            if len(listed) != plan.num_shards:
                raise ValueError
            records = [_record(values, plan, shard) for shard, values in enumerate(listed)]
        except (ValueError, TypeError, KeyError, RecursionError, CacheError):
            listed, records = [None], [None]
        whole = tuple(record for record in records if record is not None)
        if len(whole) == len(listed):
            manifest = cls(plan=plan, shards=whole)
            if is_checked or manifest.to_json_bytes() == data:
                return manifest
        raise CacheCorrupt(
            "the cache's manifest.json is damaged or of another plan",
            expected=f"the manifest of plan {plan.plan_id[:12]}",
            remedy="delete manifest.json and run `distill-pretrain capture` again: it is rebuilt",
        )


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _record(values: Any, plan: CachePlan, shard: int) -> ShardRecord | None:
    """A record with sound types that belongs to the shard, else None."""
    names = {field.name: field.type for field in fields(ShardRecord)}
    if not isinstance(values, dict) or set(values) != set(names):
        return None
    for name, kind in names.items():
        value = values[name]
        if kind == "str":
            sound = isinstance(value, str)
        elif kind == "str | None":
            sound = value is None or isinstance(value, str)
        else:
            sound = type(value) is int and 0 <= value < 1 << 63
            sound = sound or (value is None and kind == "int | None")
        if not sound:
            return None
    record = ShardRecord(**values)
    first, count = plan.shard_range(shard)
    implied = (plan.plan_id, shard, first, count, plan.shard_blocks(shard), count * plan.seq_len)
    found = (
        record.plan_id,
        record.shard,
        record.first_sequence,
        record.num_sequences,
        record.blocks,
        record.tokens,
    )
    digest = record.codec_sha256
    tables_sound = is_sha256(digest) if plan.has_tables else digest is None
    sound = found == implied and tables_sound and is_sha256(record.sha256)
    return record if sound else None
