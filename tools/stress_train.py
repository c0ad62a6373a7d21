"""Kills (-9) one rank of a training job again and again; the launcher restarts it; the curve must be the unbroken one.

    python tools/stress_train.py [--kills 20] [--seed 1] [--parallel tensor|data] [--output FILE.json]

Two ranks learn from a small cache of real text (the source of one standard-library package) under
launch/torchrun_single.sh. Half of the kills hit a random step, half a save. Prints a line per kill, and ends with
status 1 unless every record of metrics.jsonl, but for times, is that of the unbroken run to the last bit. Linux only.
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from reporting import command_line, environment, write_json

REPOSITORY = Path(__file__).parents[1]
SEQ_LEN = 64
STEPS_PER_KILL, INTERVAL = 30, 7
PATIENCE_S = 900
DETERMINED = ("step", "loss", "ce", "kl", "grad_norm", "lr", "tokens", "applied")
"""Fields of a record that do not depend on time."""
RESUMED = b"resumed at step "
LAYOUTS = {"tensor": ("parallel.tensor=2",), "data": ("parallel.distributed_optimizer=true",)}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One blow.

    Attributes:
        wanted_step: the first at which it was due.
        when: "step", or "save" for one that waited until a checkpoint was being written.
        rank: that was killed.
        at_step: steps in the log when it was.
        resumed_at: checkpoint that the job went on from; 0 for none.
        back_after_s: from the kill to the first new step.
    """

    wanted_step: int
    when: str
    rank: int
    at_step: int
    resumed_at: int
    back_after_s: float


class Job:
    """A corpus, a cache and a recipe in a folder, and the launcher."""

    def __init__(self, folder: Path, steps: int, layout: tuple[str, ...]) -> None:
        self.folder, self.steps, self.layout = folder, steps, layout
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self._sections()))
        self._tokenize_and_capture()

    def _sections(self) -> dict[str, Any]:
        folder = self.folder
        model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64}
        return {
            "data": {
                "tokens": str(folder / "tokens/train"),
                "held_out_tokens": str(folder / "tokens/held_out"),
                "seq_len": SEQ_LEN,
                "num_sequences": 200,
            },
            "teacher": {"path": str(folder / "teacher")},
            "capture": {"output_dir": str(folder / "cache"), "shard_sequences": 20},
            "model": {**model, "num_attention_heads": 4, "num_query_groups": 2, "dropout": 0.1},
            "optimizer": {"lr": 5e-3, "warmup_steps": 2},
            "train": {
                "output_dir": "unused",
                "steps": self.steps,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "checkpoint_interval": INTERVAL,
                "threads": 1,
            },
        }

    def _tokenize_and_capture(self) -> None:
        text = Path(ast.__file__).with_name("asyncio")
        self._verb(
            "tokenize",
            f"corpus.paths=[{text}]",
            "corpus.include=['*.py']",
            f"corpus.output_dir={self.folder / 'tokens'}",
            "tokenizer.vocab_size=512",
        )
        self._verb(
            "train",
            str(self.recipe),
            f"train.output_dir={self.folder / 'teacher'}",
            "train.steps=150",
            "train.global_batch_size=16",
            "train.checkpoint_interval=150",
            "model.dropout=0.0",
        )
        self._verb("capture", str(self.recipe))

    def _verb(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "distill_pretrain", *arguments],
            cwd=REPOSITORY,
            env=self._environment(0),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def _environment(self, restarts: int) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "VENV": "none",
            "NPROC": "2",
            "MAX_RESTARTS": str(restarts),
        }

    def start(self, run: Path, restarts: int) -> subprocess.Popen[bytes]:
        """The student's training under the launcher; what it prints goes to RUN.log."""
        arguments = [
            f"train.output_dir={run}",
            f"data.cache={self.folder / 'cache'}",
            "objective.ce_weight=0.2",
            "objective.kd_weight=0.8",
            *self.layout,
        ]
        script = REPOSITORY / "launch/torchrun_single.sh"
        return subprocess.Popen(
            [script, "train", str(self.recipe), *arguments],
            cwd=REPOSITORY,
            env=self._environment(restarts),
            stdout=log_of(run).open("wb"),
            stderr=subprocess.STDOUT,
        )


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def steps_done(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.tmp"))


def ranks_of(job: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The ranks of a job by number, those that run distill_pretrain."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            settings = process.environ()
            # A rank's own helpers have its environment too.
            if "RANK" in settings and "RANK" not in process.parent().environ():
                found[int(settings["RANK"])] = process
        except (psutil.Error, AttributeError):
            continue
    return found


def wait_until(done: Any, job: subprocess.Popen[bytes], run: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if job.poll() is not None or time.monotonic() > deadline:
            tail = log_of(run).read_text(errors="replace")[-4000:]
            raise SystemExit(f"the job ended or hangs (status {job.returncode}):\n{tail}")
        time.sleep(0.01)


def strike(job: subprocess.Popen[bytes], run: Path, wanted: int, dice: random.Random) -> Kill:
    """Kill a random rank at the wanted step or in the save that follows; wait until the job trains again."""
    when, rank = dice.choice(("step", "save")), dice.randrange(2)
    wait_until(lambda: steps_done(run) >= wanted, job, run)
    ranks = ranks_of(job)
    if when == "save":
        wait_until(lambda: is_saving(run), job, run)
    else:
        time.sleep(dice.uniform(0, 0.02))
    at = steps_done(run)
    ranks[rank].send_signal(signal.SIGKILL)
    started = time.monotonic()
    before = log_of(run).read_bytes().count(RESUMED)
    # The new ranks cut the log back to their checkpoint; they train once they add to it.
    psutil.wait_procs(ranks.values(), timeout=PATIENCE_S)
    wait_until(lambda: log_of(run).read_bytes().count(RESUMED) > before, job, run)
    resumed = int(log_of(run).read_bytes().rpartition(RESUMED)[2].split()[0])
    wait_until(lambda: steps_done(run) > resumed, job, run)
    return Kill(
        wanted_step=wanted,
        when=when,
        rank=rank,
        at_step=at,
        resumed_at=resumed,
        back_after_s=round(time.monotonic() - started, 1),
    )


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


def stress(kills: int, seed: int, layout: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Train once unbroken and once under fire."""
    dice = random.Random(seed)
    steps = STEPS_PER_KILL * (kills + 1)
    job = Job(folder, steps, layout)
    whole, broken = folder / "whole", folder / "broken"
    reference = job.start(whole, restarts=0)
    if reference.wait(10 * PATIENCE_S):
        raise SystemExit(log_of(whole).read_text(errors="replace")[-4000:])
    # The first after a checkpoint, so that every start resumes; none in the last steps.
    due = sorted(dice.sample(range(INTERVAL + 1, steps - 2 * STEPS_PER_KILL), kills))
    struck = []
    process = job.start(broken, restarts=kills)
    try:
        print(
            "| kill | when | rank | at step | resumed at | back after s |\n|--:|:--|--:|--:|--:|--:|"
        )
        for number, wanted in enumerate(due, 1):
            # A save may have carried the last blow beyond the next step that was due.
            kill = strike(process, broken, max(wanted, steps_done(broken)), dice)
            struck.append(kill)
            print(
                f"| {number} | {kill.when} | {kill.rank} | {kill.at_step} | {kill.resumed_at} "
                f"| {kill.back_after_s} |",
                flush=True,
            )
        status = process.wait(10 * PATIENCE_S)
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            for victim in [*children, psutil.Process(process.pid)]:
                victim.kill()
    found = differences(records(broken), records(whole))
    return {
        "passed": status == 0 and not found and len(struck) == kills,
        "exit_status": status,
        "steps": steps,
        "steps_repeated": sum(kill.at_step - kill.resumed_at for kill in struck),
        "differences": found[:20],
        "kills": [asdict(kill) for kill in struck],
    }


def main() -> int:
    """Run, print, write JSON."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", choices=sorted(LAYOUTS), default="tensor")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = stress(args.kills, args.seed, LAYOUTS[args.parallel], Path(folder))
    state = "passed" if result["passed"] else "FAILED"
    seconds = time.perf_counter() - started
    print(
        f"{state}: {len(result['kills'])} kills over {result['steps']} steps, {result['steps_repeated']} repeated, "
        f"{len(result['differences'])} differences, {seconds:.0f} s"
    )
    for line in result["differences"]:
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
