"""Measures how long the command line takes to start: every --help, `inspect`, and a training job up to its first step.

    python tools/bench_startup.py [--rounds 5] [--before CHECKOUT] [--output FILE.json]

Each command is a process of its own; CPU seconds (user and system) and seconds on the clock, the least of the rounds.
The training is of a tiny student, so that what is measured is the start. Python's compiled files must be there: the
first round makes them. With --before another checkout of this repository is measured in turns with this one. Prints
Markdown.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from reporting import command_line, environment, write_json

from distill_pretrain import SequencePlan, TokenIndex, write_cache
from distill_pretrain.cli.main import VERBS
from distill_pretrain.corpus.token_writer import TokenIndexWriter

HERE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a process took, in seconds."""

    cpu: float
    wall: float


def run(tree: Path, *arguments: str) -> Took:
    """One command of a checkout's package, which must succeed."""
    settings = {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = [sys.executable, "-m", "distill_pretrain", *arguments]
    subprocess.run(
        command, check=True, capture_output=True, cwd=tree, env={**os.environ, **settings}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(cpu=cpu, wall=time.time() - started)


def first_step(tree: Path, recipe: Path, folder: Path) -> Took:
    """A job of one step: until the step is done, and the CPU time of the whole job."""
    started = time.time()
    took = run(tree, "train", str(recipe), f"train.output_dir={folder}")
    (record,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return Took(cpu=took.cpu, wall=record["time"] - started)


def write_inputs(folder: Path) -> Path:
    """A corpus of 64 documents, and the recipe of a tiny student; the recipe's path."""
    draw = np.random.default_rng(0)
    with TokenIndexWriter(folder / "tokens", 256) as writer:
        for _ in range(64):
            writer.add_document(draw.integers(256, size=200))
    recipe: dict[str, Any] = {
        "data": {"tokens": str(folder / "tokens"), "vocab_size": 256, "seq_len": 32},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "num_query_groups": 2,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 2},
    }
    path = folder / "student.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_targets(folder: Path, recipe: Path) -> Path:
    """A cache of the corpus, with the resolved recipe beside it that a capture leaves there; its path."""
    plan = SequencePlan(TokenIndex.open(folder / "tokens"), seq_len=32, seed=1)
    table = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    write_cache(
        folder / "cache",
        plan,
        lambda tokens: table[tokens.numpy()],
        vocab_size=256,
        teacher={"name": "a random table"},
        num_sequences=64,
        sanity_gate="off",
    )
    shutil.copy(recipe, folder / "cache/recipe.yaml")
    return folder / "cache"


def best(found: list[Took]) -> Took:
    return Took(cpu=min(took.cpu for took in found), wall=min(took.wall for took in found))


def measure(rounds: int, folder: Path, trees: list[Path]) -> dict[str, list[Took]]:
    """By command, the least that it took in each checkout."""
    recipe = write_inputs(folder)
    first = {tree: [] for tree in trees}
    for number in range(rounds):
        for place, tree in enumerate(trees):
            run_folder = folder / f"run-{place}-{number}"
            first[tree].append(first_step(tree, recipe, run_folder))
    found = {"train, to the first step": [best(first[tree]) for tree in trees]}
    commands = {f"{verb} --help": [verb, "--help"] for verb in VERBS}
    checkpoint = next((folder / "run-0-0/checkpoints").glob("step-*"))
    for name, path in (
        ("cache", write_targets(folder, folder / "run-0-0/recipe.yaml")),
        ("corpus", folder / "tokens"),
        ("run", folder / "run-0-0"),
        ("checkpoint", checkpoint),
    ):
        commands[f"inspect, a {name}"] = ["inspect", str(path)]
    for name, arguments in commands.items():
        took: dict[Path, list[Took]] = {tree: [] for tree in trees}
        for _ in range(rounds):
            for tree in trees:
                took[tree].append(run(tree, *arguments))
        found[name] = [best(took[tree]) for tree in trees]
    return found


def main() -> None:
    """Measure, print, write."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    arguments = parser.parse_args()
    trees = [*([arguments.before.resolve()] if arguments.before else []), HERE]
    names = ["before", "after"] if arguments.before else ["now"]
    with TemporaryDirectory() as folder:
        found = measure(arguments.rounds, Path(folder), trees)
    print("| command |" + "".join(f" {name}, CPU s | s |" for name in names))
    print("|:--|" + "--:|--:|" * len(names))
    for command, took in found.items():
        print(f"| {command} |" + "".join(f" {one.cpu:.2f} | {one.wall:.2f} |" for one in took))
    seconds = {
        command: {name: vars(one) for name, one in zip(names, took, strict=True)}
        for command, took in found.items()
    }
    load = {"load_average_1_min": os.getloadavg()[0], "rounds": arguments.rounds}
    found_here = {**environment("torch", "megatron-core"), **load, "seconds": seconds}
    write_json(arguments.output, found_here)


if __name__ == "__main__":
    main()
