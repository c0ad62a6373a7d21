"""objective.target=teacher through the command line: it is the dense KL, under any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.cli.main import main

VOCAB_SIZE = 512  # of the corpus in conftest.py
TERMS = ("loss", "ce", "kl", "grad_norm")


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def online(run: Path, *more: str) -> list[str]:
    return [
        "objective.target=teacher",
        "objective.ce_weight=0.2",
        "objective.kd_weight=[[1, 0.2], [5, 0.8]]",
        f"train.output_dir={run}",
        "train.steps=6",
        *more,
    ]


@pytest.fixture(scope="module")
def one_process(job, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("online")
    job.cli("train", *online(run))
    return run


def assert_same_curves(found: Path, expected: Path) -> None:
    pairs = list(zip(records(found), records(expected), strict=True))
    assert len(pairs) == 6
    for a, b in pairs:
        assert [a[term] for term in TERMS] == pytest.approx([b[term] for term in TERMS], abs=5e-5)


def test_it_trains_as_from_a_cache_of_every_id_s_probability(job, one_process, tmp_path):
    everything = ("capture.sampler=topk", f"capture.num_draws={VOCAB_SIZE}")
    job.cli("capture", f"capture.output_dir={tmp_path / 'cache'}", *everything)
    cached = online(tmp_path / "run", "objective.target=cache", f"data.cache={tmp_path / 'cache'}")
    job.cli("train", *cached)
    assert_same_curves(one_process, tmp_path / "run")


def test_the_weights_follow_the_step_also_after_a_resume(job, one_process, tmp_path):
    for steps in (3, 6):
        job.cli("train", *online(tmp_path, f"train.steps={steps}"))
    assert_same_curves(tmp_path, one_process)
    for number, record in enumerate(records(tmp_path), 1):
        weight = 0.2 + 0.6 * min(1.0, (number - 1) / 4)
        expected = 0.2 * record["ce"] + weight * record["kl"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_it_trains_the_same_curves_under_another_layout(job, one_process, tmp_path, layout):
    job.run("train", *online(tmp_path, layout), num_processes=2)
    assert_same_curves(tmp_path, one_process)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_other_divergences_train(job, tmp_path, divergence):
    more = (f"objective.divergence={divergence}", "objective.ce_weight=0", "objective.z_loss=1e-4")
    job.cli("train", *online(tmp_path, *more, "objective.temperature=2", "train.steps=12"))
    first, last = records(tmp_path)[0], records(tmp_path)[-1]
    assert last["kl"] < 0.8 * first["kl"]
    assert last["z"] > 0


def test_a_run_does_not_go_on_with_another_teacher(job, one_process, tmp_path, capsys):
    job.cli("train", f"train.output_dir={tmp_path}", "train.steps=1")
    other = online(one_process, f"teacher.path={tmp_path}", "train.steps=9")
    assert main(["train", str(job.recipe), *other]) == 2
    error = capsys.readouterr().err
    assert "belongs to another run" in error and "teacher" in error and "Traceback" not in error


def test_a_teacher_of_another_vocabulary_is_refused(job, tmp_path, capsys):
    job.cli("train", f"train.output_dir={tmp_path / 'teacher'}", "train.steps=1")
    record = next((tmp_path / "teacher" / "checkpoints").glob("step-*")) / "checkpoint.json"
    text = record.read_text()
    assert f'"vocab_size":{VOCAB_SIZE}' in text
    record.write_text(text.replace(f'"vocab_size":{VOCAB_SIZE}', '"vocab_size":500'))
    other = online(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}")
    assert main(["train", str(job.recipe), *other]) == 2
    error = capsys.readouterr().err
    assert "500" in error and "vocabulary" in error and "Traceback" not in error
