"""`distill-pretrain verify`."""

from __future__ import annotations

import argparse

from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank

SECTIONS = ("data",)

HELP = """
Checks a cache completely: the checksum of every block, the hash of every file, the rules of the format, and that
each block belongs to the tokens of this corpus. Training checks every block it reads, so this is for after a copy or
a disk fault.

Reads   data.cache, data.tokens (.bin/.idx)
Writes  nothing; exit status 2 and a list of what to capture again if anything is wrong.
        With --repair, damaged shards are set aside as .bad and the next `capture` makes just those anew;
        with --quick it takes seconds and finds missing, cut-off and misplaced files only.

Example
  distill-pretrain verify recipe.yaml

  with recipe.yaml:
    data: {tokens: runs/tokens/train, seq_len: 256, cache: runs/cache}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--repair",
        action="store_true",
        help="set damaged shards aside, so that `capture` makes them anew",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of each shard check only size, header, index and the first and last block",
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Checks the cache of a recipe; one process does it."""
    from distill_pretrain.jobs.verify import require_cache, verify

    require_cache(recipe)
    if launch_rank() == 0:
        verify(recipe, quick=args.quick, repair=args.repair)
