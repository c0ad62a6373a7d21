"""Trains thin students of growing depth from several initialisations, and reports their held-out losses.

    python tools/study_depth.py launch/recipes/depth/cell.yaml [section.key=value ...] [--folder runs/depth]

The corpus, and the cache of the distilled students, are the recipe's; launch/quickstart.sh makes both. Students are
trained by the trainer's own step, the most telling first and `--processes` at a time; each leaves one line in
FOLDER/cells.jsonl, so that the study can be stopped, started again, and ended in good order by `--hours`. In the end
report.md, study.json and a figure are written to `--report`; with `--hours 0`, of what is there.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from depth_report import write_report
from reporting import command_line, run

from distill_pretrain.config import load_recipe
from distill_pretrain.contracts import TokenBatch
from distill_pretrain.data.batches import StudentBatches
from distill_pretrain.data.sources import open_sequences, open_sources
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.mcore.runtime.parallel import model_parallel
from distill_pretrain.mcore.student.base import (
    StepResult,
    Student,
    forward_micro_batch,
    valid_tokens,
)
from distill_pretrain.mcore.student.build import student_class
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import local_device, process_group, set_cpu_threads
from distill_pretrain.train.job import make_objective

LAST_STEPS = 20
HELD_OUT_BATCH = 16
STEPS = {6: 100, 12: 100, 48: 100, 96: 100, 192: 60}
"""By depth; the deepest would take most of the time."""


@dataclass(frozen=True)
class Cell:
    """One student: what it is, and how it is trained."""

    depth: int
    init: str
    lr: float
    seed: int = 1
    objective: str = "ce"
    hidden: int = 64
    ffn: int = 176
    steps: int = 100

    def recipe(self, path: Path, overrides: list[str]) -> Recipe:
        """That of the study, with the cell's own values."""
        own = [
            f"model.num_layers={self.depth}",
            f"model.init={self.init}",
            f"model.norm_placement={'post' if self.init == 'deepnorm' else 'pre'}",
            f"model.hidden_size={self.hidden}",
            f"model.ffn_hidden_size={self.ffn}",
            f"optimizer.lr={self.lr!r}",
            f"objective.ce_weight={float(self.objective == 'ce')}",
            f"objective.kd_weight={float(self.objective == 'kd')}",
            f"train.steps={self.steps}",
            f"train.seed={self.seed}",
        ]
        return load_recipe(Recipe, path, [*overrides, *own])


def planned_cells() -> list[Cell]:
    """Every cell of the study, the most telling first."""
    main, rates = ("megatron", "fan_in", "deepscale"), (3e-3, 1e-2)

    def cells(depths: Any, inits: Any, rates: Any, seeds: Any = (1,), **others: Any) -> list[Cell]:
        return [
            Cell(depth, init, lr, seed, steps=STEPS[depth], **others)
            for depth, seed, lr, init in itertools.product(depths, seeds, rates, inits)
        ]

    ordered = [
        *cells((96, 192), main, rates),
        *cells((12,), main, (*rates, 1e-3)),
        # The default may want lower rates than the others.
        *cells((12, 96), ("megatron",), (1e-3, 3e-4)),
        *cells((96,), main, rates, (2, 3)),
        *cells((192,), main, rates, (2,)),
        *cells((48,), main, rates),
        *cells((192,), main, rates, (3,)),
        *cells((48, 96), main, (1e-3,)),
        *cells((48,), ("fan_in", "deepscale"), (3e-3,), (1, 2), objective="kd"),
        # As many parameters in the layers as 96 of width 64 have.
        *cells((6,), main, (3e-3,), hidden=256, ffn=704),
        *cells((12, 48, 96), ("xavier", "completep"), rates),
        *cells((192,), ("completep",), rates),
        *cells((96, 192), ("completep",), (1e-2,), (2, 3)),
        # Both were best at the highest rate of the others.
        *cells((12, 48, 96, 192), ("deepscale", "completep"), (3e-2,)),
        *cells((192,), main, (1e-3,)),
        *cells((12, 48, 96), ("xavier", "completep"), (1e-3,)),
        *cells((192,), ("xavier",), rates),
    ]
    return list(dict.fromkeys(ordered))


@dataclass(frozen=True)
class HeldOut:
    """The batches every student is scored on."""

    batches: list[TokenBatch]

    @classmethod
    def read(cls, recipe: Recipe, num_sequences: int) -> HeldOut:
        """The first sequences of `data.held_out_tokens`."""
        assert recipe.data and recipe.data.held_out_tokens
        plan = open_sequences(recipe.data, recipe.data.held_out_tokens).plan
        numbers = np.arange(min(num_sequences, plan.num_sequences))
        batches = []
        for some in np.array_split(numbers, max(1, len(numbers) // HELD_OUT_BATCH)):
            tokens, labels = map(torch.from_numpy, plan.read(some))
            batch = TokenBatch(tokens=tokens.long(), labels=labels.long(), targets=None)
            batches.append(batch)
        return cls(batches)


class Study:
    """Trains cells one after another.

    Args:
        path: recipe of a cell.
        overrides: of the recipe.
        num_held_out: sequences that students are scored on.
    """

    def __init__(self, path: Path, overrides: list[str], num_held_out: int) -> None:
        self.path, self.overrides = path, overrides
        self.held_out = HeldOut.read(load_recipe(Recipe, path, overrides), num_held_out)

    def train(self, cell: Cell, groups: ParallelGroups) -> dict[str, Any]:
        """What became of a student: its last and its held-out losses, in nats per token; None where not finite."""
        recipe = cell.recipe(self.path, self.overrides)
        assert recipe.data and recipe.model and recipe.train
        started = time.monotonic()
        with open_sources(recipe.data, kd_weight=recipe.objective.peak_kd_weight) as sources:
            batches = StudentBatches(
                [source.for_batches for source in sources],
                seed=recipe.train.seed,
                global_batch_size=recipe.train.global_batch_size,
                micro_batch_size=recipe.train.micro_batch_size,
                data_rank=0,
                data_size=1,
                device=local_device(),
            )
            loss = make_objective(
                recipe.objective,
                teacher=None,
                vocab_size=sources[0].sequences.vocab_size,
                tensor_group=groups.tensor,
            )
            student = student_class(recipe.optimizer)(
                model=recipe.model,
                parallel=recipe.parallel,
                optimizer=recipe.optimizer,
                groups=groups,
                vocab_size=sources[0].sequences.vocab_size,
                seq_len=recipe.data.seq_len,
                precision=recipe.train.precision,
                seed=recipe.train.seed,
                steps=cell.steps,
                micro_batch_size=recipe.train.micro_batch_size,
                num_micro_batches=batches.num_micro_batches,
                loss_function=loss,
                num_terms=len(loss.term_names),
            )
            ce = loss.term_names.index("ce")
            curve, norms = [], []
            for step in range(cell.steps):
                loss.begin_step(step + 1)
                result = student.step(
                    [iter(batches.step_batches(step, with_targets=True))], _is_sound
                )
                curve.append(result.terms[ce].item())
                norms.append(result.grad_norm)
                if not _is_sound(result):
                    break
        return {
            **asdict(cell),
            "parameters": sum(p.numel() for p in student.chunks[0].parameters()),
            "steps_done": len(curve),
            "train_ce": _finite(float(np.mean(curve[-LAST_STEPS:]))),
            "held_out_ce": _finite(self.score(student, ce)),
            "curve": [_finite(round(value, 4)) for value in curve],
            "largest_norm": _finite(max(norms)),
            "seconds": round(time.monotonic() - started, 1),
        }

    @torch.no_grad()
    def score(self, student: Student, ce: int) -> float:
        """Mean cross-entropy over the held-out positions."""
        sums = torch.zeros((), dtype=torch.float64)
        for batch in self.held_out.batches:
            sums += forward_micro_batch(student.chunks[0], batch)[ce].double()
        return sums.item() / sum(int(valid_tokens(batch)) for batch in self.held_out.batches)


def _is_sound(result: StepResult) -> bool:
    return math.isfinite(result.terms[0].item()) and math.isfinite(result.grad_norm)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_cells(path: Path) -> dict[Cell, dict[str, Any]]:
    """What is finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {Cell(**{f.name: record[f.name] for f in fields(Cell)}): record for record in records}


def train_cell(args: argparse.Namespace, deadline: float, cell: Cell) -> dict[str, Any] | None:
    """What became of one student; None where time was up before it began. Called in a process of the pool."""
    if time.time() > deadline:
        return None
    set_cpu_threads(args.threads)
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        record = Study(args.recipe, args.overrides, args.held_out).train(cell, groups)
    # A model is full of reference cycles.
    gc.collect()
    return record


def run_study(args: argparse.Namespace) -> None:
    """Train what is planned and not there yet, until time is up."""
    deadline = time.time() + 3600 * args.hours
    log = args.folder / "cells.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    done = read_cells(log)
    missing = [cell for cell in planned_cells() if cell not in done]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, log.open("a") as lines:
        for record in pool.imap_unordered(partial(train_cell, args, deadline), missing):
            if record is None:
                continue
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            print({key: value for key, value in record.items() if key != "curve"}, flush=True)


def main() -> None:
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/depth"))
    parser.add_argument("--hours", type=float, default=2.9, help="start no cell after this")
    parser.add_argument("--held-out", type=int, default=64, help="sequences to score students on")
    parser.add_argument(
        "--processes", type=int, default=2, help="students trained at the same time"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--report", type=Path, help="folder (default: FOLDER/report)")
    args = parser.parse_intermixed_args()
    if args.hours > 0:
        run_study(args)
    done = read_cells(args.folder / "cells.jsonl")
    write_report(list(done.values()), len(planned_cells()), args.report or args.folder / "report")


if __name__ == "__main__":
    run(main)
