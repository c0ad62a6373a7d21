"""`distill-pretrain capture`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import progress, say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.cli.teachers import load_teacher
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.dist.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.formats.cache_plan import CachePlan
    from distill_pretrain.formats.cache_writer import CacheWriter
    from distill_pretrain.formats.hc_tables import HcTables
    from distill_pretrain.formats.manifest import Manifest
    from distill_pretrain.teacher.config import CaptureConfig

SECTIONS = ("data", "teacher", "capture")
HELP = """
Runs the teacher over the training sequences and stores, for every position, a sparse sample of its next-token
distribution. Students then train from this cache at the cost of plain cross-entropy.

Reads   data.tokens (.bin/.idx), teacher.path
Writes  capture.output_dir: codec-*.bin, plan.json, extent.json, s-*.dpt, manifest.json (last);
        with capture.sets the same in capture.output_dir/NAME for every set, all from one pass of the teacher

Killed and started again, or started with another number of processes, it goes on where it stopped; the bytes are
the same. A larger data.num_sequences or capture.num_sequences extends a finished cache: full shards are kept.

    distill-pretrain capture distill.yaml
    torchrun --nproc-per-node=2 -m distill_pretrain capture distill.yaml
    distill-pretrain capture distill.yaml capture.sets='{rs: {num_draws: 50}, top: {sampler: topk, num_draws: 12}}'
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Capture the cache, or the caches, of a recipe."""
    require(recipe, "capture", "data", "teacher", "capture")
    assert recipe.data and recipe.capture
    from distill_pretrain.data.sources import require_one_source
    from distill_pretrain.dist.process import on_first_rank
    from distill_pretrain.teacher.capture import (
        capture_shards,
        finish_capture,
        make_plans,
        pending_shards,
    )

    capture = recipe.capture
    require_one_source(recipe.data, "capture", "capture.output_dir")
    _require_codec_with_tables(capture)
    with open_teacher(recipe) as (sequences, engine):
        plans = make_plans(sequences, capture, engine.identity)
        # Rank 0 first: it makes the tables of new caches, which the others then find.
        on_first_rank(lambda: len(_join(plans, capture, sequences, engine)))
        writers = _join(plans, capture, sequences, engine)
        if launch_rank() == 0:
            for folder in plans:
                dump_recipe(recipe, folder / "recipe.yaml")
        plan = writers[0].plan
        left = sum(plan.shard_range(shard)[1] for shard in pending_shards(writers))
        say(f"{plan.num_sequences - left} of {plan.num_sequences} sequences are captured already")
        first_shard = launch_rank() * plan.num_shards // launch_world_size()
        with progress(
            left * plan.seq_len // launch_world_size(), "capturing", unit="positions"
        ) as bar:
            capture_shards(
                writers, engine, sequences, first_shard=first_shard, progress=bar.advance
            )
        # No barrier: shards differ in length by more than a collective may wait. The last to finish publishes.
        manifests = finish_capture(writers)
    for folder, manifest in manifests.items():
        _summarise(folder, manifest, sequences)


@contextmanager
def open_teacher(recipe: Recipe) -> Iterator[tuple[SequenceData, LogitsEngine]]:
    """The sequences of a recipe and its teacher, loaded, for as long as the block lasts.

    The recipe has the sections data, teacher and capture.
    """
    assert recipe.data and recipe.teacher and recipe.capture
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.dist.process import process_group, set_cpu_threads
    from distill_pretrain.mcore.config import ParallelConfig
    from distill_pretrain.mcore.parallel import model_parallel

    set_cpu_threads(recipe.capture.threads)
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        sequences = open_sequences(recipe.data)
        yield sequences, load_teacher(recipe.teacher, sequences, recipe.data.tokens)


def _join(
    plans: Mapping[Path, CachePlan],
    capture: CaptureConfig,
    sequences: SequenceData,
    engine: LogitsEngine,
) -> list[CacheWriter]:
    """Start the caches, or join those that are there."""
    from distill_pretrain.formats.cache_writer import CacheWriter
    from distill_pretrain.formats.codec_files import read_tables

    given = None
    if capture.codec_tables is not None:
        (folder, plan), *_ = plans.items()
        given = read_tables(capture.codec_tables, plan)
        plans = {folder: plan.with_tables(given.sha256)}
    make_tables = _tables_of_new_caches(plans, capture, sequences, engine, given)
    return [
        CacheWriter.create_or_resume(
            folder,
            plan,
            make_tables=make_tables(folder),
            labels_of=lambda sequence: sequences.plan.read([sequence])[1][0],
        )
        for folder, plan in plans.items()
    ]


def _tables_of_new_caches(
    plans: Mapping[Path, CachePlan],
    capture: CaptureConfig,
    sequences: SequenceData,
    engine: LogitsEngine,
    given: HcTables | None,
) -> Callable[[Path], Callable[[], HcTables]]:
    """Folder -> what makes the tables of its cache: the given ones, or those of one pilot for all that need any."""
    from distill_pretrain.formats.names import PLAN_NAME
    from distill_pretrain.teacher.pilot import pilot_tables

    made: dict[Path, HcTables] = {}

    def make(folder: Path) -> HcTables:
        if given is not None:
            return given
        if folder not in made:
            say("scoring a pilot for the codec's tables")
            # One that another process starts meanwhile gets tables in vain, and its own are used.
            new = [path for path in plans if not (path / PLAN_NAME).exists() or path == folder]
            tables = pilot_tables(
                engine, sequences, [plans[path] for path in new], num_tokens=capture.pilot_tokens
            )
            made.update(zip(new, tables, strict=True))
        return made[folder]

    return lambda folder: lambda: make(folder)


def _require_codec_with_tables(capture: CaptureConfig) -> None:
    """Refuse tables for a codec that has none."""
    from distill_pretrain.errors import ConfigError

    if capture.codec_tables is not None and capture.codec == "raw":
        raise ConfigError(
            "the raw codec has no tables",
            where="capture.codec_tables, capture.codec",
            found=f"codec_tables: {capture.codec_tables}, codec: raw",
            remedy="set capture.codec=hc, or leave capture.codec_tables out",
        )


def _summarise(folder: Path, manifest: Manifest, sequences: SequenceData) -> None:
    """Printed by the process that finished the cache, whatever its rank."""
    from distill_pretrain.data.canary import run_canary
    from distill_pretrain.formats.cache_reader import CacheReader

    totals = manifest.totals
    print(
        f"cache complete: {folder}\n"
        f"  {totals['tokens']:,} positions, {totals['bytes_per_token']:.1f} bytes/token, "
        f"{totals['entries_per_token']:.2f} unique ids/position"
    )
    with CacheReader.open(folder) as cache:
        run_canary(
            sequences.plan,
            cache,
            num_sequences=manifest.plan.num_sequences,
            where=folder,
            captured_rate=totals["canary_hit_rate"],
            captured_sequences=manifest.plan.num_sequences,
            refuse=False,
            say=lambda line: print(f"  {line}", flush=True),
        )
