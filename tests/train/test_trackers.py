"""Every tracker gets what metrics.jsonl gets; one that fails is named once and stops nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distill_pretrain.errors import MissingDependency
from distill_pretrain.train.metrics import EventLog, Metrics, MetricsDamaged, MetricsLog
from distill_pretrain.train.trackers import PrometheusTracker, Tracking, require_trackers
from tests.support.notices import noted


def record(step: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "step": step,
        "loss": 3.5 / step,
        "kl": None,
        "z": 0.25,
        "grad_norm": 1.5,
        "tokens_per_second": 900.0 + step,
        "rss_peak_gb": 0.5,
        "applied": True,
        "time": 1000.0 + step,
    }
    return {**fields, **changes}


@contextmanager
def followed(
    folder: Path, *names: str, done: int = 0, killed: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes records as a training's callbacks do, from a step on."""
    events = EventLog(folder / "events.jsonl")
    both = (Metrics(folder / "metrics.jsonl", events), Tracking(names, folder, {"seed": 1}))

    def write(record: dict[str, Any]) -> None:
        for callback in both:
            callback.end_step(record["step"], record, lambda what: None)

    for callback in both:
        callback.begin(done)
    yield write
    for callback in () if killed else both:
        callback.settle(lambda what: None)


class FakeWandb(ModuleType):
    """Notes what it is told, as the package would send it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="fake")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0
        self.error: Exception | None = None

    def init(self, **settings: Any) -> SimpleNamespace:
        self.inits.append(settings)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=self.log, finish=self.end)

    def log(self, figures: dict[str, float]) -> None:
        if self.error:
            raise self.error
        self.logged.append(figures)

    def end(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tensorboard_shows_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, last in ((0, 5), (3, 6)):  # the second start goes on from a checkpoint of step 3
        with followed(tmp_path, "tensorboard", done=done) as write:
            for step in range(done + 1, last + 1):
                write(record(step, loss=step + 10.0 * done))
    (repeating,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (repeating["event"], repeating["step"], repeating["steps"]) == ("repeating", 3, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, event.value, event.wall_time) for event in events.Scalars("loss/loss")]
    assert found == [(r["step"], r["loss"], r["time"]) for r in written]
    assert [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6]
    assert set(events.Tags()["scalars"]) == {
        "loss/loss",
        "loss/z",
        "optimizer/grad_norm",
        "optimizer/applied",
        "speed/tokens_per_second",
        "memory/rss_peak_gb",
    }


def test_every_start_of_a_run_is_the_same_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for step in (1, 2):
        with followed(tmp_path, "wandb", done=step - 1) as write:
            write(record(step))
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["config"] == {"seed": 1} and first["name"] == tmp_path.name
    assert [figures["step"] for figures in wandb.logged] == [1, 2]
    assert wandb.logged[1]["loss/loss"] == 1.75 and "loss/kl" not in wandb.logged[1]
    assert wandb.finished == 2


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    with noted() as said, followed(tmp_path, "wandb", "prometheus") as write:
        for step in range(1, 5):
            wandb.error = ConnectionError("no route") if step > 1 else None
            write(record(step))
    assert len(said) == 1 and "wandb" in said[0] and "no route" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert 'step{run="' in (tmp_path / "metrics.prom").read_text()


def test_a_tracker_that_cannot_start_is_a_warning(tmp_path: Path, wandb: FakeWandb) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in")

    wandb.init = refuse  # type: ignore[method-assign,assignment]
    with noted() as said, followed(tmp_path, "wandb") as write:
        write(record(1))
    assert len(said) == 1 and "not logged in" in said[0]


def test_a_missing_package_is_said_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    # What an offline run leaves in the working directory looks like a package without code.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependency, match=r"pip install 'distill-pretrain\[track\]'"):
        require_trackers(["prometheus", "wandb"])
    require_trackers(["prometheus"])


def test_prometheus_gets_a_whole_file_some_seconds_apart_and_the_last_record(
    tmp_path: Path,
) -> None:
    folder = tmp_path / 'a "run"'
    folder.mkdir()
    now = [0.0]
    tracker = PrometheusTracker(folder, clock=lambda: now[0])
    for step, seconds in ((1, 0.0), (2, 1.0), (3, 6.0), (4, 7.0)):
        now[0] = seconds
        tracker.write(record(step))
        shown = parse((folder / "metrics.prom").read_text())
        assert shown['distill_pretrain_step{run="a \\"run\\""}'] == {1: 1, 2: 1, 3: 3, 4: 3}[step]
    tracker.close()
    shown = parse((folder / "metrics.prom").read_text())
    assert shown['distill_pretrain_step{run="a \\"run\\""}'] == 4
    assert shown['distill_pretrain_loss{run="a \\"run\\""}'] == 3.5 / 4
    assert [path.name for path in folder.iterdir()] == ["metrics.prom"]


def parse(text: str) -> dict[str, float]:
    """Samples of the text format; every one follows its TYPE."""
    samples, lines = {}, text.splitlines()
    for kind, sample in zip(lines[::2], lines[1::2], strict=True):
        name, value = sample.rsplit(" ", 1)
        assert kind == f"# TYPE {name.partition('{')[0]} gauge"
        samples[name] = float(value)
    return samples


def test_events_are_kept_over_starts_and_other_ranks_write_none(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (0, 4):
        EventLog(path).add("started", step, num_processes=2)
    EventLog(None).add("started", 0)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("started", 0), ("started", 4)]


def test_only_what_follows_the_checkpoint_may_be_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step)).encode() for step in range(1, 6)]
    path.write_bytes(b"\n".join([*lines[:4], b'{"step": 5, "lo', b"\0\0\0"]))
    with MetricsLog(path, resume_step=3) as log:
        assert log.dropped == 1
    assert path.read_bytes().splitlines() == lines[:3]
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(MetricsDamaged, match=r"metrics\.jsonl:2"):
        MetricsLog(path, resume_step=3)
    assert path.read_bytes() == before


def test_what_a_killed_start_gave_to_wandb_is_given_again(tmp_path: Path, wandb: FakeWandb) -> None:
    def steps(first: int, last: int, *, killed: bool) -> list[float]:
        del wandb.logged[:]
        with followed(tmp_path, "wandb", done=first, killed=killed) as write:
            for step in range(first + 1, last + 1):
                write(record(step))
        return [figures["step"] for figures in wandb.logged]

    assert steps(0, 3, killed=False) == [1, 2, 3]
    assert steps(3, 6, killed=True) == [4, 5, 6]
    assert steps(5, 7, killed=False) == [4, 5, 6, 7]  # of 4 to 6 nobody knows what W&B has
    assert steps(7, 8, killed=False) == [8]
    # Back at step 6, and killed: the steps that were repeated are given again, too.
    assert steps(6, 8, killed=True) == [7, 8]
    assert steps(8, 9, killed=False) == [7, 8, 9]
