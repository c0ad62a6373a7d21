"""`distill-pretrain compare`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli import capture, eval, train
from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError, DistillPretrainError, InUse
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.cli.compare_plan import ComparisonPlan, StudentRun

CAPTURE_POLL_S = 5.0

SECTIONS = (
    "data",
    "teacher",
    "capture",
    "model",
    "parallel",
    "optimizer",
    "objective",
    "train",
    "compare",
)
HELP = """
Compares ways to learn from a teacher, from one recipe: trains the teacher if told to, captures every target set in
one pass, trains a student per cell and seed from equal initial weights on equal batches, scores all of them on
held-out text, and reports tables, differences with their errors over seeds, and pictures.

Reads   data.tokens, data.held_out_tokens, teacher.path (or compare.teacher, to train it into that folder)
Writes  capture.output_dir/SET, compare.output_dir: cells/CELL/seed-N (runs), eval/seed-N.json, report/report.md

Started again it goes on where it stopped: finished students are left alone, a killed one resumes from its checkpoint.
Several jobs may share the work: each takes students that no other is training, or only those of --cells; start them
once a first job with --prepare has the teacher and the cache ready. The last to finish scores and reports.
train.output_dir and train.seed are replaced for every student.

Example
  distill-pretrain compare recipe.yaml
  torchrun --nproc-per-node=2 -m distill_pretrain compare recipe.yaml --cells ce,full-kd

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 256}
    teacher: {path: runs/teacher}
    capture: {output_dir: runs/compare/cache}
    model: {num_layers: 2, hidden_size: 128, ffn_hidden_size: 320, num_attention_heads: 4}
    train: {output_dir: runs/compare, steps: 400, global_batch_size: 16}
    compare: {output_dir: runs/compare, seeds: [1, 2, 3]}
"""


class ComparisonStopped(DistillPretrainError):
    """One job of a comparison failed; names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options beside the recipe."""
    parser.add_argument(
        "--cells", metavar="NAME,...", default="", help="train only these cells (as compare.only)"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="stop once the teacher and the caches are ready"
    )


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Runs, or goes on with, the comparison of a recipe."""
    require(recipe, "compare", "data", "teacher", "capture", "model", "train", "compare")
    from distill_pretrain.cli.compare_plan import ComparisonPlan
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.reports.picture import require_matplotlib

    require_matplotlib()
    plan = ComparisonPlan.of(recipe)
    _check_before_hours_of_work(plan)
    named = tuple(name for name in args.cells.split(",") if name)
    selected = plan.selected(named or plan.compare.only)
    with process_group():
        _prepare(plan)
        if args.prepare:
            say("the teacher and the caches are ready")
            return
        busy = _train(plan, selected)
        if not busy and len(selected) < len(plan.runs):
            busy = [run for run in plan.runs if not _is_finished(run)]
        if busy:
            say(
                "no report yet; left to other jobs or to the next start:", "; ".join(map(str, busy))
            )
            return
        try:
            for seed, job in plan.evaluations.items():
                with _stage(plan, f"evaluate seed {seed}"):
                    eval.run(job, args)
            if launch_rank() == 0:
                _report(plan, args)
        except InUse as error:  # two jobs were the last at once
            say(f"left to another job: {error}")


def _check_before_hours_of_work(plan: ComparisonPlan) -> None:
    """What the last stages need, and what every student would refuse."""
    from distill_pretrain.mcore.model.layout import check_layout, require_backend

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
                say(f"\n== {run} ({number} of {len(plan.runs)})")
                with _stage(plan, f"train {run}"):
                    _guarded(f"cell {run}", run.folder, partial(_train_one, run.recipe))
        progressed = len(busy) < len(waiting)
        waiting = busy
    return waiting


def _train_one(recipe: Recipe) -> None:
    from distill_pretrain.processes.process import released_groups

    with released_groups():
        train.run(recipe, argparse.Namespace())


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
        capture.run(recipe, argparse.Namespace())
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


def _report(plan: ComparisonPlan, args: argparse.Namespace) -> None:
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
            command=_command(args),
            stages=read_stages(output_dir),
        )
        dump_recipe(plan.recipe, folder / "recipe.yaml")
    say("report is in", path)


def _command(args: argparse.Namespace) -> str:
    import shlex

    processes = launch_world_size()
    start = f"torchrun --nproc-per-node={processes} -m distill_pretrain"
    words = ["compare", args.recipe, *args.overrides]
    return " ".join([start if processes > 1 else "distill-pretrain", *map(shlex.quote, words)])
