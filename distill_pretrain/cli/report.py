"""`distill-pretrain report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank

SECTIONS = ("report",)

HELP = """
With a recipe: writes a report that compares training runs: a table of held-out figures, the measured differences,
pictures of the loss curves and of the calibration, and what else eval.output holds (drafting, gradients, tasks).

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

With a run folder in its place: writes one HTML page of that run, finished or not, which needs nothing else to be read:
loss terms, learning rate, gradient norm, speed, waiting for data, memory, bad steps, restarts, the recipe. It is
RUN/run.html, or the file that --html names.

  distill-pretrain report runs/kd
  distill-pretrain report runs/kd --html kd.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument(
        "--html", type=Path, metavar="FILE.html", help="with a run folder: where its page goes"
    )


def run_folder(folder: Path, args: argparse.Namespace) -> None:
    """Writes the page of one run; one process does it."""
    if args.overrides:
        raise ConfigError(
            "settings of a recipe do not belong to the page of a run",
            found=" ".join(args.overrides),
            remedy="leave them out, or name a recipe in place of the folder",
        )
    if launch_rank() != 0:
        return
    from distill_pretrain.reports.run_page import write_run_page

    say("page is in", write_run_page(folder, args.html))


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Writes the report of a recipe; one process does it."""
    if args.html is not None:
        raise ConfigError(
            "--html is for the page of one run",
            where="--html",
            found=f"the recipe {args.recipe}",
            expected="a run folder in place of the recipe",
            remedy="distill-pretrain report RUN --html FILE.html",
        )
    require(recipe, "report", "report")
    if launch_rank() != 0:
        return
    from distill_pretrain.files.ownership import owner_of, owning
    from distill_pretrain.reports.report import write_report

    assert recipe.report
    named = args.recipe if "=" not in args.recipe else None
    output_dir = recipe.report.output_dir
    remedy = "wait for it, or set another report.output_dir"
    with owning(owner_of(output_dir), what=output_dir, remedy=remedy):
        path = write_report(recipe.report, recipe=named)
        dump_recipe(recipe, output_dir / "recipe.yaml")
    say("report is in", path)
