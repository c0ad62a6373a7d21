"""Comparing: a teacher, its caches, students of several targets and seeds, their scores and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError, DistillPretrainError, InUse
from distill_pretrain.jobs.capture import capture_caches
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.evaluate import evaluate_models
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.train import require_training, train_model
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.jobs.comparison.plan import ComparisonPlan, StudentRun

_log = logging.getLogger(__name__)

CAPTURE_POLL_S = 5.0


class ComparisonStopped(DistillPretrainError):
    """One job of a comparison failed; names it."""


class _Stopped(Exception):
    """A training of the comparison was told to stop, and has saved."""


def compare(
    recipe: Recipe, *, cells: tuple[str, ...] = (), prepare_only: bool = False, command: str = ""
) -> bool:
    """Run, or go on with, the comparison of a recipe.

    Args:
        recipe: with the sections data, teacher, capture, model, train and compare.
        cells: train only these; none for those of compare.only, or all.
        prepare_only: stop once the teacher and the caches are ready.
        command: for the report: what made it.

    Returns:
        Whether a training was told to stop; the comparison ends with it.

    Raises:
        ComparisonStopped: one of its jobs failed.
        ConfigError: the recipe cannot be compared from.
    """
    require(recipe, "compare", "data", "teacher", "capture", "model", "train", "compare")
    from distill_pretrain.jobs.comparison.plan import ComparisonPlan
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.reports.picture import require_matplotlib

    require_matplotlib()
    plan = ComparisonPlan.of(recipe)
    _check_before_hours_of_work(plan)
    selected = plan.selected(cells or plan.compare.only)
    try:
        with process_group():
            _run(plan, selected, prepare_only=prepare_only, command=command)
    except _Stopped:
        return True
    return False


def _run(
    plan: ComparisonPlan, selected: Sequence[StudentRun], *, prepare_only: bool, command: str
) -> None:
    _prepare(plan)
    if prepare_only:
        say("the teacher and the caches are ready")
        return
    busy = _train(plan, selected)
    if not busy and len(selected) < len(plan.runs):
        busy = [run for run in plan.runs if not _is_finished(run)]
    if busy:
        left = "; ".join(map(str, busy))
        _log.info(f"no report yet; left to other jobs or to the next start: {left}")
        return
    try:
        for seed, job in plan.evaluations.items():
            with _stage(plan, f"evaluate seed {seed}"):
                evaluate_models(job)
        if launch_rank() == 0:
            _report(plan, command)
    except InUse as error:  # two jobs were the last at once
        _log.info(f"left to another job: {error}")


def _check_before_hours_of_work(plan: ComparisonPlan) -> None:
    """What the last stages need, and what every student would refuse."""
    from distill_pretrain.mcore.model.layout import check_layout, require_backend

    for run in plan.runs:
        require_training(run.recipe)
    for recipe in filter(None, (plan.teacher, plan.runs[0].recipe)):
        assert recipe.data and recipe.model and recipe.train
        check_layout(
            recipe.model,
            recipe.parallel,
            world_size=launch_world_size(),
            micro_batch_size=recipe.train.micro_batch_size,
            global_batch_size=recipe.train.global_batch_size,
            seq_len=recipe.data.seq_len,
            optimizer=recipe.optimizer,
        )
        require_backend(recipe.optimizer)
    assert plan.recipe.data
    if plan.recipe.data.held_out_tokens is None:
        raise ConfigError(
            "there is no held-out text to score the students on",
            where="data.held_out_tokens",
            expected="prefix of a .bin/.idx pair",
            remedy="`distill-pretrain tokenize` writes one, held_out, beside train",
        )
    other = next(iter(plan.evaluations.values())).eval
    if other is not None and other.out_of_domain_tokens is not None:
        from distill_pretrain.corpus.token_index import TokenIndex

        TokenIndex.open(other.out_of_domain_tokens)


def _prepare(plan: ComparisonPlan) -> None:
    """The teacher, and the cache of every target set."""
    if plan.teacher is not None:
        assert plan.teacher.train
        folder = plan.teacher.train.output_dir
        # One that another job is training is refused there, and the message says by whom.
        with _stage(plan, "train the teacher"):
            _guarded("the teacher", folder, partial(_train_one, plan.teacher))
    if plan.needs_cache:
        with _stage(plan, "capture"):
            assert plan.capture.capture
            folder = plan.capture.capture.output_dir
            _guarded("the capture", folder, partial(_capture, plan.capture))


def _train(plan: ComparisonPlan, runs: Sequence[StudentRun]) -> list[StudentRun]:
    """Train students until none is left that no other job holds; returns those held."""
    from distill_pretrain.checkpoint.ownership import lease

    waiting, progressed = list(runs), True
    while waiting and progressed:
        busy = []
        for run in waiting:
            with lease(run.folder) as mine:
                if not mine:
                    busy.append(run)
                    continue
                number = plan.runs.index(run) + 1
                _log.info(f"== {run} ({number} of {len(plan.runs)})")
                with _stage(plan, f"train {run}"):
                    _guarded(f"cell {run}", run.folder, partial(_train_one, run.recipe))
        progressed = len(busy) < len(waiting)
        waiting = busy
    return waiting


def _train_one(recipe: Recipe) -> None:
    from distill_pretrain.processes.process import released_groups

    with released_groups():
        if train_model(recipe):
            raise _Stopped


def _guarded(name: str, folder: Path, job: Callable[[], None]) -> None:
    """Do a job of the comparison; its error says which job it was."""
    try:
        job()
    except DistillPretrainError as error:
        raise ComparisonStopped(
            f"{name} failed: {error}",
            where=folder,
            remedy="what is finished is kept; mend the cause, or take the cell out of compare.cells, and start again",
        ) from error


def _is_finished(run: StudentRun) -> bool:
    """Whether the last checkpoint of a student is there; `train` compares its identity with the recipe."""
    from distill_pretrain.checkpoint.store import CheckpointStore
    from distill_pretrain.processes.process import on_first_rank

    assert run.recipe.train
    steps = run.recipe.train.steps

    def check() -> bool:
        newest = CheckpointStore(run.folder / "checkpoints").newest()
        return newest is not None and newest.step >= steps

    return on_first_rank(check)


def _capture(recipe: Recipe) -> None:
    """Capture until every cache is complete: another job may still hold shards, or have died with them."""
    import torch.distributed as dist

    from distill_pretrain.cache.names import MANIFEST_NAME
    from distill_pretrain.processes.process import on_first_rank

    assert recipe.capture and recipe.capture.sets
    manifests = [recipe.capture.output_dir / name / MANIFEST_NAME for name in recipe.capture.sets]
    while True:
        capture_caches(recipe)
        dist.barrier()
        if on_first_rank(lambda: all(path.is_file() for path in manifests)):
            return
        time.sleep(CAPTURE_POLL_S)


@contextmanager
def _stage(plan: ComparisonPlan, name: str) -> Iterator[None]:
    """Note how long a stage took, if it did anything worth noting."""
    from distill_pretrain.reports.comparison.journal import Stage

    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    if launch_rank() == 0:
        stage = Stage.now(name, seconds, processes=launch_world_size())
        stage.append_to(plan.compare.output_dir)


def _report(plan: ComparisonPlan, command: str) -> None:
    from distill_pretrain.files.ownership import owner_of, owning
    from distill_pretrain.reports.comparison.journal import read_stages
    from distill_pretrain.reports.comparison.report import write_comparison
    from distill_pretrain.reports.comparison.results import Comparison

    output_dir = plan.compare.output_dir
    folder = output_dir / "report"
    with owning(owner_of(folder), what=folder, remedy="wait for it"):
        path = write_comparison(
            Comparison.load(plan.specs, plan.figures),
            folder,
            title=plan.compare.title,
            command=command,
            stages=read_stages(output_dir),
        )
        dump_recipe(plan.recipe, folder / "recipe.yaml")
    say("report is in", path)
