"""`distill-pretrain recompress`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill_pretrain.jobs.recompress import PILOT_TOKENS, recompress

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ()

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
    """Add the arguments of this verb."""
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
    """Recompress a cache; every process of the job takes part."""
    recompress(
        args.source,
        args.dest,
        codec=args.codec,
        shard_tables=args.shard_tables,
        pilot_tokens=args.pilot_tokens,
    )
