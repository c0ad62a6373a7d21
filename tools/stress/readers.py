"""Readers of files with a flipped bit, of files cut off, and of caches used with anything else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.cache import CacheReader
from distill_pretrain.cache.names import EXTENT_NAME, shard_name
from distill_pretrain.errors import CacheError, CacheIncomplete, CacheMismatch
from stress.caches import outcome, read_all, verified, workplace, write_cache
from stress.samples import Sample

UNREAD = {EXTENT_NAME}  # says nothing that the manifest does not


def bits(sample: Sample, *, stride: int = 1) -> dict[str, Any]:
    """Flip every bit of every file of a finished cache, one at a time."""
    counts: dict[str, Counter[str]] = {}
    unharmed: dict[str, list[int]] = {}
    with workplace(in_memory=True) as root:
        folder = root / "cache"
        write_cache(folder, sample)
        truth = read_all(folder, sample)
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            check = verified if _is_done_record(path) else read_all
            found = counts[path.name] = Counter()
            for bit in range(0, 8 * len(whole), stride):
                damaged = bytearray(whole)
                damaged[bit >> 3] ^= 1 << (bit & 7)
                path.write_bytes(damaged)
                state = outcome(check, folder, sample, truth)
                found[state] += 1
                if state == "benign":
                    unharmed.setdefault(path.name, []).append(bit >> 3)
            path.write_bytes(whole)
    total = sum(counts.values(), Counter())
    return {
        "passed": total["silent"] == 0 and set(unharmed) <= UNREAD,
        "flips": total.total(),
        **{state: total[state] for state in ("detected", "benign", "silent")},
        "by_file": {name: dict(found) for name, found in counts.items()},
        "benign_bytes": {name: sorted(set(at)) for name, at in unharmed.items()},
    }


def _is_done_record(path: Path) -> bool:
    return path.name.startswith("s-") and path.suffix == ".json"


def truncate(sample: Sample, *, stride: int = 1) -> dict[str, Any]:
    """Cut every file to every length, before it is opened and while a reader has it open."""
    opened_later, opened_before = Counter[str](), Counter[str]()
    unharmed: set[str] = set()
    with workplace(in_memory=True) as root:
        folder = root / "cache"
        write_cache(folder, sample)
        truth = read_all(folder, sample)
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            check = verified if _is_done_record(path) else read_all
            for length in range(0, len(whole), stride):
                path.write_bytes(whole)
                with CacheReader.open(folder) as reader:
                    reader.read(0, sample.tokens[0])
                    os.truncate(path, length)
                    seen = outcome(partial(read_all, seen=reader), folder, sample, truth)
                opened_before[seen] += 1
                later = outcome(check, folder, sample, truth)
                opened_later[later] += 1
                if later == "benign":
                    unharmed.add(path.name)
            path.write_bytes(whole)
    return {
        "passed": not opened_later["silent"] and not opened_before["silent"] and unharmed <= UNREAD,
        "lengths": opened_later.total(),
        "cut_before_opening": dict(opened_later),
        "cut_while_open": dict(opened_before),
        "benign_files": sorted(unharmed),
    }


def misalign(sample: Sample) -> dict[str, Any]:
    """Use a sound cache with something it was not made from; every message is kept."""
    plan, messages = sample.plan, {}

    def expect(case: str, kind: type[CacheError], action: Callable[[], object]) -> None:
        try:
            action()
            messages[case] = "NOT DETECTED"
        except kind as error:
            messages[case] = str(error)
        except Exception as error:
            messages[case] = f"NOT DETECTED, but {error!r}"

    with workplace(in_memory=True) as root:
        folder = root / "cache"
        write_cache(folder, sample)
        tokens = sample.tokens[1]
        changed = tokens.copy()
        changed[plan.seq_len // 2] ^= 1
        with CacheReader.open(folder) as reader:
            expect("shifted by one", CacheMismatch, lambda: reader.read(1, np.roll(tokens, 1)))
            expect("one token changed", CacheMismatch, lambda: reader.read(1, changed))
            expect("another sequence", CacheMismatch, lambda: reader.read(0, tokens))
            for name, value in (
                ("vocab_size", plan.vocab_size + 1),
                ("seq_len", plan.seq_len + 1),
                ("tokenizer_sha256", "0" * 64),
                ("tokens", {**plan.tokens, "bin_sha256": "0" * 64}),
                ("sequence_plan_id", "0" * 64),
                ("num_sequences", plan.num_sequences + 1),
            ):
                run: dict[str, Any] = {name: value}
                expect(
                    f"run with another {name}", CacheMismatch, partial(reader.check_matches, **run)
                )
        sampler = {**plan.sampler, "num_draws": plan.num_draws + 1}
        other = replace(sample, plan=replace(plan, sampler=sampler))
        expect("capture with another N", CacheMismatch, lambda: other.writer(folder))
        (folder / shard_name(plan, 0)).unlink()
        expect("missing shard", CacheIncomplete, lambda: CacheReader.open(folder))
    missed = [case for case, message in messages.items() if message.startswith("NOT DETECTED")]
    return {"passed": not missed, "cases": len(messages), "missed": missed, "messages": messages}
