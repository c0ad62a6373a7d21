"""Training through the command line: exact resume after kill -9, other layouts, refusals."""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path

import pytest

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.cli.main import main
from distill_pretrain.files import disk, ownership
from distill_pretrain.files.ownership import owner_of
from tests.support.jobs import Job, kill_all
from tests.support.owner import owned_elsewhere


def losses(run: Path) -> list[tuple[int, float, float, float | None, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["ce"], r["kl"], r["grad_norm"]) for r in records]


def kd(job, run: Path, *more: str) -> list[str]:
    return [
        f"data.cache={job.cache}",
        "objective.ce_weight=0.2",
        "objective.kd_weight=0.8",
        "model.dropout=0.1",  # random streams must resume too
        f"train.output_dir={run}",
        *more,
    ]


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken")
    job.run("train", *kd(job, run, "parallel.tensor=2", "train.profile=[2,2]"), num_processes=2)
    return run


def test_every_rank_writes_its_own_profile(unbroken):
    found = {path.name for path in (unbroken / "profile").iterdir()}
    assert found == {f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")}


def killed_after_a_checkpoint(job, folder: Path) -> Path:
    """A run that was killed two steps or more beyond its checkpoint of step 5, and before its last.

    Where this process gets no time between two looks, its victim ends before the blow: then another run is started.
    """
    for attempt in range(10):
        run = folder / str(attempt)
        process = job.start("train", *kd(job, run, "parallel.tensor=2"), num_processes=2)
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n") >= 7):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no seventh step"
            time.sleep(0.002)
        kill_all(process)
        if len(losses(run)) < 12:
            return run
    pytest.fail("killed too late to show anything, ten times")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_losses_of_the_unbroken_run(job, unbroken, tmp_path):
    run = killed_after_a_checkpoint(job, tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a torn last line
    output = job.run("train", *kd(job, run, "parallel.tensor=2"), num_processes=2)
    assert "resumed at step" in output
    assert losses(run) == losses(unbroken)
    assert len(losses(unbroken)) == 12


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(job, tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    no_dropout = "model.dropout=0.0"
    job.cli("train", *kd(job, whole, no_dropout))
    job.run(
        "train",
        *kd(job, moved, no_dropout, "train.steps=5", "parallel.context=2"),
        num_processes=2,
    )
    job.run("train", *kd(job, moved, no_dropout, "parallel.pipeline=2"), num_processes=2)
    for a, b in zip(losses(whole), losses(moved), strict=True):
        assert a[0] == b[0]
        assert a[1:] == pytest.approx(b[1:], abs=2e-5)


def exported(run: Path) -> dict[str, bytes]:
    """The weights of a run's last export, by the file."""
    newest = max((run / "hf").iterdir())
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.skipif(
    metadata.version("megatron-core").startswith(("0.16.", "0.17.", "0.18.")),
    reason="HybridModel needs megatron-core 0.19 or later, and so Python 3.12",
)
def test_a_run_changes_its_model_class_and_ends_with_the_same_losses_and_export(tokens, tmp_path):
    job, whole, moved = Job(tmp_path, tokens), tmp_path / "whole", tmp_path / "moved"
    settings = (
        "train.steps=6",
        "train.checkpoint_interval=2",
        "train.export_interval=6",
        "model.dropout=0.1",
    )
    job.cli("train", f"train.output_dir={whole}", *settings)
    for steps, implementation in ((2, "hybrid"), (4, "gpt"), (6, "hybrid")):
        changed = (f"train.steps={steps}", f"model.implementation={implementation}")
        job.cli("train", f"train.output_dir={moved}", *settings, *changed)
    assert len(losses(whole)) == 6 and losses(moved) == losses(whole)
    assert exported(whole) and exported(moved) == exported(whole)


def test_a_model_class_that_megatron_core_lacks_is_refused(tokens, tmp_path, capsys, monkeypatch):
    job = Job(tmp_path, tokens)
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.2")
    arguments = [f"train.output_dir={tmp_path / 'run'}", "model.implementation=hybrid"]
    assert main(["train", str(job.recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert "model.implementation" in error and "megatron-core 0.18.2" in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone(job, unbroken, capsys):
    before = (unbroken / "metrics.jsonl").stat().st_mtime_ns
    job.run("train", *kd(job, unbroken, "parallel.tensor=2"), num_processes=2)
    assert (unbroken / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_checkpoint_of_another_run_is_refused_by_field(job, unbroken, capsys):
    arguments = kd(job, unbroken, "model.hidden_size=64", "train.steps=20")
    assert main(["train", str(job.recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint belongs to another run" in error and "hidden_size" in error
    assert "Traceback" not in error


def test_a_run_folder_has_one_owner(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    with owned_elsewhere(owner_of(tmp_path / "run")) as holder:
        assert main(["train", str(job.recipe), *kd(job, tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert (
        f"process {holder.pid} on node7, since 2026-09-21" in error and "train.output_dir" in error
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".owner"]


def test_room_for_a_checkpoint_is_asked_for_before_the_first_step(
    job, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    assert main(["train", str(job.recipe), f"train.output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"no room for a checkpoint; where: {tmp_path / 'checkpoints'}" in error
    assert "1,000 bytes free" in error and "Traceback" not in error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_bit_flipped_in_the_newest_checkpoint_costs_its_steps_only(job, tmp_path, capsys):
    run = (f"train.output_dir={tmp_path}", "train.checkpoint_interval=2", "optimizer.decay_steps=6")
    job.cli("train", *run, "train.steps=4")
    whole = CheckpointStore(tmp_path / "checkpoints").newest()
    losses = (tmp_path / "metrics.jsonl").read_text().splitlines()[3]
    victim = next(whole.folder.glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    job.cli("train", *run, "train.steps=6", f"data.cache={job.cache}")
    said = capsys.readouterr().err
    assert f"not read, since objective.kd_weight is 0: {job.cache}" in said
    assert "WARNING" in said and victim.name in said and "resumed at step 2" in said
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(again) == 6 and json.loads(again[3])["loss"] == json.loads(losses)["loss"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_attention_heads=3", "model.num_query_groups=3"], "model.hidden_size"),
        (["parallel.tensor=2"], "not tensor x pipeline x context x data parallel"),
        (["model.num_layers=3", "parallel.pipeline=2"], "model.num_layers = 3"),
        (["objective.kd_weight=1.0"], "data.cache"),
        (["objective.kernel=cuda"], "the loss cannot be computed by CUDA kernels"),
        (["data.seq_len=100000000"], "seq_len"),
        (["data.num_sequences=100000000"], "data.num_sequences"),
        (["data.vocab_size=300"], "data.vocab_size"),
        (["train.setps=3"], "train.steps"),
        (["data.tokens=nowhere/train", "data.vocab_size=512"], "nowhere/train"),
    ],
)
def test_a_users_mistake_is_one_clear_message(job, tmp_path, capsys, overrides, expected):
    status = main(["train", str(job.recipe), f"train.output_dir={tmp_path / 'run'}", *overrides])
    captured = capsys.readouterr()
    assert status == 2
    assert expected in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()
