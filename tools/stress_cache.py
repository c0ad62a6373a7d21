"""Long fault tests of the sparse-logit cache: killed writers, races, flipped bits, hostile files, full disks.

    python tools/stress_cache.py [--which kill,race,bits,truncate,misalign,fuzz,diskfull]
                                 [--codec raw|hc] [--sampler systematic|multinomial|topk] [--output FILE.json]

Works on small caches that it makes itself from synthetic, Zipf-like targets; the defaults take some minutes. Prints one
line per test and ends with status 1 if a promise of FORMAT.md was broken. Linux only (fork, /proc).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import distill_pretrain
from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets
from distill_pretrain.errors import CacheError, CacheIncomplete, CacheMismatch
from distill_pretrain.formats import (
    CachePlan,
    CacheReader,
    CacheWriter,
    canonical_json,
    verify_cache,
)
from distill_pretrain.formats.codec_files import tables_name
from distill_pretrain.formats.codecs import CodecName, codec_number
from distill_pretrain.formats.hc_build import build_tables
from distill_pretrain.formats.hc_tables import HcTables
from distill_pretrain.formats.names import shard_name
from distill_pretrain.formats.shard import ShardSpec
from distill_pretrain.sampling import RNG_NAME, sample_targets

FORK = multiprocessing.get_context("fork")
HEADER, FOOTER, INDEX_ROW, FRAME_HEAD = 256, 40, 32, 32
READ_SECONDS = 5.0
UNREAD = {"extent.json"}  # says nothing that the manifest does not
Result = dict[str, Any]
Contents = dict[str, bytes | None]


@dataclass(frozen=True)
class Sample:
    """A synthetic cache to be written: tokens, labels and targets of every sequence."""

    plan: CachePlan
    tokens: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    targets: tuple[RaggedTargets, ...]

    def writer(self, folder: Path) -> CacheWriter:
        """One process's hand in a folder."""
        return CacheWriter.create_or_resume(
            folder,
            self.plan,
            make_tables=self.tables,
            labels_of=lambda sequence: self.labels[sequence],
            sync_every=4,
        )

    def tables(self) -> HcTables:
        """Of the entropy codec, from the first half of the targets."""
        plan = self.plan
        return build_tables(
            self.targets[: len(self.targets) // 2],
            kind=plan.kind,
            num_draws=plan.num_draws,
            vocab_size=plan.vocab_size,
        )

    def block(self, sequence: int, offset: int, size: int) -> RaggedTargets:
        """Targets of some positions of a sequence."""
        whole = self.targets[sequence]
        ends = np.concatenate([[0], np.cumsum(whole.entries_per_token)])
        entries = slice(int(ends[offset]), int(ends[offset + size]))
        return replace(
            whole,
            entries_per_token=whole.entries_per_token[offset : offset + size],
            ids=whole.ids[entries],
            values=whole.values[entries],
        )


def make_sample(
    codec: CodecName,
    sampler: str,
    *,
    vocab_size: int,
    num_draws: int,
    num_sequences: int,
    **layout: Any,
) -> Sample:
    """Targets drawn by the package's samplers from noisy Zipf logits, some peaked, some flat."""
    seq_len = layout["seq_len"]
    tokens, labels, targets = [], [], []
    for sequence in range(num_sequences):
        draw = np.random.Generator(np.random.Philox(key=sequence))
        scale = draw.uniform(0.5, 6.0, (seq_len, 1))
        noise = draw.standard_normal((seq_len, vocab_size))
        logits = (scale * noise - np.log1p(np.arange(vocab_size))).astype(np.float32)
        row = draw.integers(vocab_size, size=seq_len + 1).astype(np.int32)
        label = row[1:].copy()
        if sequence == num_sequences - 1:
            label[-seq_len // 4 :] = IGNORED_LABEL  # the end of a corpus is padding
        found = sample_targets(
            logits,
            np.arange(sequence * seq_len, (sequence + 1) * seq_len, dtype=np.uint64),
            sampler=sampler,
            num_draws=num_draws,
            seed=1,
            valid=label != IGNORED_LABEL,
        )
        tokens.append(row[:-1])
        labels.append(label)
        targets.append(found)
    plan = CachePlan(
        sequence_plan_id="a" * 64,
        tokens={"bin_sha256": "b" * 64, "idx_sha256": "c" * 64},
        tokenizer_sha256="d" * 64,
        vocab_size=vocab_size,
        num_sequences=num_sequences,
        sampler={
            "name": sampler,
            "num_draws": num_draws,
            "temperature": 1.0,
            "seed": 1,
            "rng": RNG_NAME,
        },
        teacher={"kind": "synthetic"},
        micro_batch_size=1,
        codec=codec_number(codec, sampler),
        software={"distill-pretrain": distill_pretrain.__version__},
        **layout,
    )
    return Sample(plan, tuple(tokens), tuple(labels), tuple(targets))


def writers_sample(codec: CodecName, sampler: str) -> Sample:
    """Five shards of some 4 KiB pages, the last one shorter: enough to be killed in."""
    return make_sample(
        codec,
        sampler,
        vocab_size=2000,
        num_draws=50,
        num_sequences=18,
        seq_len=256,
        block_tokens=64,
        shard_sequences=4,
    )


def readers_sample(codec: CodecName, sampler: str) -> Sample:
    """Two shards of about 1 KiB: small enough for every bit."""
    return make_sample(
        codec,
        sampler,
        vocab_size=300,
        num_draws=20,
        num_sequences=3,
        seq_len=24,
        block_tokens=10,
        shard_sequences=2,
    )


def write_shard(writer: CacheWriter, sample: Sample, shard: int, pause: float, seed: int) -> None:
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


@contextmanager
def workplace(*, in_memory: bool) -> Iterator[Path]:
    """A temporary folder, on tmpfs where there is one if `in_memory`."""
    shm = Path("/dev/shm")
    place = str(shm) if in_memory and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stress-cache-", dir=place) as folder:
        yield Path(folder)


def reference_tree(root: Path, sample: Sample) -> dict[str, str]:
    write_cache(root / "reference", sample)
    return tree(root / "reference")


def kill(sample: Sample, *, kills: int, seed: int) -> Result:
    """Kill -9 all of 1 to 3 writers at random times, damage what they left, start others."""
    draw = random.Random(seed)
    done, caches, worker_errors = 0, 0, 0
    damaged: Counter[str] = Counter()
    wrong: list[str] = []
    with workplace(in_memory=False) as root:
        reference = reference_tree(root, sample)
        start = time.perf_counter()
        write_cache(root / "timed", sample, pause=0.001)
        unbroken = time.perf_counter() - start
        while done < kills:
            folder, writers, finished = root / f"{caches}", 0, False
            while not finished:
                writers = draw.choice([n for n in (1, 2, 3) if n != writers])
                codes = _run_and_kill(folder, sample, writers, draw, unbroken)
                done += codes.count(-signal.SIGKILL)
                worker_errors += sum(code not in (0, -signal.SIGKILL) for code in codes)
                finished = 0 in codes
                if not finished:
                    damaged.update(_damage_parts(folder, draw))
            caches += 1
            wrong += _differences(tree(folder), reference)
            shutil.rmtree(folder)
    return {
        "passed": not wrong and not worker_errors,
        "kills": done,
        "completed_caches": caches,
        "damaged_parts": dict(sorted(damaged.items())),
        "worker_errors": worker_errors,
        "differences": wrong,
    }


def _run_and_kill(
    folder: Path, sample: Sample, writers: int, draw: random.Random, horizon: float
) -> list[int | None]:
    """Exit codes of the writers, none of which lives any more."""
    workers = [
        FORK.Process(
            target=write_cache,
            args=(folder, sample),
            kwargs={"pause": 0.001, "seed": draw.randrange(1 << 30)},
        )
        for _ in range(writers)
    ]
    for worker in workers:
        worker.start()
    time.sleep(draw.random() * horizon / writers)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _damage_parts(folder: Path, draw: random.Random) -> Iterator[str]:
    """Do to unfinished shards what a power cut does; yields the kinds."""
    for path in sorted(folder.glob("*.part")):
        size = path.stat().st_size
        if size == 0 or draw.random() < 0.5:
            continue
        kind = draw.choice(["truncated", "zeroed", "garbage", "zeroed page"])
        cut = draw.randrange(size)
        with open(path, "r+b") as file:
            if kind == "truncated":
                file.truncate(cut)
            elif kind == "zeroed":
                file.seek(cut)
                file.write(bytes(size - cut))
            elif kind == "garbage":
                file.seek(draw.choice([cut, size]))
                file.write(draw.randbytes(draw.randrange(1, 5000)))
            else:
                page = cut // 4096 * 4096
                file.seek(page)
                file.write(bytes(min(4096, size - page)))
        yield kind


def race(sample: Sample, *, rounds: int) -> Result:
    """Three writers that all want the same shard all the time."""
    wrong: list[str] = []
    errors = 0
    with workplace(in_memory=False) as root:
        reference = reference_tree(root, sample)
        for number in range(rounds):
            folder = root / f"{number}"
            workers = [
                FORK.Process(target=write_cache, args=(folder, sample), kwargs={"pause": 0.0003})
                for _ in range(3)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            errors += sum(worker.exitcode != 0 for worker in workers)
            wrong += _differences(tree(folder), reference)
            wrong += [path.name for path in folder.glob("*.part")]
            shutil.rmtree(folder)
    return {
        "passed": not wrong and not errors,
        "rounds": rounds,
        "writers": 3,
        "worker_errors": errors,
        "differences": wrong,
    }


def _differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def diskfull(sample: Sample, *, sizes: int) -> Result:
    """Let writes fail at many sizes, by RLIMIT_FSIZE and on a small tmpfs, then complete the cache."""
    with workplace(in_memory=False) as root:
        reference = reference_tree(root, sample)
        files = [path.stat().st_size for path in (root / "reference").iterdir()]
        limits = np.linspace(1, max(files) * 1.1, sizes).astype(int).tolist()
        outcomes = [
            _limited(root / f"limit-{limit}", sample, reference, file_bytes=limit)
            for limit in limits
        ]
        result: Result = {"rlimit_fsize": dict(sorted(Counter(outcomes).items()))}
        capacities = np.linspace(8192, sum(files) * 1.3, sizes).astype(int).tolist()
        refusal = _mount_refusal(root / "mount")
        if refusal is None:
            on_tmpfs = [
                _on_small_tmpfs(root / "mount", sample, reference, capacity)
                for capacity in capacities
            ]
            outcomes += on_tmpfs
            result["small_tmpfs"] = dict(sorted(Counter(on_tmpfs).items()))
        else:
            result["small_tmpfs"] = f"skipped: {refusal}"
    failed = outcomes.count("refused with a remedy, then completed")
    passed = failed > 0 and set(outcomes) <= {"refused with a remedy, then completed", "had room"}
    return {"passed": passed, **result}


def _limited(
    folder: Path,
    sample: Sample,
    reference: dict[str, str],
    *,
    file_bytes: int | None = None,
    make_room: Callable[[], None] = lambda: None,
) -> str:
    """What became of a cache whose first writer ran out of room and whose second one did not."""
    child = os.fork()
    if child == 0:
        os._exit(_limited_writer(folder, sample, file_bytes))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 3):
        return {4: "an error without a remedy", 5: "another error"}.get(code, f"status {code}")
    make_room()
    write_cache(folder, sample)
    if _differences(tree(folder), reference):
        return "other bytes after completion"
    return "refused with a remedy, then completed" if code == 3 else "had room"


def _limited_writer(folder: Path, sample: Sample, file_bytes: int | None) -> int:
    try:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        write_cache(folder, sample)
    except CacheError as error:
        return 3 if "remedy: " in str(error) and str(folder) in str(error) else 4
    except BaseException as error:
        print(f"diskfull: {error!r}", file=sys.stderr)
        return 5
    return 0


def _mount(target: Path, options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "stress-cache", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )


def _mount_refusal(target: Path) -> str | None:
    """Why no tmpfs can be mounted here, or None."""
    target.mkdir()
    if shutil.which("mount") is None:
        return "no mount program"
    tried = _mount(target, "size=64k")
    if tried.returncode:
        return tried.stderr.strip() or f"mount: status {tried.returncode}"
    subprocess.run(["umount", str(target)], check=True)
    return None


def _on_small_tmpfs(target: Path, sample: Sample, reference: dict[str, str], capacity: int) -> str:
    if (tried := _mount(target, f"size={capacity}")).returncode:
        return f"no mount: {tried.stderr.strip()}"

    def make_room() -> None:
        _mount(target, "remount,size=64m")

    try:
        return _limited(target / "cache", sample, reference, make_room=make_room)
    finally:
        subprocess.run(["umount", str(target)], check=True)


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


def bits(sample: Sample, *, stride: int = 1) -> Result:
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


def truncate(sample: Sample, *, stride: int = 1) -> Result:
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


def misalign(sample: Sample) -> Result:
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


def fuzz(sample: Sample, *, files: int, seed: int) -> Result:
    """Read caches with mutated files, half of them with checksums made to fit again.

    Mutated shards are read by a reader that opened the sound cache, so their size is not compared with the manifest
    first. Peak allocation is tracemalloc's, which sees Python's and numpy's memory: more than `allocation_bound` means
    that a file was believed before it was checked.
    """
    draw = random.Random(seed)
    states: Counter[str] = Counter()
    broken: list[str] = []
    peak = 0
    signal.signal(signal.SIGALRM, _too_long)
    with workplace(in_memory=True) as root:
        folder = root / "cache"
        write_cache(folder, sample)
        truth = read_all(folder, sample)
        opened = CacheReader.open(folder)
        sample = replace(sample, plan=opened.plan)  # with the sha256 of the codec's tables
        sound = {path.name: path.read_bytes() for path in folder.iterdir()}
        bound = allocation_bound(sample.plan, sound)
        tracemalloc.start()
        for number in range(files):
            repaired = draw.random() < 0.5
            mutant = _mutant(sound, sample, draw, repaired=repaired)
            shards_only = all(name.endswith(".dpt") for name in mutant)
            _put(folder, mutant)
            state, used = _guarded_read(folder, sample, truth, opened if shards_only else None)
            _put(folder, {name: sound.get(name) for name in mutant})
            if repaired and state == "silent":
                state = "other data, as only verify can tell"
            states[f"{'checksums repaired' if repaired else 'plain'}: {state}"] += 1
            peak = max(peak, used)
            if state == "silent" or state.startswith("broke") or used > bound:
                broken.append(f"file {number} of seed {seed}, {sorted(mutant)}: {state}, {used} B")
        tracemalloc.stop()
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


def allocation_bound(plan: CachePlan, sound: dict[str, bytes]) -> int:
    """Bytes that reading may take at once.

    64 B an entry for one sequence of full rows, all results, four times the files, 32 times the codec's tables (their
    codes are looked up in arrays), and 64 KiB.
    """
    entries = plan.seq_len * min(plan.num_draws, plan.vocab_size)
    results = plan.num_sequences * entries * 16
    tables = sum(len(data) for name, data in sound.items() if name.startswith("codec-"))
    files = sum(map(len, sound.values()))
    return 64 * entries + results + 4 * files + 32 * tables + (64 << 10)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {READ_SECONDS} s")


def _guarded_read(
    folder: Path, sample: Sample, truth: bytes, opened: CacheReader | None
) -> tuple[str, int]:
    """(outcome, peak bytes) of reading a cache; anything but an answer or a CacheError is "broke ..."."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_REAL, READ_SECONDS)
    try:
        state = outcome(partial(read_all, seen=opened), folder, sample, truth)
    except Exception as error:
        state = f"broke with {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return state, tracemalloc.get_traced_memory()[1] - before


def _mutant(
    sound: dict[str, bytes], sample: Sample, draw: random.Random, *, repaired: bool
) -> Contents:
    """New contents of the files of a cache that changed; None for one that is gone."""
    target = draw.choices(["shard", "plan", "manifest", "extent", "tables"], [80, 6, 6, 2, 6])[0]
    shard = draw.randrange(sample.plan.num_shards)
    tables = [name for name in sound if name.startswith("codec-")]
    if target == "plan":
        return _mutant_plan(sound, sample.plan, draw, repaired=repaired)
    if target == "manifest":
        return {"manifest.json": _mutant_json(sound["manifest.json"], draw, keep_valid=repaired)}
    if target == "extent":
        return {
            "extent.json": _mutant_json(sound["extent.json"], draw, keep_valid=repaired),
            "manifest.json": None,
        }
    if target == "tables" and tables:
        return _mutant_tables(sound, sample.plan, tables[0], draw, repaired=repaired)
    name = shard_name(sample.plan, shard)
    data = _edited(bytearray(sound[name]), draw, *draw.choice(_regions(sound[name])))
    return {name: with_sound_checksums(data) if repaired else bytes(data)}


def _regions(data: bytes) -> list[tuple[int, int]]:
    """(start, length) of the places worth an attack: all, header, footer, index, frame heads, first frame."""
    index = (
        len(data) - FOOTER - struct.unpack_from("<Q", data, len(data) - FOOTER + 8)[0] * INDEX_ROW
    )
    second = struct.unpack_from("<Q", data, index + INDEX_ROW)[0]
    return [
        (0, len(data)),
        (0, HEADER),
        (len(data) - FOOTER, FOOTER),
        (index, len(data) - FOOTER - index),
        (HEADER, FRAME_HEAD),
        (second, FRAME_HEAD),
        (HEADER + FRAME_HEAD, second - HEADER - FRAME_HEAD),
    ]


def _edited(data: bytearray, draw: random.Random, start: int, length: int) -> bytearray:
    """A few bytes or whole words of a region set to values that hurt; now and then another length."""
    for _ in range(draw.randrange(1, 7)):
        at = start + draw.randrange(length)
        width = draw.choice([1, 1, 2, 4, 8])
        word = draw.choice(
            [0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), draw.getrandbits(8 * width)]
        )
        data[at : at + width] = word.to_bytes(width, "little")[: len(data) - at]
    if draw.random() < 0.05:
        at = draw.randrange(len(data))
        data[at:at] = draw.randbytes(8 * draw.randrange(1, 20))
    elif draw.random() < 0.05:
        at = draw.randrange(len(data))
        del data[at : at + 8 * draw.randrange(1, 20)]
    return data


def with_sound_checksums(data: bytearray) -> bytes:
    """The bytes of a shard with the checksums of header, frames, index and footer made to fit."""
    footer = len(data) - FOOTER
    if footer < HEADER:
        return bytes(data)
    index = struct.unpack_from("<Q", data, footer)[0]
    if index < footer:
        for row in range(index, footer - INDEX_ROW + 1, INDEX_ROW):
            offset, length = struct.unpack_from("<QI", data, row)
            if length >= FRAME_HEAD + 8 and offset + length <= len(data):
                crc = zlib.crc32(data[offset : offset + length - 8])
                struct.pack_into("<I", data, offset + length - 8, crc)
        struct.pack_into("<I", data, footer + 16, zlib.crc32(data[index:footer]))
    tail = data[footer : footer + 20] + data[footer + 24 :]
    struct.pack_into("<I", data, footer + 20, zlib.crc32(tail))
    struct.pack_into("<I", data, HEADER - 4, zlib.crc32(data[: HEADER - 4]))
    return bytes(data)


HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 7, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 200),
    *(0.5, 1e300, "", "x", "0" * 64, "\0", "../..", [], [0] * 9, {}, {"a": {"a": 1}}),
)


def _mutant_json(data: bytes, draw: random.Random, *, keep_valid: bool) -> bytes:
    """Canonical JSON with a value replaced, a key dropped or added; or bytes changed."""
    if not keep_valid:
        return bytes(_edited(bytearray(data), draw, 0, len(data)))
    value = json.loads(data)
    place: Any = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.1:
            break
        place = place[key]
    if draw.random() < 0.1:
        del place[key]
    elif draw.random() < 0.1 and isinstance(place, dict):
        place["unknown"] = draw.choice(HOSTILE_VALUES)
    else:
        place[key] = draw.choice(HOSTILE_VALUES)
    return canonical_json(value)


def _mutant_plan(
    sound: dict[str, bytes], plan: CachePlan, draw: random.Random, *, repaired: bool
) -> Contents:
    """Another plan; repaired: with the plan id put into everything that names it."""
    data = _mutant_json(sound["plan.json"], draw, keep_valid=repaired)
    mutant: Contents = {"plan.json": data}
    if repaired:
        mutant |= _renamed(sound, plan, data, plan.codec_sha256)
    return mutant


def _mutant_tables(
    sound: dict[str, bytes], plan: CachePlan, name: str, draw: random.Random, *, repaired: bool
) -> Contents:
    """Other codec tables; repaired: with sound checksums, and named by all that names tables and plan."""
    body = _edited(bytearray(sound[name][:-4]), draw, 0, len(sound[name]) - 4)
    data = bytes(body) + struct.pack("<I", zlib.crc32(body))
    if not repaired:
        return {name: data}
    digest = hashlib.sha256(data).hexdigest()
    plan_json = canonical_json({**json.loads(sound["plan.json"]), "codec_sha256": digest})
    return {
        tables_name(digest): data,
        "plan.json": plan_json,
        **_renamed(sound, plan, plan_json, digest),
    }


def _renamed(
    sound: dict[str, bytes], plan: CachePlan, plan_json: bytes, tables_sha256: str | None
) -> Contents:
    """Manifest and shards that claim to belong to other bytes of plan.json, and other codec tables."""
    manifest = json.loads(sound["manifest.json"])
    plan_id = manifest["plan_id"] = hashlib.sha256(plan_json).hexdigest()
    for record in manifest["shards"]:
        record |= {"plan_id": plan_id, "codec_sha256": tables_sha256}
    digests = [record["sha256"] for record in manifest["shards"]]
    manifest["root_sha256"] = hashlib.sha256("\n".join([plan_id, *digests]).encode()).hexdigest()
    mutant: Contents = {"manifest.json": canonical_json(manifest)}
    try:
        other = CachePlan.from_json_bytes(plan_json, num_sequences=plan.num_sequences)
    except CacheError:
        return mutant
    tables: Any = SimpleNamespace(tables_sha256=tables_sha256)
    for shard in range(min(plan.num_shards, other.num_shards)):
        stored = sound[shard_name(plan, shard)]
        header = ShardSpec(other, shard, tables).header
        mutant[shard_name(other, shard)] = header + stored[HEADER:]
    return mutant


def environment() -> dict[str, Any]:
    """Hardware, versions and date of a run."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "distill-pretrain": distill_pretrain.__version__,
    }


def summary(name: str, result: Result) -> str:
    """One line; details stay in the JSON."""
    shown = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in result.items()
        if key not in ("passed", "seconds", "by_file", "messages") and value not in ([], {})
    ]
    state = "passed" if result["passed"] else "FAILED"
    return f"{name}: {state} in {result['seconds']} s; " + ", ".join(shown)


def main() -> int:
    """Run the tests, print a line each, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--which", default="kill,race,bits,truncate,misalign,fuzz,diskfull")
    parser.add_argument("--codec", choices=("raw", "hc"), default="raw")
    parser.add_argument(
        "--sampler", choices=("systematic", "multinomial", "topk"), default="systematic"
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--race-rounds", type=int, default=30)
    parser.add_argument("--fuzz-files", type=int, default=100_000)
    parser.add_argument("--diskfull-sizes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    large = writers_sample(args.codec, args.sampler)
    small = readers_sample(args.codec, args.sampler)
    tests: dict[str, Callable[[], Result]] = {
        "kill": lambda: kill(large, kills=args.kills, seed=args.seed),
        "race": lambda: race(large, rounds=args.race_rounds),
        "bits": lambda: bits(small),
        "truncate": lambda: truncate(small),
        "misalign": lambda: misalign(small),
        "fuzz": lambda: fuzz(small, files=args.fuzz_files, seed=args.seed),
        "diskfull": lambda: diskfull(large, sizes=args.diskfull_sizes),
    }
    wanted = args.which.split(",")
    if unknown := set(wanted) - set(tests):
        parser.error(f"unknown tests {sorted(unknown)}; there are {', '.join(tests)}")
    results = {}
    for name in wanted:
        start = time.perf_counter()
        result = tests[name]()
        results[name] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        print(summary(name, results[name]), flush=True)
        for case, message in result.get("messages", {}).items():
            print(f"  {case}: {message}")
    report = {
        **environment(),
        "codec": args.codec,
        "sampler": args.sampler,
        "seed": args.seed,
        "plans": {"writers": asdict(large.plan), "readers": asdict(small.plan)},
        "tests": results,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
