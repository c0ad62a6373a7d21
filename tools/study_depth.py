"""Trains thin models of growing depth from several initialisations and learning rates, and tabulates their losses.

    python tools/study_depth.py launch/recipes/depth/cell.yaml [section.key=value ...] [--output FILE.json]

A cell is depth x init x learning rate; shallow cells come first. Each is a `distill-pretrain train` of its own that
goes on from its last checkpoint, so the study can be stopped and started again; `--hours` ends it in good order. The
corpus is the recipe's (launch/quickstart.sh makes it, or `distill-pretrain tokenize`). Prints Markdown: the mean
cross-entropy of the last 20 steps, best over learning rates first.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import command_line, environment, write_json

LAST_STEPS = 20


@dataclass(frozen=True, order=True)
class Cell:
    """One training run."""

    depth: int
    init: str
    lr: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.depth}-{self.init}-{self.lr:g}"

    def overrides(self, folder: Path, steps: int) -> list[str]:
        """What the recipe leaves open."""
        post = ["model.norm_placement=post"] if self.init == "deepnorm" else []
        return [
            f"model.num_layers={self.depth}",
            f"model.init={self.init}",
            f"optimizer.lr={self.lr!r}",
            f"train.steps={steps}",
            f"train.output_dir={folder / 'cells' / self.name}",
            *post,
        ]


def last_losses(folder: Path, steps: int) -> float | None:
    """Mean cross-entropy of the last steps; None until all are done, NaN for a run that failed."""
    log = folder / "metrics.jsonl"
    if (folder / "failed.txt").exists():
        return math.nan
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records or records[-1]["step"] < steps:
        return None
    values = [record["ce"] for record in records[-LAST_STEPS:]]
    return sum(math.nan if v is None else v for v in values) / len(values)


def train(cell: Cell, args: Any, deadline: float) -> float | None:
    """Run a cell to its end, unless it is there already or time is up."""
    steps = args.steps_deep if cell.depth >= args.deep else args.steps
    folder = args.folder / "cells" / cell.name
    found = last_losses(folder, steps)
    if found is not None or time.monotonic() > deadline:
        return found
    command = [sys.executable, "-m", "distill_pretrain", "train", str(args.recipe)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *args.overrides, *cell.overrides(args.folder, steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # A diverged run is a result; the reason is kept, and deleting the file tries again.
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.txt").write_text(done.stderr[-4000:])
    found = last_losses(folder, steps)
    print(f"{cell.name}: {found} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return found


def table(losses: dict[Cell, float | None]) -> str:
    """Markdown: a row per depth, a column per initialisation: best loss (its rate), then every rate's."""
    inits = list(dict.fromkeys(cell.init for cell in losses))
    lines = [f"| layers | {' | '.join(inits)} |", "|---" * (len(inits) + 1) + "|"]
    for depth in sorted({cell.depth for cell in losses}):
        row = []
        for init in inits:
            cells = {c.lr: v for c, v in losses.items() if (c.depth, c.init) == (depth, init)}
            sound = {lr: v for lr, v in cells.items() if v is not None and not math.isnan(v)}
            every = ", ".join(f"{lr:g}: {_shown(v)}" for lr, v in sorted(cells.items()))
            best = min(sound, key=lambda lr: sound[lr]) if sound else None
            row.append(every if best is None else f"**{sound[best]:.3f}** at {best:g} ({every})")
        lines.append(f"| {depth} | {' | '.join(row)} |")
    return "\n".join(lines)


def _shown(loss: float | None) -> str:
    if loss is None:
        return "not run"
    return "failed" if math.isnan(loss) else f"{loss:.3f}"


def main() -> None:
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/depth"))
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 48, 96, 192])
    parser.add_argument("--inits", nargs="+", default=["megatron", "xavier", "fan_in", "deepscale"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--deep", type=int, default=192, help="depth from which --steps-deep holds")
    parser.add_argument("--steps-deep", type=int, default=90)
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, a core each")
    parser.add_argument("--hours", type=float, default=2.9, help="start no cell after this")
    args = parser.parse_intermixed_args()
    deadline = time.monotonic() + 3600 * args.hours
    cells = sorted(Cell(*key) for key in itertools.product(args.depths, args.inits, args.rates))
    cells.sort(key=lambda cell: (cell.depth, args.inits.index(cell.init)))
    with ThreadPoolExecutor(args.processes) as pool:
        losses = dict(zip(cells, pool.map(lambda c: train(c, args, deadline), cells), strict=True))
    print(table(losses))
    write_json(
        args.output,
        {
            "environment": environment("torch", "megatron-core"),
            "steps": {"below": args.steps, f"from {args.deep} layers": args.steps_deep},
            "cells": [
                {**vars(cell), "ce": None if loss is None or math.isnan(loss) else loss}
                for cell, loss in losses.items()
            ],
        },
    )


if __name__ == "__main__":
    main()
