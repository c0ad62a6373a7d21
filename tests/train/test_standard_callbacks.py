"""The callbacks that every training has, one by one: when each acts, on which rank, and what it keeps."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_pretrain.train.callbacks import Callback, Verdict
from distill_pretrain.train.config import BadStepsConfig, TrainConfig
from distill_pretrain.train.exports import RunExports
from distill_pretrain.train.guard import BadSteps
from distill_pretrain.train.metrics import EventLog, Metrics, MetricsLog
from distill_pretrain.train.profiling import StepProfile
from distill_pretrain.train.saving import Saver
from distill_pretrain.train.standard import Console, standard_callbacks
from distill_pretrain.train.trackers import Tracking
from tests.support.notices import noted


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(output_dir=folder, global_batch_size=4, **settings)


def record(step: int) -> dict[str, Any]:
    terms = {"loss": 2.0, "ce": 2.0, "kl": None, "grad_norm": 1.0}
    return {"step": step, **terms, "lr": 1e-3, "tokens_per_second": 10.0}


def silent(what: str) -> None:
    pass


def standard(folder: Path, *, is_first: bool, **settings: Any) -> list[Callback]:
    nothing: Any = None
    return standard_callbacks(
        nothing,
        nothing,
        identity={},
        config=config(folder, **settings),
        events=EventLog(None),
        device=torch.device("cpu"),
        is_first=is_first,
    )


def test_lines_come_every_few_steps_and_after_the_last(tmp_path: Path) -> None:
    console = Console(config(tmp_path, steps=7, log_interval=3))
    with noted() as said:
        for step in range(1, 8):
            console.end_step(step, record(step), silent)
    assert [line.split()[1] for line in said] == ["3/7", "6/7", "7/7"]


@pytest.mark.parametrize(("stops_at", "saved"), [(None, [2, 4, 5]), (3, [2, 3])])
def test_checkpoints_come_every_few_steps_and_where_training_ends(
    tmp_path: Path, stops_at: int | None, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Saver, "save", lambda self, step, progress, doing: steps.append(step))
    saver = standard(tmp_path, is_first=True, steps=5, checkpoint_interval=2)[-1]
    assert isinstance(saver, Saver)
    trainer: Any = SimpleNamespace(stopping=False, progress=lambda step: {}, most={"writing": 0.0})
    saver.trainer = trainer
    for step in range(1, 1 + (stops_at or 5)):
        trainer.stopping = step == stops_at
        saver.end_step(step, record(step), silent)
    assert steps == saved


def test_only_the_first_rank_writes_what_a_run_logs(tmp_path: Path) -> None:
    for is_first in (False, True):
        folder = tmp_path / f"{is_first}"
        folder.mkdir()
        callbacks = standard(folder, is_first=is_first, steps=2, track=["prometheus"])[:-1]
        for callback in callbacks:
            callback.begin(0)
        for callback in callbacks:
            callback.end_step(1, record(1), silent)
            callback.before_save(1)
        for callback in callbacks:
            callback.settle(silent)
            callback.end()
        written = sorted(path.name for path in folder.iterdir())
        assert written == (["metrics.jsonl", "metrics.prom"] if is_first else [])


def test_records_are_durable_before_a_checkpoint_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[list[int]] = []

    def note(self: MetricsLog) -> None:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        synced.append([json.loads(line)["step"] for line in lines])

    monkeypatch.setattr(MetricsLog, "sync", note)
    callbacks = standard(tmp_path, is_first=True, steps=2)[:-1]
    for callback in callbacks:
        callback.begin(0)
    for step in (1, 2):
        for callback in callbacks:
            callback.end_step(step, record(step), silent)
        for callback in callbacks:
            callback.before_save(step)
    for callback in callbacks:
        callback.end()
    assert synced == [[1], [1, 2]]


def test_a_log_is_closed_before_a_rollback_and_at_the_end(tmp_path: Path) -> None:
    def is_open() -> bool:
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return str((tmp_path / "metrics.jsonl").resolve()) in links

    for finish in ("settle", "end"):
        metrics = Metrics(tmp_path / "metrics.jsonl", EventLog(None))
        metrics.begin(0)
        assert is_open()
        metrics.settle(silent) if finish == "settle" else metrics.end()
        assert not is_open()


def test_trackers_write_out_what_waits_before_a_checkpoint_is_made(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "metrics.jsonl").write_text("")
    tracking = Tracking(["tensorboard"], tmp_path, {})
    tracking.begin(0)
    tracking.end_step(1, {**record(1), "time": 1.0}, silent)
    tracking.before_save(1)
    # As where the job is killed now: nothing is closed before it is read.
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == [1]
    tracking.end()


@pytest.mark.parametrize("has_average", [False, True])
def test_weights_are_gathered_before_they_are_exported(has_average: bool) -> None:
    done: list[str] = []

    @contextmanager
    def in_place() -> Iterator[None]:
        done.append("average")
        yield
        done.append("weights")

    def write(step: int, chunks: Any, *, weights: str = "last") -> None:
        done.append(f"export {step}, {weights}")

    exports: Any = SimpleNamespace(is_due=lambda step: step == 2, write=write)
    student: Any = SimpleNamespace(
        chunks=[],
        gather_weights=lambda: done.append("gather"),
        average=SimpleNamespace(in_place=in_place) if has_average else None,
    )
    exporting = RunExports.of(exports, student)
    for step in (1, 2, 3):
        exporting.after_step(step, silent)
    of_average = ["average", "export 2, ema", "weights"] if has_average else []
    assert done == ["gather", "export 2, last", *of_average]


def seen(loss: float) -> Any:
    return SimpleNamespace(terms=torch.tensor([loss, 100.0, 100.0]), grad_norm=1.0)


def test_the_guards_statistics_go_into_a_checkpoint_and_come_back() -> None:
    policy = BadStepsConfig(window=3, spike="skip")
    guard = BadSteps(policy)
    for step, loss in enumerate((1.0, 1.1, math.nan, 0.9), 1):
        guard.judge(step, seen(loss))
    kept = json.loads(json.dumps(guard.state_dict()))
    assert kept == {"recent_losses": [pytest.approx(loss) for loss in (1.0, 1.1, 0.9)]}
    # A fresh guard has too few losses to call one a spike; with those of the checkpoint it has them.
    fresh, resumed = BadSteps(policy), BadSteps(policy)
    resumed.load_state_dict(kept)
    assert fresh.judge(5, seen(50.0)).verdict is Verdict.APPLY
    assert resumed.judge(5, seen(50.0)).verdict is Verdict.SKIP
    # Back at a checkpoint, what was seen since is forgotten.
    guard.judge(5, seen(1.0))
    guard.load_state_dict(kept)
    assert guard.state_dict() == kept


def test_a_profile_holds_its_steps_and_no_other_and_bears_the_rank(tmp_path: Path) -> None:
    profile = StepProfile(2, 3, folder=tmp_path / "profile", rank=1)
    trace = tmp_path / "profile" / "rank-1.json.gz"
    for step in range(1, 6):
        profile.before_step(step)
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        profile.after_step(step, silent)
        assert trace.exists() == (step >= 3)
    with gzip.open(trace) as file:
        names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
    assert {name for name in names if name.startswith("work of")} == {
        "work of step 2",
        "work of step 3",
    }
    assert "aten::mm" in trace.with_name("rank-1.txt").read_text()


def test_a_profile_that_is_cut_short_is_dropped_and_watches_no_more(tmp_path: Path) -> None:
    profile = StepProfile(1, 3, folder=tmp_path / "profile", rank=0)
    profile.before_step(1)
    assert torch.autograd._profiler_enabled()
    profile.end()
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()
    profile.end()
