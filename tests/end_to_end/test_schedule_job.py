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


def losses(run: Path) -> list[list[float]]:
    return [[record[term] for term in ("loss", "kl", "lr", "kd_weight")] for record in records(run)]


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


def test_muon_is_refused_by_name_before_the_first_phase(job, tmp_path, capsys):
    late = [{"name": "one"}, {"name": "two", "optimizer": {"algorithm": "muon"}}]
    for more in ("optimizer.algorithm=muon", f"phases={json.dumps(late)}"):
        for dry in ((), ("--dry-run",)):
            arguments = (f"train.output_dir={tmp_path / 'run'}", "train.steps=2", more)
            assert main(["train", str(job.recipe), *arguments, *dry]) == 2
            error = capsys.readouterr().err
            assert "optimizer.algorithm" in error and "Emerging-Optimizers" in error
            assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


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


WITH_DECAY = ("objective.kd_weight={stable: 0.9, decayed: 0.2}", "objective.ce_weight=0.5")


def test_a_weight_that_goes_with_the_decay_is_recorded_and_the_same_after_a_kill_and_in_phases(
    job, tmp_path
):
    data = (f"data.cache={job.cache}", "optimizer.wsd_decay_style=minus_sqrt")
    run, killed, phased = (tmp_path / name for name in ("run", "killed", "phased"))
    train(job, run, *WSD, *data, *WITH_DECAY)
    for record in records(run):
        left = (record["lr"] - 1e-4) / (5e-3 - 1e-4) if record["step"] > 4 else 1.0
        weight = 0.2 + left * (0.9 - 0.2)
        assert record["kd_weight"] == pytest.approx(weight, rel=1e-6)
        assert record["loss"] == pytest.approx(0.5 * record["ce"] + weight * record["kl"], rel=1e-5)
        assert "ce_weight" not in record
    assert records(run)[3]["kd_weight"] == 0.9 and records(run)[7]["kd_weight"] == 0.2

    # As if killed in the decay.
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints" / "step-00000008")
    train(job, killed, *WSD, *data, *WITH_DECAY)
    assert losses(killed) == losses(run)

    # A stable part with a plain weight, then a phase that decays.
    decay = {"decay_style": "wsd", "wsd_decay_steps": DECAY, "wsd_decay_style": "minus_sqrt"}
    phases = [
        {"name": "stable", "train": {"steps": STEPS - DECAY}},
        {
            "name": "decay",
            "optimizer": {**decay, "warmup_steps": 0},
            "objective": {"kd_weight": {"stable": 0.9, "decayed": 0.2}},
        },
    ]
    plain = (data[0], "objective.kd_weight=0.9", "objective.ce_weight=0.5")
    train(job, phased, *COMMON, *plain, f"phases={json.dumps(phases)}")
    assert losses(phased / "decay") == losses(run)[4:]
    assert curves(phased / "stable") == curves(run)[:4]


def test_a_branch_may_begin_to_change_a_weight_with_its_decay(job, tmp_path, capsys):
    run, branch = tmp_path / "run", tmp_path / "branch"
    data = f"data.cache={job.cache}"
    train(job, run, *WSD, data, *WITH_DECAY)
    plain = (data, "objective.kd_weight=0.9", "objective.ce_weight=0.5")
    train(job, branch, *COMMON, "optimizer.decay_style=constant", *plain, steps=STEPS - DECAY)
    train(job, branch, *WSD, data, *WITH_DECAY)
    assert curves(branch) == curves(run)
    arguments = (f"train.output_dir={branch}", f"train.steps={STEPS}", *WSD, data, *WITH_DECAY)
    more = "objective.kd_weight={stable: 0.9, decayed: 0.1}"
    assert main(["train", str(job.recipe), *arguments, "train.steps=9", more]) == 2
    assert "objective.kd_weight.decayed: checkpoint 0.2, this run 0.1" in capsys.readouterr().err


def test_a_weight_that_goes_with_a_decay_that_is_none_is_refused(job, tmp_path, capsys):
    plain = ("optimizer.decay_style=constant", f"data.cache={job.cache}", *WITH_DECAY)
    late = [
        {"name": "one", "optimizer": {"decay_style": "linear"}},
        {"name": "two", "optimizer": {"decay_style": "constant"}},
    ]
    for more in (plain, (*plain, f"phases={json.dumps(late)}")):
        for dry in ((), ("--dry-run",)):
            arguments = (f"train.output_dir={tmp_path / 'run'}", *more)
            assert main(["train", str(job.recipe), *arguments, *dry]) == 2
            error = capsys.readouterr().err
            assert "objective.kd_weight" in error and "does not decay" in error
            assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
