"""Warm-up, stable, decay through the command line: decays that branch off a stable part, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill_pretrain.cli.main import main
from tests.support.jobs import Job

STEPS, DECAY = 8, 4
COMMON = ("optimizer.min_lr=1e-4", "train.checkpoint_interval=2", "train.keep_checkpoints=9")
WSD = (*COMMON, "optimizer.decay_style=wsd", f"optimizer.wsd_decay_steps={DECAY}")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves(run: Path) -> list[list[float]]:
    return [[record[term] for term in ("loss", "grad_norm", "lr")] for record in records(run)]


def train(job: Job, run: Path, *more: str, steps: int = STEPS) -> None:
    job.cli("train", f"train.output_dir={run}", f"train.steps={steps}", *more)


@pytest.fixture(scope="module")
def at_once(job, tmp_path_factory) -> Path:
    """A run that decays after step four."""
    run = tmp_path_factory.mktemp("wsd")
    train(job, run, *WSD)
    return run


@pytest.mark.parametrize("stable", ["longer", "constant"])
def test_a_branch_of_the_stable_part_decays_as_the_run_that_decayed_at_once(
    job, at_once, tmp_path, stable
):
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    schedule = (*WSD, "optimizer.decay_steps=90", "optimizer.wsd_decay_style=cosine")
    if stable == "constant":
        schedule = (*COMMON, "optimizer.decay_style=constant")
    train(job, trunk, *schedule, steps=STEPS - DECAY + 2)
    # The last checkpoint before the decay begins; the trunk has gone on since.
    shutil.copytree(trunk, branch)
    shutil.rmtree(branch / "checkpoints" / "step-00000006")
    assert (branch / "checkpoints" / "step-00000004").is_dir()
    train(job, branch, *WSD)
    assert curves(branch) == curves(at_once)


def test_a_decay_that_has_begun_ends_as_it_began(job, at_once, capsys):
    for more, said in (
        (("optimizer.decay_steps=90",), "optimizer.decay_steps: checkpoint 8, this run 90"),
        (("optimizer.wsd_decay_style=cosine",), "optimizer.wsd_decay_style: checkpoint linear"),
    ):
        arguments = (f"train.output_dir={at_once}", "train.steps=9", *WSD, *more)
        if "optimizer.decay_steps=90" not in more:
            arguments = (*arguments, f"optimizer.decay_steps={STEPS}")
        assert main(["train", str(job.recipe), *arguments]) == 2
        assert said in capsys.readouterr().err


def test_schedules_that_cannot_be_are_refused(job, tmp_path, capsys):
    for more, said in (
        ((*WSD, "optimizer.wsd_decay_steps=7"), "the decay would begin before the warm-up"),
        (("optimizer.decay_style=wsd",), "wsd needs the length of its decay"),
        (("optimizer.wsd_decay_steps=7",), "wsd needs the length of its decay"),
    ):
        for dry in ((), ("--dry-run",)):
            arguments = (f"train.output_dir={tmp_path / 'run'}", f"train.steps={STEPS}", *more)
            assert main(["train", str(job.recipe), *arguments, *dry]) == 2
            error = capsys.readouterr().err
            assert said in error and "Traceback" not in error
