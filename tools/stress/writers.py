"""Writers that are killed, that race, and that run out of room; the bytes must be those of one unbroken writer."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.errors import CacheError
from stress.caches import differences, reference_tree, tree, workplace, write_cache
from stress.samples import Sample

FORK = multiprocessing.get_context("fork")


def kill(sample: Sample, *, kills: int, seed: int) -> dict[str, Any]:
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
            wrong += differences(tree(folder), reference)
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
    workers = [_start(folder, sample, 0.001, draw.randrange(1 << 30)) for _ in range(writers)]
    time.sleep(draw.random() * horizon / writers)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _start(folder: Path, sample: Sample, pause: float, seed: int | None) -> ForkProcess:
    worker = FORK.Process(
        target=write_cache, args=(folder, sample), kwargs={"pause": pause, "seed": seed}
    )
    worker.start()
    return worker


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


def race(sample: Sample, *, rounds: int) -> dict[str, Any]:
    """Three writers to the end: in even rounds all want the same shard all the time, in odd ones any."""
    wrong: list[str] = []
    errors = 0
    with workplace(in_memory=False) as root:
        reference = reference_tree(root, sample)
        for number in range(rounds):
            folder = root / f"{number}"
            seeds = range(3) if number % 2 else [None] * 3
            workers = [_start(folder, sample, 0.0003, seed) for seed in seeds]
            for worker in workers:
                worker.join()
            errors += sum(worker.exitcode != 0 for worker in workers)
            wrong += differences(tree(folder), reference)
            wrong += [path.name for path in folder.glob("*.part")]
            shutil.rmtree(folder)
    return {
        "passed": not wrong and not errors,
        "rounds": rounds,
        "writers": 3,
        "worker_errors": errors,
        "differences": wrong,
    }


def diskfull(sample: Sample, *, sizes: int) -> dict[str, Any]:
    """Let writes fail at many sizes, by RLIMIT_FSIZE and on a small tmpfs, then complete the cache.

    Each size has a folder of its own; one more folder meets all limits of RLIMIT_FSIZE in turn.
    """
    with workplace(in_memory=False) as root:
        reference = reference_tree(root, sample)
        files = [path.stat().st_size for path in (root / "reference").iterdir()]
        limits = np.linspace(1, max(files) * 1.1, sizes).astype(int).tolist()
        outcomes = [
            _limited(root / f"limit-{limit}", sample, reference, [limit]) for limit in limits
        ]
        outcomes.append(_limited(root / "growing", sample, reference, limits))
        result: dict[str, Any] = {"rlimit_fsize": dict(sorted(Counter(outcomes).items()))}
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
    file_bytes: Sequence[int | None],
    make_room: Callable[[], None] = lambda: None,
) -> str:
    """What became of a cache whose writers, one per limit, ran out of room and whose last one did not."""
    codes = set()
    for limit in file_bytes:
        child = os.fork()
        if child == 0:
            os._exit(_limited_writer(folder, sample, limit))
        codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if wrong := codes - {0, 3}:
        code = min(wrong)
        return {4: "an error without a remedy", 5: "another error"}.get(code, f"status {code}")
    make_room()
    write_cache(folder, sample)
    if differences(tree(folder), reference):
        return "other bytes after completion"
    return "refused with a remedy, then completed" if 3 in codes else "had room"


def _limited_writer(folder: Path, sample: Sample, file_bytes: int | None) -> int:
    try:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        write_cache(folder, sample)
    except CacheError as error:
        text = str(error)
        told = str(folder) in text and "remedy: " in text and "finished blocks are kept" in text
        return 3 if told else 4
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
        return _limited(target / "cache", sample, reference, [None], make_room)
    finally:
        subprocess.run(["umount", str(target)], check=True)
