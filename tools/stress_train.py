"""Blows at a training job, again and again; in the end its curve must be the unbroken one and nobody may be left.

    python tools/stress_train.py [--blows 20 | --minutes 60] [--modes kill,stop,stall,disk,fsync,double] [--seed 1]
                                 [--parallel tensor|data] [--output FILE.json]

Two ranks learn from a small cache of real text (the source of one standard-library package) under
launch/torchrun_single.sh, every other start with train.async_save. Modes:

    kill    kill -9 one rank, half of them at a random step, half in a save; the launcher starts both again
    stop    SIGTERM to all process groups of the job: it must save its last step, end, and leave no unfinished save
    stall   SIGSTOP one rank: for seconds, or longer than train.stuck_after_s but less than the second look (both
            without a restart), or for good (the others must name it, and the launcher start the job again)
    disk    fill the run folder's file system (a small tmpfs: root only); the job must name it, and go on once there is
            room again
    fsync   every fsync takes seconds (LD_PRELOAD, needs gcc), so that a save takes longer than train.stuck_after_s
    double  start the same job in the same folder: the second must be refused by name, the first not notice

A line per blow; status 1 unless every record of metrics.jsonl, but for times, is that of the unbroken run to the last
bit, no step is missing, no blow had another outcome than its mode says, no rank ever had a helper process, and no
process is left. An hour of all modes, as for docs/results/resilience (15 minutes more for the unbroken run):

    python tools/stress_train.py --minutes 60 --seed 5 --output stress_train_hour.json

Linux only; as root, or without `disk`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from reporting import command_line, environment, write_json
from stress.training import (
    INTERVAL,
    LAYOUTS,
    PATIENCE_S,
    STUCK_AFTER_S,
    Failed,
    Recipe,
    Training,
    fill,
    small_disk,
)

MOST_STEPS_BETWEEN = 30
DETERMINED = ("step", "loss", "ce", "kl", "grad_norm", "lr", "tokens", "applied")
"""Fields of a record that do not depend on time."""


@dataclass(frozen=True, kw_only=True)
class Blow:
    """One blow.

    Attributes:
        mode: see above.
        what: which kind of it.
        at_step: steps in the log when it fell.
        resumed_at: checkpoint that the job went on from; None where it just went on.
        back_after_s: from the blow to the first new step.
        frames: lines of our own code in tracebacks since.
        orphans: processes that were left.
        failures: what was not as promised.
    """

    mode: str
    what: str
    at_step: int
    resumed_at: int | None
    back_after_s: float
    frames: int
    orphans: int
    failures: list[str]


Strike = Callable[[Training, random.Random], tuple[str, bool, list[str]]]
"""Strikes; what it was, whether the job starts again, what was not as promised."""


def kill(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    when, rank = dice.choice(("step", "save")), dice.randrange(2)
    ranks = job.ranks()
    if when == "save":
        job.wait_until(job.is_saving)
    else:
        time.sleep(dice.uniform(0, 0.02))
    ranks[rank].send_signal(signal.SIGKILL)
    psutil.wait_procs(ranks.values(), timeout=PATIENCE_S)
    return f"rank {rank} in a {when}", True, []


def stop(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    if dice.random() < 0.5:
        job.wait_until(job.is_saving)
    before = job.frames()
    job.stop_all()
    saved = sorted(p.name for p in (job.run / "checkpoints").iterdir())
    failures = [f"{name} is left" for name in saved if not name[5:].isdigit()]
    last = json.loads((job.run / "events.jsonl").read_text().splitlines()[-1])
    if last["event"] != "stopped" or last["step"] != int(saved[-1][5:]):
        failures.append(f"the last event is {last}, the last checkpoint {saved[-1]}")
    if job.frames() != before:
        failures.append("a traceback of ours")
    return "both ranks and the launcher", True, failures


def stall(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    kind, rank = dice.choice(("seconds", "past the limit", "for good")), dice.randrange(2)
    before, ranks = job.resumes(), job.ranks()
    victim = ranks[rank]
    victim.send_signal(signal.SIGSTOP)
    failures = []
    if kind == "for good":
        job.wait_until(lambda: job.resumes() > before)
        said = job.log.read_text(errors="replace")
        if f"rank {rank} is silent: dead, stopped, or cut off (pid {victim.pid}" not in said:
            failures.append("nobody named the stopped rank")
        return f"rank {rank} for good", True, failures
    seconds = dice.uniform(2, 10) if kind == "seconds" else STUCK_AFTER_S + dice.uniform(2, 6)
    time.sleep(seconds)
    victim.send_signal(signal.SIGCONT)
    steps = job.steps()
    job.wait_until(lambda: job.steps() > steps + INTERVAL)
    if job.resumes() != before:
        failures.append("a rank that recovered was ended")
    return f"rank {rank} for {seconds:.0f} s", False, failures


def disk(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    before = len(job.log.read_bytes())

    def named() -> bool:
        said = job.log.read_bytes()[before:]
        return b"distill-pretrain train: error" in said and b"bytes free" in said

    filler = fill(job.run.parent)
    try:
        job.wait_until(named, alive=False)
        time.sleep(dice.uniform(0, 5))
    finally:
        filler.unlink()
    return "full", True, []


def fsync(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    seconds = dice.choice((0.5, 3.0, 6.0))
    before = job.resumes()
    saved = {p.name for p in (job.run / "checkpoints").glob("step-????????")}
    job.recipe.slow_fsync.write_text(str(seconds))
    try:
        # One that was begun after fsync had become slow.
        job.wait_until(
            lambda: (
                len({p.name for p in (job.run / "checkpoints").glob("step-????????")} - saved) >= 2
            )
        )
    finally:
        job.recipe.slow_fsync.unlink()
    failures = [] if job.resumes() == before else ["a job that was saving was ended"]
    return f"{seconds} s each", False, failures


def double(job: Training, dice: random.Random) -> tuple[str, bool, list[str]]:
    log = job.log.with_suffix(".second.log")
    log.unlink(missing_ok=True)
    before = job.resumes()
    other = Training(job.recipe, job.run, log, *job.settings, restarts=0)
    status = other.another(log).wait(PATIENCE_S)
    said = log.read_text(errors="replace")
    failures = []
    if status == 0 or "another process is writing here" not in said or "since" not in said:
        failures.append(f"the second job ended with {status}: {said[-500:]}")
    if job.resumes() != before:
        failures.append("the first job was disturbed")
    return "same recipe", False, failures


MODES: dict[str, Strike] = {
    "kill": kill,
    "stop": stop,
    "stall": stall,
    "disk": disk,
    "fsync": fsync,
    "double": double,
}


def strike(mode: str, job: Training, dice: random.Random) -> Blow:
    """One blow, a random number of steps from now; waits until the job trains again."""
    wanted = job.steps() + dice.randrange(1, MOST_STEPS_BETWEEN)
    job.wait_until(lambda: job.steps() >= wanted)
    helpers = job.helpers()
    at, resumes, frames = job.steps(), job.resumes(), job.frames()
    started = time.monotonic()
    what, starts_again, failures = MODES[mode](job, dice)
    resumed = None
    if starts_again:
        resumed = wait_for_restart(job, resumes, dice)
    back = time.monotonic() - started
    orphans = job.orphans()
    if helpers:
        failures.append(f"{helpers} helper processes")
    if orphans:
        failures.append(f"left: {orphans}")
    return Blow(
        mode=mode,
        what=what,
        at_step=at,
        resumed_at=resumed,
        back_after_s=round(back, 1),
        frames=job.frames() - frames,
        orphans=len(orphans),
        failures=failures,
    )


def wait_for_restart(job: Training, resumes: int, dice: random.Random) -> int:
    """Until the job trains again, started anew where its launcher has gone; the step it went on from."""
    deadline = time.monotonic() + PATIENCE_S
    while job.resumes() == resumes:
        if not job.is_running():
            left = job.orphans()
            if left:
                raise Failed(f"the launcher has ended, but not {left}")
            start(job, dice)
        if time.monotonic() > deadline:
            raise Failed(f"the job does not come back:\n{job.log.read_text()[-4000:]}")
        time.sleep(0.02)
    resumed = job.resumed_at()
    # The new ranks cut the log back to their checkpoint; they train once they add to it.
    job.wait_until(lambda: job.steps() > job.resumed_at(), alive=False)
    return resumed


def start(job: Training, dice: random.Random) -> None:
    job.start(f"train.async_save={str(dice.random() < 0.5).lower()}")


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in DETERMINED} for line in lines]


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """What differs, in words; Python's JSON gives every float back bit for bit."""
    if len(found) != len(expected):
        return [f"{len(found)} steps in the log, expected {len(expected)}"]
    return [
        f"step {theirs['step']}: {name} is {ours[name]!r}, expected {theirs[name]!r}"
        for ours, theirs in zip(found, expected, strict=True)
        for name in DETERMINED
        if ours[name] != theirs[name]
    ]


def under_fire(
    job: Training, modes: list[str], dice: random.Random, is_over: Callable[[int], bool]
) -> list[Blow]:
    """Strike until it is over; every mode comes up once in each round."""
    blows: list[Blow] = []
    start(job, dice)
    # The first checkpoint: every start resumes.
    job.wait_until(lambda: job.steps() > INTERVAL)
    print(
        "| blow | mode | what | at step | resumed at | back after s | |\n|--:|:--|:--|--:|--:|--:|:--|"
    )
    bag: list[str] = []
    while not is_over(len(blows)):
        bag = bag or dice.sample(modes, len(modes))
        blow = strike(bag.pop(), job, dice)
        blows.append(blow)
        print(
            f"| {len(blows)} | {blow.mode} | {blow.what} | {blow.at_step} | {blow.resumed_at or ''} "
            f"| {blow.back_after_s} | {'; '.join(blow.failures)} |",
            flush=True,
        )
    job.stop_all()
    return blows


def stress(
    modes: list[str],
    seed: int,
    layout: tuple[str, ...],
    folder: Path,
    is_over: Callable[[int], bool],
) -> dict[str, Any]:
    """Train under fire, and then once unbroken as far as that came."""
    recipe = Recipe(folder, layout)
    with ExitStack() as stack:
        place = stack.enter_context(small_disk(folder / "disk")) if "disk" in modes else folder
        job = Training(recipe, place / "broken", folder / "broken.log")
        blows, failure = [], None
        try:
            blows = under_fire(job, modes, random.Random(seed), is_over)
        except Failed as error:
            failure = str(error)
        finally:
            left = job.orphans() if not job.is_running() else []
            job.kill_all()
        found = records(job.run)
    whole = Training(recipe, folder / "whole", folder / "whole.log", restarts=0)
    whole.start(f"train.steps={len(found)}", "train.checkpoint_interval=1000000")
    assert whole.process is not None
    try:
        if whole.process.wait():
            raise SystemExit(whole.log.read_text(errors="replace")[-4000:])
    finally:
        whole.kill_all()
    different = differences(found, records(whole.run))
    failed = [f"blow {n}: {text}" for n, b in enumerate(blows, 1) for text in b.failures]
    failed += [failure] if failure else []
    failed += [f"left in the end: {left}"] if left else []
    return {
        "passed": not failed and not different,
        "steps": len(found),
        "steps_repeated": sum(max(0, b.at_step - (b.resumed_at or b.at_step)) for b in blows),
        "by_mode": dict(Counter(b.mode for b in blows)),
        "orphans": sum(b.orphans for b in blows) + len(left),
        "failures": failed,
        "differences": different[:20],
        "blows": [asdict(blow) for blow in blows],
    }


def main() -> int:
    """Run, print, write JSON."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--blows", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="instead of a number of blows")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", choices=sorted(LAYOUTS), default="tensor")
    args = parser.parse_args()
    modes = args.modes.split(",")
    unknown = sorted(set(modes) - set(MODES))
    if unknown or ("disk" in modes and os.geteuid()):
        parser.error(f"unknown modes: {unknown}" if unknown else "the mode disk needs root")
    started = time.perf_counter()

    def is_over(blows: int) -> bool:
        if args.minutes is None:
            return blows >= args.blows
        return time.perf_counter() - started > 60 * args.minutes

    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        result = stress(modes, args.seed, LAYOUTS[args.parallel], Path(folder), is_over)
    state = "passed" if result["passed"] else "FAILED"
    seconds = time.perf_counter() - started
    print(
        f"{state}: {len(result['blows'])} blows over {result['steps']} steps, {result['steps_repeated']} repeated, "
        f"{len(result['differences'])} differences, {result['orphans']} orphans, {seconds:.0f} s"
    )
    for line in [*result["failures"], *result["differences"]]:
        print(f"  {line}")
    write_json(
        args.output,
        {
            **environment("torch", "megatron-core"),
            "parallel": args.parallel,
            "seed": args.seed,
            "seconds": round(seconds, 1),
            **result,
        },
    )
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
