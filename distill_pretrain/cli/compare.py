"""`distill-pretrain compare`."""

from __future__ import annotations

import argparse

from distill_pretrain.cli.train import STOPPED_EXIT_CODE
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_world_size

SECTIONS = (
    "data",
    "teacher",
    "capture",
    "model",
    "parallel",
    "optimizer",
    "objective",
    "train",
    "compare",
)
HELP = """
Compares ways to learn from a teacher, from one recipe: trains the teacher if told to, captures every target set in
one pass, trains a student per cell and seed from equal initial weights on equal batches, scores all of them on
held-out text, and reports tables, differences with their errors over seeds, and pictures.

Reads   data.tokens, data.held_out_tokens, teacher.path (or compare.teacher, to train it into that folder)
Writes  capture.output_dir/SET, compare.output_dir: cells/CELL/seed-N (runs), eval/seed-N.json, report/report.md

Started again it goes on where it stopped: finished students are left alone, a killed one resumes from its checkpoint.
Several jobs may share the work: each takes students that no other is training, or only those of --cells; start them
once a first job with --prepare has the teacher and the cache ready. The last to finish scores and reports.
train.output_dir and train.seed are replaced for every student.

Example
  distill-pretrain compare recipe.yaml
  torchrun --nproc-per-node=2 -m distill_pretrain compare recipe.yaml --cells ce,full-kd

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 256}
    teacher: {path: runs/teacher}
    capture: {output_dir: runs/compare/cache}
    model: {num_layers: 2, hidden_size: 128, ffn_hidden_size: 320, num_attention_heads: 4}
    train: {output_dir: runs/compare, steps: 400, global_batch_size: 16}
    compare: {output_dir: runs/compare, seeds: [1, 2, 3]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that stand beside the recipe."""
    parser.add_argument(
        "--cells", metavar="NAME,...", default="", help="train only these cells (as compare.only)"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="stop once the teacher and the caches are ready"
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Runs, or goes on with, the comparison of a recipe."""
    from distill_pretrain.jobs.comparison.run import compare

    cells = tuple(name for name in args.cells.split(",") if name)
    if compare(recipe, cells=cells, prepare_only=args.prepare, command=_command(args)):
        raise SystemExit(STOPPED_EXIT_CODE)


def _command(args: argparse.Namespace) -> str:
    import shlex

    processes = launch_world_size()
    start = f"torchrun --nproc-per-node={processes} -m distill_pretrain"
    words = ["compare", args.recipe, *args.overrides]
    return " ".join([start if processes > 1 else "distill-pretrain", *map(shlex.quote, words)])
