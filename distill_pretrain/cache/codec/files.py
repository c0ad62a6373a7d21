"""Tables of block codecs, as files of a cache folder named by their sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Lock

from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.raw import RawCodec
from distill_pretrain.cache.codec.registry import BlockCodec
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.errors import CacheCorrupt, CacheError
from distill_pretrain.files.storage import Storage


def tables_name(sha256: str) -> str:
    """Return the file name of codec tables."""
    return f"codec-{sha256}.bin"


def read_tables(path: Path, plan: CachePlan) -> HcTables:
    """Read the tables in a file, which must fit the plan.

    Raises:
        CacheError: the file cannot be read.
        CacheCorrupt: it is damaged, or of another vocabulary or N.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CacheError(
            "the codec's tables cannot be read",
            where=path,
            found=error.strerror,
            expected="codec-*.bin of a cache",
            remedy="correct capture.codec_tables",
        ) from None
    tables = HcTables.from_bytes(data, where=path)
    _require_fit(tables, plan, path)
    return tables


class CodecFiles:
    """The codecs of one cache: that of the plan is loaded once, those of single shards are not kept.

    Safe to use from several threads.
    """

    def __init__(self, storage: Storage, plan: CachePlan) -> None:
        """Load from `storage` what `plan` and its shards name."""
        self._storage = storage
        self._plan = plan
        self._lock = Lock()
        self._of_plan: BlockCodec | None = None

    def get(self, sha256: str | None) -> BlockCodec:
        """Return the codec with these tables; None for a codec without.

        Raises:
            CacheCorrupt: the tables are missing, damaged, or of another vocabulary or N.
        """
        if sha256 != self._plan.codec_sha256:
            return self._load(sha256)
        with self._lock:
            if self._of_plan is None:
                self._of_plan = self._load(sha256)
            return self._of_plan

    def _load(self, sha256: str | None) -> BlockCodec:
        plan = self._plan
        if sha256 is None:
            return RawCodec(kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size)
        where = f"{self._storage.location}/{tables_name(sha256)}"
        remedy = "copy the file again from a sound copy of the cache"
        try:
            data = self._storage.read(tables_name(sha256))
        except FileNotFoundError:
            raise CacheCorrupt(
                "the tables of the cache's codec are missing", where=where, remedy=remedy
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise CacheCorrupt(
                "the tables of the cache's codec are damaged",
                where=where,
                found=f"sha256 {found[:12]}, {len(data)} bytes",
                remedy=remedy,
            )
        tables = HcTables.from_bytes(data, where=where)
        _require_fit(tables, plan, where)
        return HcCodec(tables)


def _require_fit(tables: HcTables, plan: CachePlan, where: object) -> None:
    found = (tables.kind, tables.num_draws, tables.vocab_size)
    expected = (plan.kind, plan.num_draws, plan.vocab_size)
    if found != expected:
        raise CacheCorrupt(
            "the codec's tables belong to another cache",
            where=where,
            found=f"{found[0]}, N = {found[1]}, vocabulary {found[2]}",
            expected=f"{expected[0]}, N = {expected[1]}, vocabulary {expected[2]}",
            remedy="use tables made for this vocabulary and sampler",
        )
