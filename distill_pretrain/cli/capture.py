"""`distill-pretrain capture`."""

from __future__ import annotations

import argparse

from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ("data", "teacher", "capture")
HELP = """
Runs the teacher over the training sequences and stores, for every position, a sparse sample of its next-token
distribution. Students then train from this cache at the cost of plain cross-entropy.

Reads   data.tokens (.bin/.idx), teacher.path, and those of teacher.mixture where targets are of several teachers' mean
Writes  capture.output_dir: codec-*.bin, plan.json, extent.json, s-*.dpt, manifest.json (last);
        with capture.sets the same in capture.output_dir/NAME for every set, all from one pass of the teacher;
        in the (first) cache .telemetry/HOST-PID-TIME.jsonl: speed, queue, entropy, hit rate, time left

Every copy of the teacher takes shards that nobody works on, so more copies may join at any time: other processes of
the same job, or other jobs with the same recipe on any node that sees the folder. Killed and started again, or started
with another number of copies, it goes on where it stopped; the bytes are the same. A teacher that cannot be sound
(frozen, uniform, shifted) stops it within the first sequences (capture.sanity_gate). A larger data.num_sequences or
capture.num_sequences extends a finished cache: full shards are kept.

    distill-pretrain capture distill.yaml
    distill-pretrain capture distill.yaml --dry-run
    torchrun --nproc-per-node=2 -m distill_pretrain capture distill.yaml
    distill-pretrain capture distill.yaml capture.sets='{rs: {num_draws: 50}, top: {sampler: topk, num_draws: 12}}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be captured, from which teacher and how large it will be; load no weights",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="with --dry-run: as if so many processes had been started (default: those that were)",
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Capture the cache, or the caches, of a recipe."""
    from distill_pretrain.jobs.capture import capture_caches, require_capture

    if args.dry_run:
        from distill_pretrain.jobs.capture_dry_run import dry_run

        require_capture(recipe)
        dry_run(recipe, args.processes)
        return
    capture_caches(recipe)
