"""`distill-pretrain recompress`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import progress, say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.errors import ConfigError
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.cache.manifest import Manifest

SECTIONS = ()
PILOT_TOKENS = 131072

HELP = """
Writes a copy of a finished cache with another coding of the same targets: `hc` is compact (entropy coding, with
tables fitted to the targets), `raw` is plain fixed-width fields that any program can read. No teacher and no corpus
is needed, and students train from either to the same numbers. Every block that is read is checked, and every block
that is written is compared with it.

Reads   SOURCE: folder or URL (s3://bucket/cache) of a finished cache
Writes  DEST: a cache folder like that of `capture`, manifest.json last. SOURCE is left as it is.

Killed and started again it goes on where it stopped; started several times at once, or by torchrun, the processes
share the work. The bytes are the same.

Example
  distill-pretrain recompress runs/cache runs/cache-small
  torchrun --nproc-per-node=8 -m distill_pretrain recompress s3://bucket/cache caches/local --shard-tables
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("source", metavar="SOURCE", help="folder or URL of a finished cache")
    parser.add_argument("dest", metavar="DEST", help="folder of the new cache")
    parser.add_argument(
        "--codec", choices=("hc", "raw"), default="hc", help="coding of the new cache (default: hc)"
    )
    parser.add_argument(
        "--shard-tables",
        action="store_true",
        help="fit tables to each shard too, and use them where that saves more than they take "
        "(for a corpus that changes its nature along the way; codec hc, twice the work)",
    )
    parser.add_argument(
        "--pilot-tokens",
        type=int,
        default=PILOT_TOKENS,
        metavar="N",
        help=f"positions, spread over the cache, that tables are fitted to (default: {PILOT_TOKENS})",
    )


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Recompresses a cache; every process of the job takes part."""
    _check(args)
    from distill_pretrain.cache.merge import copy_recipe
    from distill_pretrain.cache.recompress import recompress_cache

    dest = Path(args.dest)
    with progress(None, "recompressing", unit="positions") as bar:
        result = recompress_cache(
            args.source,
            dest,
            codec=args.codec,
            shard_tables=args.shard_tables,
            pilot_tokens=args.pilot_tokens,
            share=(launch_rank(), launch_world_size()),
            progress=bar.advance,
        )
    if result.written is None:
        say("other processes still write shards; the last of them publishes the cache")
        return
    copy_recipe(args.source, dest)
    _summarise(dest, result.source, result.written)


def _check(args: argparse.Namespace) -> None:
    from distill_pretrain.files.storage import is_remote

    if is_remote(args.dest):
        raise ConfigError(
            "a cache is written to a folder",
            where="DEST",
            found=args.dest,
            remedy="name a folder, and copy it to the store when it is finished",
        )
    if args.codec == "raw" and args.shard_tables:
        raise ConfigError(
            "codec raw has no tables",
            where="--shard-tables",
            remedy="leave --shard-tables out, or choose --codec hc",
        )
    if args.pilot_tokens < 1:
        raise ConfigError(
            "tables need positions to be fitted to",
            where="--pilot-tokens",
            found=args.pilot_tokens,
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
