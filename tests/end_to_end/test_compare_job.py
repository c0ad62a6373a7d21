"""A comparison through the command line: equal starts, resume after kill -9, one report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.cli.main import main
from distill_pretrain.errors import TeacherError
from distill_pretrain.jobs.comparison import run as comparison
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.reports.results import EvalResults
from tests.support.jobs import Job, kill_all

SEEDS = (1, 2)
STEPS = 6
CELLS = {
    "ce": {"objective": {"ce_weight": 1.0, "kd_weight": 0.0}},
    "full-kd": {"objective": {"ce_weight": 0.0, "kd_weight": 1.0, "target": "teacher"}},
    "topk-3": {
        "set": "topk-3",
        "objective": {"ce_weight": 0.0, "kd_weight": 1.0, "residual": "renormalise"},
    },
    "systematic-9": {"set": "systematic-9", "objective": {"ce_weight": 0.0, "kd_weight": 1.0}},
}


def make_comparison(folder: Path, tokens: Path) -> Job:
    """The small job of the other tests, with the sections of a comparison; its teacher is trained by it."""
    job = Job(folder, tokens)
    values = yaml.safe_load(job.recipe.read_text())
    values["capture"] = {
        key: value for key, value in values["capture"].items() if key != "num_draws"
    } | {
        "sets": {
            "topk-3": {"sampler": "topk", "num_draws": 3},
            "systematic-9": {"sampler": "systematic", "num_draws": 9},
        }
    }
    values["train"] |= {"steps": STEPS, "checkpoint_interval": 3}
    values["compare"] = {
        "output_dir": str(folder / "compare"),
        "seeds": list(SEEDS),
        "cells": CELLS,
        "teacher": {"train": {"steps": 25, "seed": 77}},
        "eval": {
            "num_sequences": 8,
            "out_of_domain_tokens": values["data"]["tokens"],
            "copying": {"num_sequences": 3, "length": 8},
        },
    }
    job.recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    return job


def run_folder(job: Job, cell: str, seed: int) -> Path:
    return job.folder / "compare/cells" / cell / f"seed-{seed}"


def runs(job: Job) -> list[Path]:
    return [run_folder(job, cell, seed) for seed in SEEDS for cell in CELLS]


def curve(run: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["ce"], r["grad_norm"]) for r in records]


def finished(run: Path) -> bool:
    newest = CheckpointStore(run / "checkpoints").newest()
    return newest is not None and newest.step == STEPS


def times(run: Path) -> dict[Path, int]:
    files = [run / "metrics.jsonl", *run.glob("checkpoints/*/*")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def unbroken(tokens, tmp_path_factory) -> Job:
    job = make_comparison(tmp_path_factory.mktemp("unbroken"), tokens)
    job.run("compare", num_processes=2)
    return job


@pytest.mark.slow
def test_the_cells_of_a_seed_begin_with_equal_weights_and_batches(unbroken):
    first = {
        (cell, seed): curve(run_folder(unbroken, cell, seed))[0][2]
        for cell in CELLS
        for seed in SEEDS
    }
    for seed in SEEDS:
        assert len({first[cell, seed] for cell in CELLS}) == 1
    assert first["ce", 1] != first["ce", 2]
    second = {curve(run_folder(unbroken, cell, 1))[1][2] for cell in CELLS}
    assert len(second) == len(CELLS)


@pytest.mark.slow
def test_one_command_ends_in_a_report(unbroken):
    report = (unbroken.folder / "compare/report/report.md").read_text()
    for cell in CELLS:
        assert f"| {cell} |" in report
    assert "4 cells x 2 seeds" in report
    assert "equal in every cell of a seed" in report
    assert "FullKD is better than CE: **" in report
    assert "## Out of domain, and copying from context" in report
    assert "torchrun --nproc-per-node=2 -m distill_pretrain compare" in report
    assert (unbroken.folder / "compare/report/loss_unique_ids.png").stat().st_size > 10_000
    assert (unbroken.folder / "compare/report/recipe.yaml").is_file()


@pytest.mark.slow
def test_a_killed_comparison_goes_on_without_training_anything_twice(unbroken, tokens, tmp_path):
    job = make_comparison(tmp_path, tokens)
    process = job.start("compare", num_processes=2)
    third = run_folder(job, "topk-3", 1)
    deadline = time.monotonic() + 240
    # Two students done, the third beyond its first checkpoint.
    while not (third / "metrics.jsonl").exists() or len(curve_so_far(third)) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    kill_all(process)
    done = [run for run in runs(job) if finished(run)]
    assert run_folder(job, "ce", 1) in done and run_folder(job, "topk-3", 2) not in done
    before = {run: times(run) for run in done}
    job.run("compare", num_processes=2)
    assert {run: times(run) for run in done} == before
    for mine, theirs in zip(runs(job), runs(unbroken), strict=True):
        assert curve(mine) == curve(theirs)
    for seed in SEEDS:
        a, b = (
            EvalResults.load(j.folder / f"compare/eval/seed-{seed}.json") for j in (job, unbroken)
        )
        assert a.scores == b.scores


def curve_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_a_share_of_the_cells_is_trained_and_the_report_left_to_the_last(tokens, tmp_path):
    job = make_comparison(tmp_path, tokens)
    quick = ["compare.seeds=[1]", "train.steps=2"]
    shares = [["--prepare"], ["--cells", "ce,topk-3"], ["--cells", "full-kd,systematic-9"]]
    report = job.folder / "compare/report/report.md"
    for share in shares:
        assert not report.exists()
        job.cli("compare", *quick, *share)
    assert report.exists()


@pytest.mark.slow
def test_a_failing_cell_is_named_and_finished_ones_are_kept(tokens, tmp_path, capsys, monkeypatch):
    job = make_comparison(tmp_path, tokens)
    quick = ["compare.seeds=[1]", "train.steps=2"]
    job.cli("compare", *quick, "--cells", "ce")
    sound = comparison.train_model

    def failing(recipe: Recipe) -> bool:
        if recipe.train.output_dir.parent.name == "topk-3":
            raise TeacherError("the loss is not finite")
        return sound(recipe)

    monkeypatch.setattr(comparison, "train_model", failing)
    capsys.readouterr()
    before = times(run_folder(job, "ce", 1))
    assert main(["compare", str(job.recipe), *quick]) == 2
    error = capsys.readouterr().err
    assert "cell topk-3, seed 1 failed" in error and "Traceback" not in error
    assert times(run_folder(job, "ce", 1)) == before
