"""Recompressing: the same targets under another codec."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import progress
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.cache.manifest import Manifest

_log = logging.getLogger(__name__)

PILOT_TOKENS = 131072


def recompress(
    source: str,
    dest: str,
    *,
    codec: Literal["hc", "raw"] = "hc",
    shard_tables: bool = False,
    pilot_tokens: int = PILOT_TOKENS,
) -> None:
    """Recompress a finished cache; every process of the job takes part.

    Args:
        source: folder or URL of a finished cache.
        dest: folder of the new one.
        codec: "hc" or "raw".
        shard_tables: fit tables to each shard too, and use them where that saves more than they take.
        pilot_tokens: positions, spread over the cache, that tables are fitted to.

    Raises:
        ConfigError: settings that cannot be used.
        CacheError: the source is damaged or unfinished, or the folder holds something else.
    """
    _check(dest, codec, shard_tables=shard_tables, pilot_tokens=pilot_tokens)
    from distill_pretrain.cache.merge import copy_recipe
    from distill_pretrain.cache.recompress import recompress_cache

    folder = Path(dest)
    with progress(None, "recompressing", unit="positions") as bar:
        result = recompress_cache(
            source,
            folder,
            codec=codec,
            shard_tables=shard_tables,
            pilot_tokens=pilot_tokens,
            share=(launch_rank(), launch_world_size()),
            progress=bar.advance,
        )
    if result.written is None:
        _log.info("other processes still write shards; the last of them publishes the cache")
        return
    copy_recipe(source, folder)
    _summarise(folder, result.source, result.written)


def _check(dest: str, codec: str, *, shard_tables: bool, pilot_tokens: int) -> None:
    from distill_pretrain.files.storage import is_remote

    if is_remote(dest):
        raise ConfigError(
            "a cache is written to a folder",
            where="DEST",
            found=dest,
            remedy="name a folder, and copy it to the store when it is finished",
        )
    if codec == "raw" and shard_tables:
        raise ConfigError(
            "codec raw has no tables",
            where="--shard-tables",
            remedy="leave --shard-tables out, or choose --codec hc",
        )
    if pilot_tokens < 1:
        raise ConfigError(
            "tables need positions to be fitted to",
            where="--pilot-tokens",
            found=pilot_tokens,
            expected="1 or more",
            remedy="raise it",
        )


def _summarise(dest: Path, source: Manifest, written: Manifest) -> None:
    """Printed by the process that published the cache, whichever that is."""
    from distill_pretrain.cache.codec.files import tables_name

    before, after = source.totals, written.totals
    text = (
        f"cache complete: {dest}\n"
        f"  bytes per token: {before['bytes_per_token']:.2f} before, {after['bytes_per_token']:.2f} after"
    )
    tables = {r.codec_sha256 for r in written.shards if r.codec_sha256 is not None}
    if tables:
        size = sum((dest / tables_name(sha256)).stat().st_size for sha256 in tables)
        own = sum(r.codec_sha256 != written.plan.codec_sha256 for r in written.shards)
        text += (
            f"\n  tables: {size:,} bytes beside that, {size / (after['tokens'] or 1):.2f} per token; "
            f"{own} of {len(written.shards)} shards have tables of their own"
        )
    print(text, flush=True)
