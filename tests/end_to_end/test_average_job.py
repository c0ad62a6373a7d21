"""Averaged weights through the command line: evaluated and exported beside the last ones, exact after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill_pretrain.cli.main import main
from tests.support.jobs import Job, run_cli

STEPS, DECAY = 6, 0.7


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[dict[str, Any]]:
    names = ("loss", "grad_norm", "held_out_ce", "held_out_ce_ema")
    return [{name: record.get(name) for name in names} for record in records(run)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}


def train(job: Job, run: Path, start: Path, *more: str, steps: int = STEPS) -> None:
    job.cli(
        "train",
        f"train.output_dir={run}",
        f"train.steps={steps}",
        f"train.start_from={start}",
        "train.eval_interval=3",
        "train.eval_sequences=8",
        "train.export_interval=1",
        "train.checkpoint_interval=2",
        f"optimizer.ema_decay={DECAY}",
        "train.keep_checkpoints=3",
        *more,
    )


@pytest.fixture(scope="module")
def start(job, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "hf"
    run_cli("export", str(job.teacher), str(folder))
    return folder


@pytest.fixture(scope="module")
def run(job, start, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("averaged")
    train(job, run, start)
    return run


def export_of(run: Path, step: int, kind: str = "hf") -> Path:
    return run / kind / f"step-{step:08d}"


def test_the_average_is_evaluated_and_exported_beside_the_last_weights(job, run, start, tmp_path):
    expected = tensors(start)
    for step in range(1, STEPS + 1):
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        for name, now in tensors(export_of(run, step)).items():
            expected[name].lerp_(now, share)
    averaged = tensors(export_of(run, STEPS, "hf-ema"))
    assert averaged.keys() == expected.keys()
    for name, values in averaged.items():
        assert torch.allclose(values, expected[name], rtol=0, atol=1e-7), name
        assert not torch.allclose(values, tensors(export_of(run, STEPS))[name], rtol=0, atol=1e-5)
    # After the fact, from the checkpoint.
    run_cli("export", str(run), str(tmp_path / "ema"), "--weights", "ema")
    assert tensors(tmp_path / "ema").keys() == averaged.keys()
    assert all(torch.equal(v, averaged[name]) for name, v in tensors(tmp_path / "ema").items())
    # Its held-out figure is that of a student with these weights.
    job.cli(
        "train",
        f"train.output_dir={tmp_path / 'scored'}",
        f"train.start_from={tmp_path / 'ema'}",
        "train.steps=1",
        "optimizer.warmup_steps=1000000000",
        "train.eval_interval=1",
        "train.eval_sequences=8",
    )
    (scored,) = records(tmp_path / "scored")
    last = figures(run)[-1]
    assert scored["held_out_ce"] == pytest.approx(last["held_out_ce_ema"], rel=1e-6)
    assert abs(last["held_out_ce_ema"] - last["held_out_ce"]) > 1e-4


def test_a_resumed_average_is_the_unbroken_one(job, run, start, tmp_path):
    train(job, tmp_path, start, steps=2)
    train(job, tmp_path, start)
    # The first start's last step is evaluated, too.
    assert figures(tmp_path)[2:] == figures(run)[2:]
    files = [export_of(r, STEPS, "hf-ema") / "model.safetensors" for r in (tmp_path, run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_mean_of_checkpoints_is_exported(run, tmp_path):
    run_cli("export", str(run), str(tmp_path / "mean"), "--mean-of", "3")
    steps = [tensors(export_of(run, step)) for step in (2, 4, 6)]
    for name, values in tensors(tmp_path / "mean").items():
        expected = sum(step[name] for step in steps) / 3
        assert torch.allclose(values, expected, rtol=0, atol=1e-7), name


def test_averages_that_are_not_there_are_refused(job, run, start, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, said in (
        ((str(job.teacher), out, "--weights", "ema"), "the run kept no moving average"),
        ((str(run), out, "--mean-of", "4"), "the run does not have so many checkpoints"),
        ((str(run), out, "--mean-of", "2", "--weights", "ema"), "a mean of checkpoints is one of"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    # An average that the run did not keep from its start is not kept from its middle.
    arguments = [f"train.output_dir={run}", "train.steps=7", f"train.start_from={start}"]
    assert main(["train", str(job.recipe), *arguments]) == 2
    assert "optimizer.ema_decay: checkpoint 0.7, this run null" in capsys.readouterr().err
    # A folder of one kind of weights is not replaced by another.
    run_cli("export", str(run), out, "--weights", "ema")
    assert main(["export", str(run), out]) == 2
    assert "is not an export of this checkpoint" in capsys.readouterr().err
