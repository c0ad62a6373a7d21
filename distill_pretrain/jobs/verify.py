"""Verifying: every byte of a recipe's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.config import require
from distill_pretrain.errors import CacheCorrupt, CacheIncomplete, CacheMismatch, ConfigError
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.jobs.recipe import Recipe

if TYPE_CHECKING:
    from distill_pretrain.cache.verify import VerifyResult
    from distill_pretrain.data.sources import SequenceData

MOST_LISTED = 20


def require_cache(recipe: Recipe) -> None:
    """Raise ConfigError where the recipe names no cache."""
    require(recipe, "verify", "data")
    assert recipe.data
    if recipe.data.cache is None:
        raise ConfigError(
            "there is no cache to check",
            where="data.cache",
            expected="folder written by `distill-pretrain capture`",
            remedy="set data.cache",
        )


def verify(recipe: Recipe, *, quick: bool = False, repair: bool = False) -> VerifyResult:
    """Check the cache of a recipe against its format and the recipe's corpus; one process does it.

    Args:
        recipe: with the section data, and a cache in it.
        quick: of each shard only size, header, index, first and last block.
        repair: set damaged shards aside, so that `capture` makes them anew.

    Raises:
        CacheCorrupt: something is wrong; every problem is named.
        CacheMismatch: the cache belongs to another corpus.
    """
    require_cache(recipe)
    assert recipe.data and recipe.data.cache
    from distill_pretrain.cache.verify import verify_cache
    from distill_pretrain.data.sources import open_sequences, require_one_source

    require_one_source(recipe.data, "verify", "data.cache")
    sequences = open_sequences(recipe.data)
    folder = recipe.data.cache
    _check_matches(folder, sequences)
    with progress(None, "verifying", unit="shards") as bar:
        result = verify_cache(
            folder,
            lambda sequence: sequences.plan.read([sequence])[0][0],
            bar.reach,
            quick=quick,
        )
    say(f"{result.shards_checked:,} shards, {result.blocks_checked:,} blocks checked in {folder}")
    for note in result.notes:
        say(f"note: {note}")
    if repair:
        _repair(folder, result)
    if result.problems:
        raise _corrupt(folder, result, repaired=repair)
    if quick:
        say("no problem found; only a check without --quick reads every byte")
    else:
        say("sound: every byte is as written, and belongs to this corpus")
    return result


def _check_matches(folder: str, sequences: SequenceData) -> None:
    """Raises CacheMismatch when the cache belongs to another corpus; damage is left to the full check."""
    from distill_pretrain.cache.own_plan import require_own_plan
    from distill_pretrain.cache.reader import CacheReader, load_plan
    from distill_pretrain.data.sources import require_made_from
    from distill_pretrain.files.storage import open_storage

    try:
        with CacheReader.open(folder) as cache:
            require_made_from(cache, sequences)
    except (CacheCorrupt, CacheIncomplete):
        storage = open_storage(folder)
        plan = load_plan(storage)
        require_own_plan(storage, plan)
        if plan.sequence_plan_id != sequences.plan.plan_id:
            raise CacheMismatch(
                "the cache was made from other sequences than the recipe names",
                where=folder,
                found=f"sequence plan {plan.sequence_plan_id[:12]}, seq_len {plan.seq_len}",
                expected=f"{sequences.plan.plan_id[:12]}, seq_len {sequences.plan.seq_len}",
                remedy="set data.tokens, data.seq_len, data.seed and data.documents to those of the capture",
            ) from None


def _repair(folder: str, result: VerifyResult) -> None:
    from distill_pretrain.cache.verify import repair_cache
    from distill_pretrain.files.storage import is_remote

    if is_remote(folder):
        raise ConfigError(
            "a cache in an object store cannot be repaired in place",
            where="data.cache",
            found=folder,
            remedy="repair the folder it was copied from, and copy the shards again",
        )
    repair_cache(Path(folder), result)


def _corrupt(folder: str, result: VerifyResult, *, repaired: bool) -> CacheCorrupt:
    listed = [f"  - {problem}" for problem in result.problems[:MOST_LISTED]]
    if len(result.problems) > MOST_LISTED:
        listed.append(f"  ... and {len(result.problems) - MOST_LISTED} more")
    remedy = "run `distill-pretrain capture` again"
    if result.damaged_shards:
        shards = ", ".join(map(str, result.damaged_shards))
        ranges = ", ".join(f"{first} to {last}" for first, last in result.recapture)
        affected = f"shards {shards} (sequences {ranges})"
        remedy += f"; it makes {affected} anew"
        if not repaired:
            remedy = (
                f"copy {affected} again from a sound cache, or run `verify --repair` and then "
                "`distill-pretrain capture`, which makes only those anew"
            )
    count = len(result.problems)
    title = "the cache has a problem:" if count == 1 else f"the cache has {count} problems:"
    return CacheCorrupt("\n".join([title, *listed, ""]), where=folder, remedy=remedy)
