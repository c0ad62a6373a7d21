"""Mutated files of a cache: bytes, words and JSON values that hurt, with or without checksums made to fit again."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from types import SimpleNamespace
from typing import Any

from distill_pretrain.cache import CachePlan
from distill_pretrain.cache.codec.files import tables_name
from distill_pretrain.cache.names import EXTENT_NAME, MANIFEST_NAME, PLAN_NAME, shard_name
from distill_pretrain.cache.shard import FRAME_HEAD_BYTES, HEADER_BYTES, INDEX_DTYPE, ShardSpec
from distill_pretrain.errors import CacheError
from distill_pretrain.files.atomic import canonical_json

FOOTER_BYTES, INDEX_ROW_BYTES = 40, INDEX_DTYPE.itemsize

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 7, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 200),
    *(0.5, 1e300, "", "x", "0" * 64, "\0", "../..", [], [0] * 9, {}, {"a": {"a": 1}}),
)
Contents = dict[str, bytes | None]


def mutant_of(
    sound: dict[str, bytes], plan: CachePlan, draw: random.Random, *, repaired: bool
) -> Contents:
    """New contents of the files of a cache that changed; None for one that is gone."""
    target = draw.choices(["shard", "plan", "manifest", "extent", "tables"], [80, 6, 6, 2, 6])[0]
    shard = draw.randrange(plan.num_shards)
    tables = [name for name in sound if name.startswith("codec-")]
    if target == "plan":
        return _mutant_plan(sound, plan, draw, repaired=repaired)
    if target == "manifest":
        return {MANIFEST_NAME: _mutant_json(sound[MANIFEST_NAME], draw, keep_valid=repaired)}
    if target == "extent":
        return {
            EXTENT_NAME: _mutant_json(sound[EXTENT_NAME], draw, keep_valid=repaired),
            MANIFEST_NAME: None,
        }
    if target == "tables" and tables:
        return _mutant_tables(sound, plan, tables[0], draw, repaired=repaired)
    name = shard_name(plan, shard)
    data = _edited(bytearray(sound[name]), draw, *draw.choice(_regions(sound[name])))
    return {name: _with_sound_checksums(data) if repaired else bytes(data)}


def _regions(data: bytes) -> list[tuple[int, int]]:
    """(start, length) of the places worth an attack: all, header, footer, index, frame heads, first frame."""
    index = (
        len(data)
        - FOOTER_BYTES
        - struct.unpack_from("<Q", data, len(data) - FOOTER_BYTES + 8)[0] * INDEX_ROW_BYTES
    )
    second = struct.unpack_from("<Q", data, index + INDEX_ROW_BYTES)[0]
    return [
        (0, len(data)),
        (0, HEADER_BYTES),
        (len(data) - FOOTER_BYTES, FOOTER_BYTES),
        (index, len(data) - FOOTER_BYTES - index),
        (HEADER_BYTES, FRAME_HEAD_BYTES),
        (second, FRAME_HEAD_BYTES),
        (HEADER_BYTES + FRAME_HEAD_BYTES, second - HEADER_BYTES - FRAME_HEAD_BYTES),
    ]


def _edited(data: bytearray, draw: random.Random, start: int, length: int) -> bytearray:
    """A few bytes or whole words of a region set to values that hurt; now and then another length."""
    for _ in range(draw.randrange(1, 7)):
        at = start + draw.randrange(length)
        width = draw.choice([1, 1, 2, 4, 8])
        word = draw.choice(
            [0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), draw.getrandbits(8 * width)]
        )
        data[at : at + width] = word.to_bytes(width, "little")[: len(data) - at]
    if draw.random() < 0.05:
        at = draw.randrange(len(data))
        data[at:at] = draw.randbytes(8 * draw.randrange(1, 20))
    elif draw.random() < 0.05:
        at = draw.randrange(len(data))
        del data[at : at + 8 * draw.randrange(1, 20)]
    return data


def _with_sound_checksums(data: bytearray) -> bytes:
    """The bytes of a shard with the checksums of header, frames, index and footer made to fit."""
    footer = len(data) - FOOTER_BYTES
    if footer < HEADER_BYTES:
        return bytes(data)
    index = struct.unpack_from("<Q", data, footer)[0]
    if index < footer:
        for row in range(index, footer - INDEX_ROW_BYTES + 1, INDEX_ROW_BYTES):
            offset, length = struct.unpack_from("<QI", data, row)
            if length >= FRAME_HEAD_BYTES + 8 and offset + length <= len(data):
                crc = zlib.crc32(data[offset : offset + length - 8])
                struct.pack_into("<I", data, offset + length - 8, crc)
        struct.pack_into("<I", data, footer + 16, zlib.crc32(data[index:footer]))
    tail = data[footer : footer + 20] + data[footer + 24 :]
    struct.pack_into("<I", data, footer + 20, zlib.crc32(tail))
    struct.pack_into("<I", data, HEADER_BYTES - 4, zlib.crc32(data[: HEADER_BYTES - 4]))
    return bytes(data)


def _mutant_json(data: bytes, draw: random.Random, *, keep_valid: bool) -> bytes:
    """Canonical JSON with a value replaced, a key dropped or added; or bytes changed."""
    if not keep_valid:
        return bytes(_edited(bytearray(data), draw, 0, len(data)))
    value = json.loads(data)
    place: Any = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.1:
            break
        place = place[key]
    if draw.random() < 0.1:
        del place[key]
    elif draw.random() < 0.1 and isinstance(place, dict):
        place["unknown"] = draw.choice(HOSTILE_VALUES)
    else:
        place[key] = draw.choice(HOSTILE_VALUES)
    return canonical_json(value)


def _mutant_plan(
    sound: dict[str, bytes], plan: CachePlan, draw: random.Random, *, repaired: bool
) -> Contents:
    """Another plan; repaired: with the plan id put into everything that names it."""
    data = _mutant_json(sound[PLAN_NAME], draw, keep_valid=repaired)
    mutant: Contents = {PLAN_NAME: data}
    if repaired:
        mutant |= _renamed(sound, plan, data, plan.codec_sha256)
    return mutant


def _mutant_tables(
    sound: dict[str, bytes], plan: CachePlan, name: str, draw: random.Random, *, repaired: bool
) -> Contents:
    """Other codec tables; repaired: with sound checksums, and named by all that names tables and plan."""
    body = _edited(bytearray(sound[name][:-4]), draw, 0, len(sound[name]) - 4)
    data = bytes(body) + struct.pack("<I", zlib.crc32(body))
    if not repaired:
        return {name: data}
    digest = hashlib.sha256(data).hexdigest()
    plan_json = canonical_json({**json.loads(sound[PLAN_NAME]), "codec_sha256": digest})
    return {
        tables_name(digest): data,
        PLAN_NAME: plan_json,
        **_renamed(sound, plan, plan_json, digest),
    }


def _renamed(
    sound: dict[str, bytes], plan: CachePlan, plan_json: bytes, tables_sha256: str | None
) -> Contents:
    """Manifest and shards that claim to belong to other bytes of plan.json, and other codec tables."""
    manifest = json.loads(sound[MANIFEST_NAME])
    plan_id = manifest["plan_id"] = hashlib.sha256(plan_json).hexdigest()
    for record in manifest["shards"]:
        record |= {"plan_id": plan_id, "codec_sha256": tables_sha256}
    digests = [record["sha256"] for record in manifest["shards"]]
    manifest["root_sha256"] = hashlib.sha256("\n".join([plan_id, *digests]).encode()).hexdigest()
    mutant: Contents = {MANIFEST_NAME: canonical_json(manifest)}
    try:
        other = CachePlan.from_json_bytes(plan_json, num_sequences=plan.num_sequences)
    except CacheError:
        return mutant
    tables: Any = SimpleNamespace(tables_sha256=tables_sha256)
    for shard in range(min(plan.num_shards, other.num_shards)):
        stored = sound[shard_name(plan, shard)]
        header = ShardSpec(other, shard, tables).header
        mutant[shard_name(other, shard)] = header + stored[HEADER_BYTES:]
    return mutant
