"""`distill-pretrain merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.errors import CacheIncomplete, ConfigError
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.processes.env import launch_rank

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ()

HELP = """
Makes one cache of several that were captured with the same recipe in different places (two clusters, a job that
moved), each with some of the shards. Files are not read or coded again: within one file system they are linked and
take no further space, else copied and checked.

Reads   SOURCE ...: folders or URLs (s3://bucket/cache) of caches, finished or not
Writes  DEST: the shards of all of them, and manifest.json once none is missing. DEST may be a cache of that recipe
        already; what the sources have is then added to it.

If shards are missing, exit status 2 and their sequences; what was found stays in DEST. Capture the rest into DEST,
or merge again with a source that has it. Caches of another plan are refused, and so are two different versions of
one shard. A linked file is as sound as the source's: `distill-pretrain verify` tells.

Example
  distill-pretrain merge runs/cache cluster-a/cache cluster-b/cache
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument("dest", metavar="DEST", help="folder of the merged cache; may exist")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="folder or URL of a cache")
    parser.add_argument(
        "--num-sequences",
        type=int,
        metavar="N",
        help="sequences that the merged cache must have (default: up to the last that one of the caches has finished)",
    )


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Merges caches; one process does it."""
    if launch_rank() != 0:
        return
    _check(args)
    from distill_pretrain.cache.merge import RECIPE_NAME, copy_recipe, merge_caches
    from distill_pretrain.cache.names import ranges_text

    dest = Path(args.dest)
    with progress(None, "merging", unit="shards") as bar:
        result = merge_caches(
            dest, args.sources, num_sequences=args.num_sequences, progress=bar.reach
        )
    say(f"{result.linked:,} shards linked, {result.copied:,} copied into {dest}")
    for source in args.sources:
        if not (dest / RECIPE_NAME).exists():
            copy_recipe(source, dest)
    if result.manifest is None:
        raise CacheIncomplete(
            "the merged cache is not finished: no source has all of the missing shards",
            where=dest,
            found=f"{result.missing_shards} of {result.plan.num_shards} shards missing: sequences "
            + ranges_text(list(result.missing)),
            remedy="capture them with `distill-pretrain capture` and capture.output_dir set to this folder, or "
            "merge again with a cache that has them, or lower --num-sequences; what was merged stays",
        )
    say(f"cache complete: {dest}, {result.manifest.plan.num_sequences:,} sequences")


def _check(args: argparse.Namespace) -> None:
    from distill_pretrain.files.storage import is_remote

    if is_remote(args.dest):
        raise ConfigError(
            "a cache is written to a folder",
            where="DEST",
            found=args.dest,
            remedy="name a folder, and copy it to the store when it is finished",
        )
