"""File names of a cache folder, and how messages name its sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distill_pretrain.cache.plan import MOST_SEQUENCES, CachePlan

_SHARD_FILE = re.compile(r"s-(\d{6,13})(?:-n(\d{1,7}))?\.(?:dpt|json)")
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
EXTENT_NAME = "extent.json"


def shard_name(plan: CachePlan, shard: int) -> str:
    """Return the file name of a finished shard; one with fewer sequences than the others says how many."""
    count = plan.shard_range(shard)[1]
    short = "" if count == plan.shard_sequences else f"-n{count}"
    return f"s-{shard:06d}{short}.dpt"


def record_name(plan: CachePlan, shard: int) -> str:
    """Return the file name of a shard's done record."""
    return shard_name(plan, shard).removesuffix(".dpt") + ".json"


def shards_in(plan: CachePlan, names: Iterable[str]) -> list[int]:
    """Return the shards of the plan, ascending, that have a file of either kind among `names`."""
    found = set()
    for name in names:
        match = _SHARD_FILE.fullmatch(name)
        shard = int(match[1]) if match else plan.num_shards
        if shard < plan.num_shards and name in (shard_name(plan, shard), record_name(plan, shard)):
            found.add(shard)
    return sorted(found)


def extent_of(plan: CachePlan, names: Iterable[str]) -> int:
    """Return the end of the last shard, in sequences, that has a file of either kind among `names`; 0 for none."""
    extent = 0
    for name in names:
        match = _SHARD_FILE.fullmatch(name)
        if match and (match[2] is None or 0 < int(match[2]) < plan.shard_sequences):
            end = int(match[1]) * plan.shard_sequences + int(match[2] or plan.shard_sequences)
            if end <= MOST_SEQUENCES:
                extent = max(extent, end)
    return extent


def missing_ranges(plan: CachePlan, present: Iterable[int]) -> list[tuple[int, int]]:
    """Return the (first, last) sequence of every run of shards that are not among the ascending `present`.

    The work is that of `present`: a damaged extent may ask for any number of shards.
    """
    ranges, expected = [], 0
    for shard in [*present, plan.num_shards]:
        if shard > expected:
            last = plan.num_sequences if shard == plan.num_shards else plan.shard_range(shard)[0]
            ranges.append((plan.shard_range(expected)[0], last - 1))
        expected = shard + 1
    return ranges


def ranges_text(ranges: list[tuple[int, int]]) -> str:
    """Write (first, last) pairs as messages list them: "0 to 511, 1024 to 1535"."""
    return ", ".join(f"{first} to {last}" for first, last in ranges)


def sequence_ranges(plan: CachePlan, shards: list[int]) -> str:
    """Write the sequences of some ascending shards, neighbours joined: "0 to 511, 1024 to 1535"."""
    return ranges_text(merged_ranges(plan, shards))


def merged_ranges(plan: CachePlan, shards: list[int]) -> list[tuple[int, int]]:
    """Return the (first, last) sequence of every run of neighbouring shards."""
    ranges: list[tuple[int, int]] = []
    for shard in shards:
        first, count = plan.shard_range(shard)
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
            count = plan.shard_range(shard)[0] + count - first
        ranges.append((first, first + count - 1))
    return ranges
