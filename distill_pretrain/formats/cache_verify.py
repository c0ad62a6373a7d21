"""Checking every byte of a cache, and reporting everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import CacheError
from distill_pretrain.formats.atomic import sha256_fd
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_reader import load_plan
from distill_pretrain.formats.cache_writer import MANIFEST_NAME, merged_ranges
from distill_pretrain.formats.manifest import Manifest, ShardRecord
from distill_pretrain.formats.shard import (
    ShardFile,
    block_where,
    decode_frame,
    shard_name,
    token_hash,
)

TokensOf = Callable[[int], npt.NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What `verify_cache` found.

    Attributes:
        problems: one line each; empty for a sound cache.
        damaged_shards: shards to capture again, ascending.
        recapture: (first, last) sequences of those shards, neighbours joined.
        shards_checked: shards looked at.
        blocks_checked: blocks whose bytes, targets and (if given) tokens were checked.
    """

    problems: tuple[str, ...]
    damaged_shards: tuple[int, ...]
    recapture: tuple[tuple[int, int], ...]
    shards_checked: int
    blocks_checked: int


def verify_cache(
    folder: Path,
    plan_tokens: TokensOf | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Check plan, manifest, done records, and every byte of every shard.

    Args:
        folder: of the cache.
        plan_tokens: sequence -> int32[L] inputs, to compare the token hashes with; None skips that.
        progress: called with (shards done, shards in all).

    Raises:
        CacheError: plan.json is missing or damaged, so nothing else can be judged.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    problems: list[str] = []
    damaged, blocks = [], 0
    listed = _manifest_records(folder, plan, problems)
    for shard in range(plan.num_shards):
        found: list[str] = []
        blocks += _check_shard(folder, plan, shard, listed.get(shard), plan_tokens, found)
        if found:
            damaged.append(shard)
            problems += found
        if progress is not None:
            progress(shard + 1, plan.num_shards)
    return VerifyResult(
        problems=tuple(problems),
        damaged_shards=tuple(damaged),
        recapture=tuple(merged_ranges(plan, damaged)),
        shards_checked=plan.num_shards,
        blocks_checked=blocks,
    )


def _manifest_records(folder: Path, plan: CachePlan, problems: list[str]) -> dict[int, ShardRecord]:
    try:
        manifest = Manifest.from_json_bytes((folder / MANIFEST_NAME).read_bytes(), plan)
    except FileNotFoundError:
        problems.append(f"{MANIFEST_NAME} is missing: the capture has not finished")
        return {}
    except CacheError as error:
        problems.append(str(error))
        return {}
    return {record.shard: record for record in manifest.shards}


def _check_shard(
    folder: Path,
    plan: CachePlan,
    shard: int,
    listed: ShardRecord | None,
    plan_tokens: TokensOf | None,
    problems: list[str],
) -> int:
    """Append the shard's problems; returns the number of blocks checked."""
    path = folder / shard_name(shard)
    record = None
    try:
        record = ShardRecord.from_json_bytes(path.with_suffix(".json").read_bytes(), plan, shard)
    except FileNotFoundError:
        problems.append(f"shard {shard}: no done record")
    except CacheError as error:
        problems.append(str(error))
    if record is not None and listed is not None and record != listed:
        problems.append(f"shard {shard}: the done record and the manifest differ")
    try:
        with ShardFile(path, plan, shard) as file:
            digest = sha256_fd(file.fd)
            for name, known in (("done record", record), ("manifest", listed)):
                if known is not None and (known.sha256, known.size) != (digest, file.size):
                    problems.append(
                        f"shard {shard}: sha256 {digest[:12]} and {file.size} bytes; the {name} "
                        f"says {known.sha256[:12]} and {known.size} bytes"
                    )
            return _check_blocks(file, plan_tokens, problems)
    except FileNotFoundError:
        problems.append(f"shard {shard}: {path} is missing")
    except CacheError as error:
        problems.append(str(error))
    return 0


def _check_blocks(file: ShardFile, plan_tokens: TokensOf | None, problems: list[str]) -> int:
    plan, shard = file.plan, file.shard
    tokens = np.empty(0, np.int32)
    for block in range(len(file.index)):
        sequence, offset, size = plan.block_place(shard, block)
        try:
            frame = file.frames(block, 1)[0]
            decode_frame(frame, plan, shard, block)
        except CacheError as error:
            problems.append(str(error))
            continue
        finally:
            if plan_tokens is not None and offset == 0:
                tokens = plan_tokens(sequence)
        if plan_tokens is None:
            continue
        if token_hash(tokens[offset : offset + size]) != frame.token_hash:
            where = block_where(plan, shard, block)
            problems.append(f"the tokens differ from those the teacher saw; where: {where}")
    return len(file.index)
