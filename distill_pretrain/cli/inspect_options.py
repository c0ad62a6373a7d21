"""Options of `distill-pretrain inspect --estimators` and `--signal`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe

DRAWS = (12, 30, 50, 100)
TOP_P = (0.8, 0.9, 0.95)
NUM_SEQUENCES = 64
SIGNAL_SEQUENCES = 2
POSITIONS = 128
MOST_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that stand beside the path."""
    _add_estimators(parser)
    _add_signal(parser)


def _add_estimators(parser: argparse.ArgumentParser) -> None:
    """Options of `--estimators`."""
    group = parser.add_argument_group("with --estimators")
    group.add_argument(
        "--sequences",
        type=int,
        default=NUM_SEQUENCES,
        help="sequences to score (default %(default)s)",
    )
    group.add_argument(
        "--draws",
        type=_numbers(int),
        default=DRAWS,
        metavar="N,N,...",
        help=f"draws per position, and k of top-k (default {_listed(DRAWS)})",
    )
    group.add_argument(
        "--top-p",
        type=_numbers(float),
        default=TOP_P,
        metavar="P,P,...",
        help=f"masses of top-p, capped at the largest N (default {_listed(TOP_P)})",
    )
    group.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures too")


def _add_signal(parser: argparse.ArgumentParser) -> None:
    """Options of `--signal`."""
    group = parser.add_argument_group("with --signal (--output too)")
    group.add_argument(
        "--batch",
        type=int,
        default=SIGNAL_SEQUENCES,
        metavar="B",
        help="sequences of the batch (default %(default)s)",
    )
    group.add_argument(
        "--positions",
        type=int,
        default=POSITIONS,
        metavar="T",
        help="their length, at most data.seq_len (default %(default)s); B x T may be "
        f"{MOST_TOKENS} at most: theory follows every pair of tokens",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="a trained model instead of fresh weights"
    )
    group.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the figures too")


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(map(str, values))


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in its message
    return parse


def recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that PATH is."""
    from distill_pretrain.config import load_recipe
    from distill_pretrain.jobs.recipe import Recipe

    return load_recipe(Recipe, Path(args.path), args.overrides)
