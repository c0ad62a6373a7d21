"""Whole caches: written, read as a training run reads them, and compared."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pretrain.cache import CacheReader, CacheWriter, verify_cache
from distill_pretrain.errors import CacheError
from stress.samples import Sample


@contextmanager
def workplace(*, in_memory: bool) -> Iterator[Path]:
    """A temporary folder, on tmpfs where there is one if `in_memory`."""
    shm = Path("/dev/shm")
    place = str(shm) if in_memory and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stress-cache-", dir=place) as folder:
        yield Path(folder)


def write_cache(
    folder: Path, sample: Sample, *, pause: float = 0.0, seed: int | None = None
) -> None:
    """Finish a cache, alone or beside others; with a seed the shards are taken in random order."""
    writer = sample.writer(folder)
    draw = random.Random(seed)
    while pending := writer.pending():
        shard = pending[0] if seed is None else draw.choice(pending)
        write_shard(writer, sample, shard, pause, draw.randrange(1 << 30))
        time.sleep(pause)
    writer.publish_manifest()


def write_shard(writer: CacheWriter, sample: Sample, shard: int, pause: float, seed: int) -> None:
    """Fill a shard, with a random pause of up to `pause` seconds after each block; nothing if another owns it."""
    owned = writer.claim(shard)
    if owned is None:
        return
    draw = random.Random(seed)
    with owned:
        while owned.next_block < owned.num_blocks:
            sequence, offset, size = owned.place(owned.next_block)
            tokens = sample.tokens[sequence][offset : offset + size]
            owned.append(sample.block(sequence, offset, size), tokens)
            time.sleep(pause * draw.random())
        owned.finish()


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file but hidden temporaries and the empty `.part` of a killed late-comer."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and not (path.suffix == ".part" and _is_late(path))
    }


def _is_late(part: Path) -> bool:
    """Whether a `.part` was created by a writer that found the shard finished, and was killed."""
    return part.with_suffix("").exists() and part.stat().st_size == 0


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of files that are in one tree only, or differ."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def reference_tree(root: Path, sample: Sample) -> dict[str, str]:
    """Of what one unbroken writer leaves, in `root / "reference"`."""
    write_cache(root / "reference", sample)
    return tree(root / "reference")


def read_all(folder: Path, sample: Sample, seen: CacheReader | None = None) -> bytes:
    """Everything a training run reads from a cache, after its usual checks, as bytes."""
    reader = CacheReader.open(folder) if seen is None else seen
    with reader:
        plan = sample.plan
        reader.check_matches(
            sequence_plan_id=plan.sequence_plan_id,
            vocab_size=plan.vocab_size,
            seq_len=plan.seq_len,
            tokenizer_sha256=plan.tokenizer_sha256,
            tokens=plan.tokens,
            num_sequences=plan.num_sequences,
        )
        rows = [reader.read(s, sample.tokens[s]) for s in range(plan.num_sequences)]
    return b"".join(
        part.tobytes() for row in rows for part in (row.entries_per_token, row.ids, row.probs())
    )


def verified(folder: Path, sample: Sample) -> bytes:
    """What is read from a cache in which `verify` finds nothing; CacheError if it does."""
    problems = verify_cache(folder).problems
    if problems:
        raise CacheError(problems[0])
    return read_all(folder, sample)


def outcome(
    check: Callable[[Path, Sample], bytes], folder: Path, sample: Sample, truth: bytes
) -> str:
    """detected, benign (the same data was read), or silent (other data was read)."""
    try:
        return "benign" if check(folder, sample) == truth else "silent"
    except CacheError:
        return "detected"
