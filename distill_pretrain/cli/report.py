"""`distill-pretrain report`."""

from __future__ import annotations

import argparse

from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.dist.env import launch_rank

SECTIONS = ("report",)

HELP = """
Writes a report that compares training runs: a table of held-out figures, the measured differences, pictures of the
loss curves and of the calibration, and what else eval.output holds (drafting, gradients, tasks).

Reads   report.runs (run folders; their metrics.jsonl), report.eval (the JSON file of `distill-pretrain eval`)
Writes  report.output_dir: report.md, loss.png, reliability.png, recipe.yaml

Use the same names in report.runs as in eval.models. Needs matplotlib: pip install 'distill-pretrain[eval]'

Example
  distill-pretrain report recipe.yaml

  with recipe.yaml:
    report:
      runs: {teacher: runs/teacher, ce: runs/ce, kd: runs/kd}
      eval: runs/eval.json
      output_dir: runs/report
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Writes the report of a recipe; one process does it."""
    require(recipe, "report", "report")
    if launch_rank() != 0:
        return
    from distill_pretrain.eval.report import write_report

    assert recipe.report
    named = args.recipe if "=" not in args.recipe else None
    path = write_report(recipe.report, recipe=named)
    dump_recipe(recipe, recipe.report.output_dir / "recipe.yaml")
    say("report is in", path)
