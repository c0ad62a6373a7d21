"""Whether plan.json is the plan of the files beside it: records and shard headers state the plan they were made by."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from contextlib import closing
from typing import Any

from distill_pretrain.cache.names import MANIFEST_NAME, PLAN_NAME
from distill_pretrain.cache.plan import CachePlan, is_sha256
from distill_pretrain.cache.shard import HEADER_BYTES
from distill_pretrain.errors import CacheCorrupt
from distill_pretrain.files.atomic import canonical_json
from distill_pretrain.files.storage import Storage

_SHARD = re.compile(r"s-\d{6,13}(-n\d{1,7})?\.(dpt|json)")
# Of a shard's header, see FORMAT.md.
_PLAN_ID = slice(56, 88)
_CRC = slice(HEADER_BYTES - 4, HEADER_BYTES)


def require_own_plan(storage: Storage, plan: CachePlan) -> None:
    """Raise CacheCorrupt where the manifest, the done records and the shards agree on another plan than plan.json.

    Then plan.json was edited, or is another cache's, and nothing is wrong with them. Where one of them states the plan
    of plan.json, or they state several, that is not so, and it is they who must be judged.
    """
    stated: Counter[str] = Counter()
    for name in sorted(storage.names()):
        if name == MANIFEST_NAME or _SHARD.fullmatch(name):
            found = (
                _header_plan(storage, name) if name.endswith(".dpt") else _json_plan(storage, name)
            )
            if found == plan.plan_id:
                return
            if found is not None:
                stated[found] += 1
    if len(stated) != 1:
        return
    ((other, files),) = stated.items()
    raise CacheCorrupt(
        "plan.json is not the plan of this cache: it was edited, or is of another",
        where=f"{storage.location}/{PLAN_NAME}",
        found=f"plan {plan.plan_id[:12]}",
        expected=f"a file of sha256 {other}, the plan that all {files} manifest, records and shards here state",
        remedy="restore plan.json from a copy of the cache, and nothing else: the shards are none the worse for it",
    )


def _json_plan(storage: Storage, name: str) -> str | None:
    """The plan that a record or the manifest states, if its bytes are canonical."""
    try:
        data = storage.read(name)
        values: Any = json.loads(data)
        found = values["plan_id"]
        sound = is_sha256(found) and canonical_json(values) == data
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if sound else None


def _header_plan(storage: Storage, name: str) -> str | None:
    """The plan that a shard's header states, if its checksum is right."""
    try:
        with closing(storage.open(name)) as file:
            header = file.read(HEADER_BYTES, 0)
    except FileNotFoundError:
        return None
    head, crc = header[: _CRC.start], header[_CRC]
    if len(header) < HEADER_BYTES or zlib.crc32(head) != int.from_bytes(crc, "little"):
        return None
    return header[_PLAN_ID].hex()
