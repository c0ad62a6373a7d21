"""Training with DeepSpeed through the command line: resume under another ZeRO stage, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.mcore.model import layout
from tests.support.jobs import Job

ZERO = ["optimizer.backend=deepspeed"]


@pytest.fixture
def plain_job(tokens: Path, tmp_path: Path) -> Job:
    """A recipe without a teacher."""
    return Job(tmp_path, tokens)


def losses(run: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["ce"], r["grad_norm"]) for r in records]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_to_the_losses_of_the_megatron_optimizer(plain_job):
    pytest.importorskip("deepspeed")
    run, whole = plain_job.folder / "run", plain_job.folder / "whole"
    plain_job.cli("train", *ZERO, "optimizer.zero_stage=2", "train.steps=5")
    output = plain_job.run("train", *ZERO, "optimizer.zero_stage=3", num_processes=2)
    assert "resumed at step 5" in output
    assert "[WARNING]" not in output and "Exception ignored" not in output
    plain_job.cli("train", f"train.output_dir={whole}")
    assert len(losses(run)) == 12
    for step, expected in zip(losses(run), losses(whole), strict=True):
        assert step == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.pipeline=2", *ZERO], "parallel.pipeline = 2 does not work with optimizer.back"),
        (["parallel.distributed_optimizer=true", *ZERO], "ZeRO shards the optimizer state already"),
        (["optimizer.zero_stage=2"], "only for backend: deepspeed, not megatron"),
        (["optimizer.offload=true"], "offload: only for backend: deepspeed"),
        (["optimizer.zero_stage=4", *ZERO], "optimizer.zero_stage"),
    ],
)
def test_what_does_not_fit_is_refused(plain_job, capsys, overrides, expected):
    assert main(["train", str(plain_job.recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_a_missing_deepspeed_is_named_with_what_installs_it(plain_job, capsys, monkeypatch):
    monkeypatch.setattr(layout.importlib.util, "find_spec", lambda name: None)
    assert main(["train", str(plain_job.recipe), *ZERO]) == 2
    assert "pip install 'distill-pretrain[deepspeed]'" in capsys.readouterr().err
    assert not (plain_job.folder / "run").exists()
