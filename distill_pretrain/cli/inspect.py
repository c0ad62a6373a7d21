"""`distill-pretrain inspect`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill_pretrain.cli import inspect_options
from distill_pretrain.errors import ConfigError
from distill_pretrain.processes.env import launch_rank

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ()

HELP = """
Says what a folder or file written by this project contains. PATH is one of

  a cache, finished or not     what it was made from, its size, what its targets are like, one example row;
                               a folder, or a URL such as s3://bucket/cache
  a token prefix               documents, tokens, lengths, fingerprint, the first tokens (PREFIX.bin and PREFIX.idx)
  a folder with tokens.json    the same of every corpus in it
  a run folder                 last step, last figures, checkpoints, model
  a checkpoint folder          step, model, what it belongs to

Reads only; checks little: use `distill-pretrain verify` for a cache.

With --estimators PATH is a recipe with the sections data, teacher and capture. Every sampler is measured on what the
teacher says of the first sequences: its error and bias against the teacher's softmax, unique ids and bytes per
position, and how much less variance systematic sampling has than multinomial. Nothing is captured.

With --signal PATH is a recipe with the sections data and model (and parallel, train.seed). The model's signal is
measured on a few sequences, before training or from --checkpoint, layer by layer: variance, correlation between tokens,
and gradients, beside what theory predicts for its initial weights. Tensor x pipeline parallel under torchrun, which
wants the longer name --signal-propagation: it has options of its own that begin with --signal.

Examples
  distill-pretrain inspect runs/cache
  distill-pretrain inspect --estimators capture.yaml teacher.path=runs/teacher --output estimators.json
  distill-pretrain inspect --signal student.yaml model.init=deepscale model.num_layers=96 --picture signal.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="cache folder or URL, token prefix, run or checkpoint folder; a recipe with --estimators or --signal",
    )
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="with --estimators or --signal: settings that win over the recipe's",
    )
    parser.add_argument(
        "--estimators", action="store_true", help="measure the samplers on a recipe's teacher"
    )
    parser.add_argument(
        "--signal",
        "--signal-propagation",
        action="store_true",
        help="measure signal propagation in a recipe's model",
    )
    inspect_options.add_arguments(parser)


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Describes a path; one process does it."""
    if args.estimators:
        from distill_pretrain.jobs.inspect.estimators import show_estimators

        show_estimators(
            inspect_options.recipe(args),
            draws=args.draws,
            top_p=args.top_p,
            num_sequences=args.sequences,
            output=args.output,
        )
        return
    if args.signal:
        from distill_pretrain.jobs.inspect.signal import show_signal

        show_signal(
            inspect_options.recipe(args),
            num_sequences=args.batch,
            positions=args.positions,
            path=args.checkpoint,
            picture=args.picture,
            output=args.output,
        )
        return
    if args.overrides:
        raise ConfigError(
            "settings of a recipe belong to --estimators and --signal",
            found=" ".join(args.overrides),
            remedy="leave them out, or add one of these",
        )
    if launch_rank() == 0:
        from distill_pretrain.jobs.inspect.path import show_path

        show_path(args.path)
