"""Readers of files made to do harm: they may only answer or raise CacheError, soon and within bounded memory."""

from __future__ import annotations

import random
import signal
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from distill_pretrain.cache import CachePlan, CacheReader
from stress.caches import outcome, read_all, workplace, write_cache
from stress.mutants import Contents, mutant_of
from stress.samples import Sample

READ_SECONDS = 5.0  # of processor time, so that a busy machine is no failure


def fuzz(sample: Sample, *, files: int, seed: int) -> dict[str, Any]:
    """Read caches with mutated files, half of them with checksums made to fit again.

    Mutated shards are read by a reader that opened the sound cache, so their size is not compared with the manifest
    first. Peak allocation is tracemalloc's, which sees Python's and numpy's memory: more than `_allocation_bound` means
    that a file was believed before it was checked.
    """
    draw = random.Random(seed)
    states: Counter[str] = Counter()
    broken: list[str] = []
    peak = 0
    handler = signal.signal(signal.SIGPROF, _too_long)
    with workplace(in_memory=True) as root:
        folder = root / "cache"
        write_cache(folder, sample)
        truth = read_all(folder, sample)
        opened = CacheReader.open(folder)
        plan = opened.plan  # with the sha256 of the codec's tables
        sound = {path.name: path.read_bytes() for path in folder.iterdir()}
        bound = _allocation_bound(plan, sound)
        tracemalloc.start()
        for number in range(files):
            repaired = draw.random() < 0.5
            mutant = mutant_of(sound, plan, draw, repaired=repaired)
            shards_only = all(name.endswith(".dpt") for name in mutant)
            _put(folder, mutant)
            seen = opened if shards_only else None
            state, used = _guarded_read(folder, sample, truth, seen)
            if (
                used > bound
            ):  # or Python's own tables have just grown: what a file costs, it costs twice
                used = min(used, _guarded_read(folder, sample, truth, seen)[1])
            _put(folder, {name: sound.get(name) for name in mutant})
            if repaired and state == "silent":
                state = "other data, as only verify can tell"
            states[f"{'checksums repaired' if repaired else 'plain'}: {state}"] += 1
            peak = max(peak, used)
            if state == "silent" or state.startswith("broke") or used > bound:
                broken.append(f"file {number} of seed {seed}, {sorted(mutant)}: {state}, {used} B")
        tracemalloc.stop()
    signal.signal(signal.SIGPROF, handler)
    return {
        "passed": not broken,
        "files": files,
        "outcomes": dict(sorted(states.items())),
        "peak_allocation": peak,
        "allocation_bound": bound,
        "broken": broken[:20],
    }


def _put(folder: Path, contents: Contents) -> None:
    """Write files; None removes one."""
    for name, data in contents.items():
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)


def _allocation_bound(plan: CachePlan, sound: dict[str, bytes]) -> int:
    """Bytes that reading may take at once.

    64 B an entry for one sequence of full rows, all results, four times the files, 32 times the codec's tables (their
    codes are looked up in arrays), and 64 KiB.
    """
    entries = plan.seq_len * min(plan.num_draws, plan.vocab_size)
    results = plan.num_sequences * entries * 16
    tables = sum(len(data) for name, data in sound.items() if name.startswith("codec-"))
    files = sum(map(len, sound.values()))
    return 64 * entries + results + 4 * files + 32 * tables + (64 << 10)


class _TooLong(BaseException):
    """Derived so that no handler of the package takes it for an error of its own."""


def _too_long(*_: object) -> None:
    raise _TooLong(f"no answer in {READ_SECONDS} s of processor time")


def _guarded_read(
    folder: Path, sample: Sample, truth: bytes, opened: CacheReader | None
) -> tuple[str, int]:
    """(outcome, peak bytes) of reading a cache; anything but an answer or a CacheError is "broke ..."."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_PROF, READ_SECONDS)
    try:
        state = outcome(partial(read_all, seen=opened), folder, sample, truth)
    except (Exception, _TooLong) as error:
        state = f"broke with {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return state, tracemalloc.get_traced_memory()[1] - before
