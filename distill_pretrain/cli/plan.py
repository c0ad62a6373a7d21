"""`distill-pretrain plan`."""

from __future__ import annotations

import argparse
import json

from distill_pretrain.config import require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe

SECTIONS = (
    "data",
    "teacher",
    "capture",
    "model",
    "parallel",
    "optimizer",
    "objective",
    "train",
    "eval",
    "plan",
)
HELP = """
Says before anything runs what a capture and its students will take: bytes and files of the cache, teacher hours, memory
of every rank by layout, reading per node, what distillation adds to a step, each sampler's error, and from how many
students on a cache is cheaper than a teacher in every job. Loads no weights and needs no GPU.

Reads   the recipe; where they are named and there: tokens.json, the teacher's config.json, plan.pilot (a small cache,
        or the JSON of `inspect --estimators`), plan.ce_run and plan.kd_run (short runs)
Writes  nothing

With the sections capture (and teacher) it plans the capture, with model and train the students, with all of them
everything; with eval also the memory of a process that evaluates. Every figure has its formula and says whether it is
exact, measured, from a pilot, an estimate or an assumption.

    distill-pretrain plan distill.yaml
    distill-pretrain plan distill.yaml plan.pilot=runs/pilot plan.teacher_tokens_per_second=40000 plan.gpus=64 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Print the plan of a recipe; one process does it."""
    require(recipe, "plan", "data")
    has_student = recipe.model is not None and recipe.train is not None
    if recipe.capture is None and recipe.eval is None and not has_student:
        raise ConfigError(
            "`plan` finds neither a capture nor a student nor an evaluation in the recipe",
            found="no capture; no model and train; no eval",
            expected="the section capture, or model and train, or eval, or several of them",
            remedy="add them to the recipe; `distill-pretrain plan --help` lists their keys",
        )
    from distill_pretrain.jobs.plan.report import plan_report

    report = plan_report(recipe)
    say(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
