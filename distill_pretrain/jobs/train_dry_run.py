"""`distill-pretrain train --dry-run`: everything about a job that can be known without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.data.config import DataConfig
from distill_pretrain.errors import ConfigError, LayoutError, TokenDataError
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.phases import phases_of
from distill_pretrain.jobs.plan.corpus import Corpus, corpus_of
from distill_pretrain.jobs.plan.student import (
    GB,
    layout_text,
    memory_figures,
    needed_bytes,
    online_teacher_bytes,
    plan_settings,
    student_job,
)
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.start import open_start, start_folder
from distill_pretrain.jobs.train import require_training
from distill_pretrain.mcore.model.layout import require_schedule
from distill_pretrain.planning.figures import quantity
from distill_pretrain.planning.memory import fullest_rank
from distill_pretrain.planning.parameters import num_parameters, rank_shapes
from distill_pretrain.planning.student_job import StudentJob
from distill_pretrain.processes.env import launch_world_size
from distill_pretrain.train.config import TrainConfig

if TYPE_CHECKING:
    from distill_pretrain.corpus.sequence_plan import SequencePlan
    from distill_pretrain.data.sources import SequenceData


def dry_run(recipe: Recipe, world_size: int | None) -> None:
    """Check a training job and say what it would be.

    Args:
        recipe: with data, model and train.
        world_size: processes; None takes the launcher's, or plan.gpus where there is no launcher.

    Raises:
        LayoutError: the layout does not fit the processes, or the job the GPUs.
        ConfigError: settings contradict each other, or the corpus's size is unknown.
        DistillPretrainError: corpus or cache are there and do not fit.
    """
    assert recipe.data and recipe.model and recipe.train
    if recipe.phases:
        for phase in phases_of(recipe):
            require_training(phase.recipe)
            say(f"phase {phase.name}")
            dry_run(phase.recipe, world_size)
        return
    if world_size is not None and world_size < 1:
        raise ConfigError("a job has at least one process", where="--world-size", found=world_size)
    if world_size is None and launch_world_size() == 1:
        world_size = plan_settings(recipe).gpus
    processes = world_size or launch_world_size()
    opened = _Opened()
    corpus = corpus_of(recipe, opened.plan)
    job = student_job(recipe, corpus, world_size=processes)
    require_schedule(recipe.optimizer, recipe.train.steps)
    _require_caches(recipe)
    say(f"dry run: {recipe.train.output_dir}, {processes} processes")
    for name, text in _facts(recipe, corpus, job, opened):
        say(f"  {name:<22}{text}")
    _require_room(recipe, corpus, job)
    say("nothing was loaded or written")


class _Opened:
    """The corpora of a dry run, each opened and planned once, however often it is asked for."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], SequenceData] = {}

    def sequences(self, data: DataConfig) -> SequenceData:
        """Call `open_sequences` of data.tokens, unless that has been done with the same settings."""
        from distill_pretrain.data.sources import open_sequences

        key = tuple(getattr(data, name) for name in _OF_SEQUENCES)
        if key not in self._found:
            self._found[key] = open_sequences(data)
        return self._found[key]

    def plan(self, data: DataConfig) -> SequencePlan | None:
        """Return the sequences of data.tokens; None where they are not here, or not what they should be."""
        if not _index(data).is_file():
            return None
        try:
            return self.sequences(data).plan
        except TokenDataError:  # said once the rest has been checked
            return None


_OF_SEQUENCES = (
    *("tokens", "vocab_size", "num_sequences"),
    *("seq_len", "seed", "documents", "packing"),
)
"""Keys of the section data that decide what `open_sequences` returns."""


def _index(data: DataConfig) -> Path:
    return data.tokens.with_name(f"{data.tokens.name}.idx")


def _require_caches(recipe: Recipe) -> None:
    from distill_pretrain.data.sources import require_caches

    assert recipe.data
    online = recipe.objective.target == "teacher"
    require_caches(recipe.data, 0.0 if online else recipe.objective.peak_kd_weight)


def _facts(
    recipe: Recipe, corpus: Corpus, job: StudentJob, opened: _Opened
) -> Iterator[tuple[str, str]]:
    assert recipe.data and recipe.train
    train = recipe.train
    yield "layout", f"{layout_text(job)}, data parallel {job.data_parallel}"
    whole = num_parameters(job.model, vocab_size=job.vocab_size, seq_len=job.seq_len)
    shares = [_share(job, stage) for stage in range(job.parallel.pipeline)]
    per_rank = f"{min(shares):,}" + (f" to {max(shares):,}" if min(shares) != max(shares) else "")
    yield "parameters", f"{whole:,}; per rank {per_rank}"
    tokens_per_step = train.global_batch_size * corpus.seq_len
    yield (
        "a step",
        f"{train.global_batch_size} sequences, {tokens_per_step:,} tokens, {job.num_micro_batches} micro-batches of "
        f"{train.micro_batch_size} per replica",
    )
    visited = train.steps * train.global_batch_size
    available = sum(_sequences(recipe, corpus))
    yield (
        "the run",
        f"{train.steps:,} steps, {quantity(train.steps * tokens_per_step, 'tokens')}, "
        f"{visited / available:.3g} epochs of {available:,} sequences",
    )
    memory = fullest_rank(job)
    for figure in memory_figures(job, memory):
        yield figure.name, f"{figure.shown} ({figure.basis})"
    yield from _start(recipe, opened)
    yield from _data(recipe, opened)


def _share(job: StudentJob, stage: int) -> int:
    from math import prod

    shapes = rank_shapes(
        job.model, job.parallel, vocab_size=job.vocab_size, seq_len=job.seq_len, stage=stage
    )
    return sum(map(prod, shapes))


def _sequences(recipe: Recipe, corpus: Corpus) -> Iterator[int]:
    """Sequences of every corpus of the blend; those of the others only where the recipe says."""
    assert recipe.data
    yield corpus.num_sequences
    for source in recipe.data.blend:
        yield source.num_sequences or 0


def _data(recipe: Recipe, opened: _Opened) -> Iterator[tuple[str, str]]:
    """Corpora and caches: opened and compared where they are there."""
    assert recipe.data
    from distill_pretrain.train.preflight import ignored_caches

    uses_cache = recipe.objective.target == "cache" and recipe.objective.peak_kd_weight > 0
    assert recipe.train
    for ignored in ignored_caches(recipe.data, recipe.objective, recipe.train):
        yield "cache", ignored
    yield from _held_out(recipe.data, recipe.train, opened)
    for source in recipe.data.sources:
        if not _index(source).is_file():
            yield "corpus", f"{source.tokens}: not here, not checked"
            if uses_cache:
                yield "cache", f"{source.cache}: not checked, for want of its corpus"
            continue
        from distill_pretrain.data.sources import open_cache

        sequences = opened.sequences(source)
        yield (
            "corpus",
            f"{source.tokens}: {sequences.num_sequences:,} sequences, ids in range; {sequences.plan.shares}",
        )
        if not uses_cache or source.cache is None:
            continue
        if "://" not in source.cache and not Path(source.cache).exists():
            yield "cache", f"{source.cache}: not here, not checked"
            continue
        with open_cache(source.cache, sequences) as cache:
            totals = cache.manifest.totals
        yield (
            "cache",
            f"{source.cache}: belongs to the corpus, {totals['entries_per_token']} entries and "
            f"{totals['bytes_per_token']} bytes per position",
        )


def _start(recipe: Recipe, opened: _Opened) -> Iterator[tuple[str, str]]:
    """The weights of train.start_from: opened and compared where they and the corpus are there."""
    assert recipe.data
    folder = start_folder(recipe)
    if folder is None:
        return
    absent = [path for path in (folder, _index(recipe.data)) if not path.exists()]
    if absent:
        yield "starts from", f"{folder}: not checked, for want of {', '.join(map(str, absent))}"
        return
    weights = open_start(recipe, opened.sequences(recipe.data))
    yield "starts from", f"{folder}: {weights.description}, of the student's architecture"


def _held_out(data: DataConfig, train: TrainConfig, opened: _Opened) -> Iterator[tuple[str, str]]:
    """What is scored while training, opened and compared where it is there."""
    from distill_pretrain.train.evaluation import open_held_out, require_held_out

    require_held_out(data, train)
    if train.eval_interval is None:
        return
    prefixes = [data.tokens, data.held_out_tokens]
    absent = [p for p in prefixes if p and not p.with_name(f"{p.name}.idx").is_file()]
    cache = data.held_out_cache
    if cache is not None and "://" not in cache and not Path(cache).exists():
        absent.append(Path(cache))
    if absent:
        yield "held out", f"not checked, for want of {', '.join(map(str, absent))}"
        return
    with open_held_out(data, train, opened.sequences(data)) as held_out:
        assert held_out is not None
        yield (
            "held out",
            f"{held_out.num_sequences:,} sequences every {train.eval_interval:,} steps",
        )


def _require_room(recipe: Recipe, corpus: Corpus, job: StudentJob) -> None:
    """Raise LayoutError where the estimate is above plan.gpu_memory_gb."""
    beside = online_teacher_bytes(recipe, corpus)
    memory = fullest_rank(job)
    settings = plan_settings(recipe)
    needed = needed_bytes(memory, settings, beside)
    room = settings.gpu_memory_gb * GB
    if needed > room:
        raise LayoutError(
            "by the planner's estimate the job does not fit its GPUs",
            where="parallel, train.micro_batch_size",
            found=f"{quantity(needed, 'B')} on a rank of stage {memory.stage}, {settings.gpu_reserve_gb:g} GB of it "
            "reserve",
            expected=f"at most {quantity(room, 'B')} (plan.gpu_memory_gb)",
            remedy="a smaller train.micro_batch_size, more tensor or pipeline parallelism, or "
            "parallel.distributed_optimizer; `distill-pretrain plan` compares layouts",
        )
