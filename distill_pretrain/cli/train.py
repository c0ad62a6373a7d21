"""`distill-pretrain train`."""

from __future__ import annotations

import argparse
import signal

from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe

STOPPED_EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it

SECTIONS = (
    "data",
    "model",
    "parallel",
    "optimizer",
    "objective",
    "teacher",
    "train",
    "phases",
    "plan",
)
HELP = """
Trains a model with megatron-core: on the text alone (a teacher, or a baseline), from a cache of sparse teacher
logits, from a teacher that runs in the same job, or on a mix of text and teacher, as the section `objective` says.

Reads   data.tokens (.bin/.idx); when objective.kd_weight > 0, data.cache, or, with objective.target=teacher,
        teacher.path; with train.start_from, the weights that a new run starts from; with train.continue_from, the run
        whose next phase it is
Writes  train.output_dir: recipe.yaml, metrics.jsonl (one record per step), events.jsonl (starts, bad steps, saves),
        checkpoints/; with train.track also tensorboard/ or metrics.prom; with phases, recipe.yaml, phases.json and
        such a folder for each

Started again with the same recipe it goes on from the newest checkpoint, under any tensor x pipeline x data parallel
layout. What may not change on the way is compared, and a difference is named. SIGTERM, to one process or to all, saves
after the step and ends with exit code 143; Ctrl-C ends at once, with 130.

    distill-pretrain train student.yaml
    distill-pretrain train student.yaml --dry-run --world-size 64
    torchrun --nproc-per-node=2 -m distill_pretrain train student.yaml parallel.tensor=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
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
    from distill_pretrain.jobs.train import require_training, train_model

    require_training(recipe)
    if args.dry_run:
        from distill_pretrain.jobs.train_dry_run import dry_run

        dry_run(recipe, args.world_size)
        return
    if args.world_size is not None:
        raise ConfigError(
            "the launcher decides how many processes train",
            where="--world-size",
            found=args.world_size,
            remedy="add --dry-run, or start torchrun with as many processes",
        )
    if train_model(recipe):
        # The interpreter gives up its handlers before it has ended; a second SIGTERM must not change the exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(STOPPED_EXIT_CODE)
