"""`distill-pretrain train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.cli.teachers import load_teacher
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData

STOPPED_EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it

SECTIONS = ("data", "model", "parallel", "optimizer", "objective", "teacher", "train", "plan")
HELP = """
Trains a model with megatron-core: on the text alone (a teacher, or a baseline), from a cache of sparse teacher
logits, from a teacher that runs in the same job, or on a mix of text and teacher, as the section `objective` says.

Reads   data.tokens (.bin/.idx); when objective.kd_weight > 0, data.cache, or, with objective.target=teacher,
        teacher.path
Writes  train.output_dir: recipe.yaml, metrics.jsonl (one record per step), events.jsonl (starts, bad steps, saves),
        checkpoints/; with train.track also tensorboard/ or metrics.prom

Started again with the same recipe it goes on from the newest checkpoint, under any tensor x pipeline x data parallel
layout. What may not change on the way is compared, and a difference is named. SIGTERM, to one process or to all, saves
after the step and ends with exit code 143; Ctrl-C ends at once, with 130.

    distill-pretrain train student.yaml
    distill-pretrain train student.yaml --dry-run --world-size 64
    torchrun --nproc-per-node=2 -m distill_pretrain train student.yaml parallel.tensor=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe, its layout, memory (an estimate) and data; load no weights, write nothing",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: as if so many processes had been started (default: those that were, or plan.gpus)",
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Train the model of a recipe."""
    online = recipe.objective.target == "teacher"
    require(recipe, "train", "data", "model", "train", *(["teacher"] if online else []))
    assert recipe.data and recipe.model and recipe.train
    if getattr(args, "dry_run", False):
        from distill_pretrain.cli.train_dry_run import dry_run

        dry_run(recipe, args.world_size)
        return
    if getattr(args, "world_size", None) is not None:
        raise ConfigError(
            "the launcher decides how many processes train",
            where="--world-size",
            found=args.world_size,
            remedy="add --dry-run, or start torchrun with as many processes",
        )
    from distill_pretrain.train.job import train_student

    output_dir = recipe.train.output_dir

    def save_recipe() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, output_dir / "recipe.yaml")

    def open_teacher(sequences: SequenceData) -> LogitsEngine:
        assert recipe.teacher and recipe.data
        return load_teacher(recipe.teacher, sequences, recipe.data.tokens)

    stopped = train_student(
        data=recipe.data,
        model=recipe.model,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        objective=recipe.objective,
        train=recipe.train,
        say=say,
        save_recipe=save_recipe,
        open_teacher=open_teacher if online else None,
    )
    if stopped:
        raise SystemExit(STOPPED_EXIT_CODE)
