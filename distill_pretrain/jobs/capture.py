"""Capturing: the caches of a recipe, by this process and any number of others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.jobs.console import progress
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank
from distill_pretrain.processes.logs import ANY_RANK
from distill_pretrain.teacher.loading import load_replica

if TYPE_CHECKING:
    from distill_pretrain.cache.codec.hc.tables import HcTables
    from distill_pretrain.cache.manifest import Manifest
    from distill_pretrain.cache.plan import CachePlan
    from distill_pretrain.cache.writer import CacheWriter
    from distill_pretrain.contracts import TeacherEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.teacher.config import CaptureConfig
    from distill_pretrain.teacher.replica_group import ReplicaGroup
    from distill_pretrain.teacher.telemetry import CaptureLog, Stopwatch

_log = logging.getLogger(__name__)


def require_capture(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe cannot be captured from, whatever lies on disk."""
    require(recipe, "capture", "data", "teacher", "capture")
    assert recipe.data and recipe.capture
    from distill_pretrain.data.sources import require_one_source

    require_one_source(recipe.data, "capture", "capture.output_dir")
    _require_codec_with_tables(recipe.capture)


def capture_caches(recipe: Recipe) -> dict[Path, Manifest]:
    """Capture the cache, or the caches, of a recipe, with all processes of the job.

    Args:
        recipe: with the sections data, teacher and capture.

    Returns:
        The manifests of the caches that this process finished, by folder; none where others still hold shards.

    Raises:
        ConfigError: the recipe cannot be captured from.
        DistillPretrainError: corpus, teacher or caches do not fit, or cannot be read or written.
    """
    require_capture(recipe)
    assert recipe.data and recipe.capture and recipe.teacher
    from distill_pretrain.teacher.capture import make_plans
    from distill_pretrain.teacher.replica_group import ReplicaGroup, first_replica_first
    from distill_pretrain.teacher.sampling_backend import columns_reader
    from distill_pretrain.teacher.telemetry import Stopwatch, TimedTeacher

    capture = recipe.capture
    _require_writable(capture)
    with open_replica(recipe) as (sequences, engine):
        plans = make_plans(sequences, capture, engine.identity)
        stopwatch = Stopwatch()
        read = columns_reader(capture.sampling_impl, engine.device, engine.replica)
        group = ReplicaGroup(TimedTeacher(engine, stopwatch), sequences, read=read)
        if group.replica.number == 0:
            for member in recipe.teacher.members:
                _warn_of_missing_bos(
                    member.path,
                    group,
                    next(iter(plans.values())),
                    partial(ReplicaGroup, engine, read=read),
                )
        # The first replica makes the tables of new caches, which the others then find.
        writers = first_replica_first(group, lambda: _join(plans, capture, group))
        if launch_rank() == 0:
            for writer in writers or []:
                # A finished cache may be kept read-only.
                if writer.pending():
                    dump_recipe(recipe, writer.folder / "recipe.yaml")
        # No barrier: shards differ in length by more than a collective may wait. The last to finish publishes.
        manifests = group.run(lambda: _capture(writers or [], capture, group, stopwatch))
    for folder, manifest in (manifests or {}).items():
        _summarise(folder, manifest, sequences)
    return manifests or {}


def _warn_of_missing_bos(
    model: Path,
    group: ReplicaGroup,
    plan: CachePlan,
    group_of: Callable[[SequenceData], ReplicaGroup],
) -> None:
    """Say so where the teacher expects a token that the corpus lacks, and what it says with it."""
    from distill_pretrain.teacher.bos import measure_bos, missing_bos

    bos = missing_bos(model, group.sequences.index)
    if bos is not None:
        figures = measure_bos(group_of, group.sequences, plan, bos)
        if figures is not None:
            _log.warning(figures.warning(bos), extra=ANY_RANK)


def _capture(
    writers: list[CacheWriter], capture: CaptureConfig, group: ReplicaGroup, stopwatch: Stopwatch
) -> dict[Path, Manifest]:
    """What the leader of a replica does; the manifests of caches that are finished by then."""
    from distill_pretrain.teacher.capture import (
        CaptureWatch,
        capture_shards,
        finish_capture,
        pending_shards,
    )
    from distill_pretrain.teacher.gate import SanityGate
    from distill_pretrain.teacher.kept_mass import KeptMass
    from distill_pretrain.teacher.telemetry import CaptureLog, telemetry_path

    replica = group.replica
    plan = writers[0].plan
    left = sum(plan.shard_range(shard)[1] for shard in pending_shards(writers))
    is_first = replica.number == 0
    if is_first:
        _log.info(
            f"{plan.num_sequences - left} of {plan.num_sequences} sequences are captured already",
            extra=ANY_RANK,
        )
    log = CaptureLog(
        telemetry_path(writers[0].folder) if capture.telemetry and left else None,
        replica=replica.number,
        folder=writers[0].folder,
        plan=plan,
        watch=stopwatch,
    )
    gate = SanityGate(vocab_size=plan.vocab_size, mode=capture.sanity_gate)
    kept = KeptMass({w.folder: w.plan for w in writers if is_first})
    with progress(
        left * plan.seq_len // replica.count, "capturing", unit="positions", quiet=not is_first
    ) as bar:
        watch = CaptureWatch(
            gate,
            log=log,
            kept=kept,
            stopwatch=stopwatch,
            progress=lambda positions: bar.advance(positions, left_s=log.eta_s, **_shown(log)),
        )
        try:
            capture_shards(
                writers,
                group,
                first_shard=replica.number * plan.num_shards // replica.count,
                watch=watch,
            )
        finally:
            log.write()
            kept.close()
    return finish_capture(writers)


def _shown(log: CaptureLog) -> dict[str, str]:
    """Facts behind the progress line."""
    if log.last is None:
        return {}
    return {
        "positions/s": f"{log.last['positions_per_s']:,.0f}",
        "entropy": f"{log.last['entropy']:.2f}",
        "hits": f"{log.last['hit_rate'] or 0:.1%}",
        "queue": str(log.last["queue_depth"]),
    }


@contextmanager
def open_replica(recipe: Recipe) -> Iterator[tuple[SequenceData, TeacherEngine]]:
    """Open the sequences of a recipe and this process's part of its teacher, for as long as the block lasts.

    The recipe has the sections data, teacher and capture.
    """
    assert recipe.data and recipe.teacher and recipe.capture
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.processes.process import process_group, set_cpu_threads
    from distill_pretrain.teacher.engines import teacher_groups

    set_cpu_threads(recipe.capture.threads)
    with process_group(), teacher_groups(recipe.teacher):
        sequences = open_sequences(recipe.data)
        yield sequences, load_replica(recipe.teacher, sequences, recipe.data.tokens)


def _join(
    plans: Mapping[Path, CachePlan], capture: CaptureConfig, group: ReplicaGroup
) -> list[CacheWriter]:
    """Start the caches, or join those that are there."""
    from distill_pretrain.cache.codec.files import read_tables
    from distill_pretrain.cache.writer import CacheWriter

    given = None
    if capture.codec_tables is not None:
        (folder, plan), *_ = plans.items()
        given = read_tables(capture.codec_tables, plan)
        plans = {folder: plan.with_tables(given.sha256)}
    make_tables = _tables_of_new_caches(plans, capture, group, given)
    return [
        CacheWriter.create_or_resume(
            folder,
            plan,
            make_tables=make_tables(folder),
            labels_of=lambda sequence: group.sequences.plan.unmasked.read([sequence])[1][0],
        )
        for folder, plan in plans.items()
    ]


def _tables_of_new_caches(
    plans: Mapping[Path, CachePlan],
    capture: CaptureConfig,
    group: ReplicaGroup,
    given: HcTables | None,
) -> Callable[[Path], Callable[[], HcTables]]:
    """Folder -> what makes the tables of its cache: the given ones, or those of one pilot for all that need any."""
    from distill_pretrain.cache.names import PLAN_NAME
    from distill_pretrain.teacher.pilot import pilot_tables

    made: dict[Path, HcTables] = {}

    def make(folder: Path) -> HcTables:
        if given is not None:
            return given
        if folder not in made:
            _log.info("scoring a pilot for the codec's tables", extra=ANY_RANK)
            # One that another process starts meanwhile gets tables in vain, and its own are used.
            new = [path for path in plans if not (path / PLAN_NAME).exists() or path == folder]
            tables = pilot_tables(
                group.score, [plans[path] for path in new], num_tokens=capture.pilot_tokens
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


def _require_writable(capture: CaptureConfig) -> None:
    """Raise StorageError where a cache that is not finished cannot be written: before the teacher is loaded."""
    from distill_pretrain.cache.names import MANIFEST_NAME
    from distill_pretrain.files.disk import require_writable

    for name in capture.sets or ("",):
        folder = capture.output_dir / name
        if not (folder / MANIFEST_NAME).exists():
            require_writable(folder / "recipe.yaml")


def _summarise(folder: Path, manifest: Manifest, sequences: SequenceData) -> None:
    """Printed by the process that finished the cache, whatever its rank."""
    from distill_pretrain.cache.reader import CacheReader
    from distill_pretrain.data.canary import run_canary

    totals = manifest.totals
    print(
        f"cache complete: {folder}\n"
        f"  {totals['tokens']:,} positions, {totals['bytes_per_token']:.1f} bytes/token, "
        f"{totals['entries_per_token']:.2f} unique ids/position"
    )
    with CacheReader.open(folder) as cache:
        run_canary(
            sequences.plan.unmasked,
            cache,
            num_sequences=manifest.plan.num_sequences,
            where=folder,
            captured_rate=totals["canary_hit_rate"],
            captured_sequences=manifest.plan.num_sequences,
            refuse=False,
        )
