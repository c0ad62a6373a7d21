"""Trains deep students on real text under tensor and pipeline parallelism; compares their curves with one process's.

    python tools/depth_layouts.py launch/recipes/depth/cell.yaml [section.key=value ...] [--output layouts.json]

Every run is a `distill-pretrain train` of its own; processes share the machine's cores. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from reporting import command_line, environment, run, write_json

LAYOUTS = {"one process": {}, "TP 2": {"tensor": 2}, "PP 2": {"pipeline": 2}}


def train(depth: int, layout: dict[str, int], folder: Path, args: argparse.Namespace) -> None:
    """Train a student of this depth from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *([sys.executable, *launcher] if layout else [sys.executable]),
        *("-m", "distill_pretrain", "train", str(args.recipe), *args.overrides),
        f"model.num_layers={depth}",
        f"model.hidden_size={args.hidden}",
        f"model.init={args.init}",
        f"train.steps={args.steps}",
        f"train.checkpoint_interval={args.steps}",
        f"train.output_dir={folder}",
        *(f"parallel.{name}={size}" for name, size in layout.items()),
    ]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def curve(folder: Path) -> dict[str, list[float]]:
    """Of a finished run: cross-entropy and gradient norm by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [record[name] for record in records] for name in ("ce", "grad_norm")}


def difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference over the steps."""
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def compare(depth: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each layout."""
    folders = {name: args.folder / f"{depth}-{name.replace(' ', '')}" for name in LAYOUTS}
    curves = {}
    for name, layout in LAYOUTS.items():
        train(depth, layout, folders[name], args)
        curves[name] = curve(folders[name])
    one = curves["one process"]
    return [
        {
            "layers": depth,
            "layout": name,
            "first_ce": found["ce"][0],
            "last_ce": found["ce"][-1],
            "ce_difference": difference(found["ce"], one["ce"]),
            "grad_norm_difference": difference(found["grad_norm"], one["grad_norm"]),
        }
        for name, found in curves.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| layers | layout | first cross-entropy | last | largest difference | of the gradient norm |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    for row in rows:
        losses = f"{row['first_ce']:.5f} | {row['last_ce']:.5f}"
        found = f"{row['ce_difference']:.1e} | {row['grad_norm_difference']:.1e}"
        if row["layout"] == "one process":
            found = "– | –"
        lines.append(f"| {row['layers']} | {row['layout']} | {losses} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/depth/layouts"))
    parser.add_argument("--depths", type=int, nargs="+", default=[96, 192])
    parser.add_argument("--init", default="deepscale")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_intermixed_args()
    rows = list(itertools.chain.from_iterable(compare(depth, args) for depth in args.depths))
    print(table(rows))
    report = {
        "environment": environment("torch", "megatron-core"),
        "steps": args.steps,
        "rows": rows,
    }
    write_json(args.output, report)


if __name__ == "__main__":
    run(main)
