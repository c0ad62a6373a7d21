"""Checkpoints written while training goes on: the same curve, bytes and promises as those it waits for."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.record import RECORD, Checkpoint
from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.files.atomic import sha256_file
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import on_first_rank, process_group, released_groups
from distill_pretrain.train.config import BadStepsConfig, TrainConfig
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, make_job, take_step
from tests.support.training import Fault, run_trainer

pytestmark = pytest.mark.slow

STEPS = 9
INTERVAL = 3
SLOW_S = 600.0
LAYOUT = ParallelConfig(tensor=2)  # both ranks have files to write
MODEL = {**LLAMA, "num_layers": 1, "dropout": 0.1}


@contextmanager
def writers(begin: Callable[[Path], None]):
    """Inside the block, the thread that writes calls `begin` before each of its files."""
    from distill_pretrain.mcore.student import background_save

    write = background_save._write_file

    def told(transforms: Any, number: int, bucket: Any, *more: Any, **named: Any) -> None:
        def tensors():
            begin(Path(bucket[0]))
            yield from bucket[2][1]

        return write(transforms, number, (*bucket[:2], (bucket[2][0], tensors())), *more, **named)

    with mock.patch.object(background_save, "_write_file", told):
        yield


def run(
    folder: Path,
    *,
    async_save: bool = True,
    on_line: Callable[[str], None] = lambda line: None,
    spoil: int | None = None,
    **policy: Any,
) -> dict[str, Any]:
    """Train, from where the folder is; the losses, what was said, how it ended, the complete checkpoints."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with released_groups(), model_parallel(LAYOUT, seed=1) as groups:
        run = run_trainer(
            folder,
            groups,
            model=MODEL,
            parallel=LAYOUT,
            fault=None if spoil is None else Fault(at=spoil, factor=math.nan),
            on_line=on_line,
            steps=STEPS,
            checkpoint_interval=INTERVAL,
            keep_checkpoints=2,
            async_save=async_save,
            bad_steps=BadStepsConfig(**policy),
        )
        return {
            "loss": losses(folder),
            "said": run.said,
            "ended": "" if run.error is None else f"{type(run.error).__name__}: {run.error}",
            "was stopped": run.stopped,
            "saved": steps_saved(folder),
            "complete": [Checkpoint.open(path).step for path in run.checkpoints.complete()],
        }


def losses(folder: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder: Path) -> list[int]:
    events = [json.loads(x) for x in (folder / "events.jsonl").read_text().splitlines()]
    return [e["step"] for e in events if e["event"] == "saved"]


def wait_for(event: threading.Event) -> None:
    assert event.wait(SLOW_S)


def said_at(step: int, action: Callable[[], None]) -> Callable[[str], None]:
    """Acts once this step is reported: while a save begun by the step before is in flight."""
    return lambda line: action() if line.startswith(f"step {step}/") else None


def files_of_both(root: Path) -> list[dict[str, str]]:
    """One state saved in the foreground and behind it, where only rank 0 has files to write."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.background_save import BackgroundSave

    layout = ParallelConfig(distributed_optimizer=True)
    with released_groups(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(MODEL, layout, groups, kd=True, steps=STEPS)
        take_step(student, batches, 0)
        store, foreground = CheckpointStore(root / "behind"), root / "foreground"
        on_first_rank(foreground.mkdir)
        save_student(student, foreground)
        trained = threading.Event()
        with writers(lambda path: wait_for(trained)):
            pending = store.begin_save(2, {}, partial(BackgroundSave, student), keep=1)
            for step in (1, 2):
                take_step(student, batches, step)
            trained.set()
            pending.files.wait(60)
        dist.barrier()
        pending.publish()
        return [contents(foreground), contents(store.complete()[0])]


def contents(folder: Path) -> dict[str, str]:
    """What the files of a checkpoint hold; of the one that names its own folder, only what is to be loaded."""
    from torch.distributed.checkpoint import FileSystemReader

    meta = FileSystemReader(folder).read_metadata()
    described = (meta.storage_data, meta.state_dict_metadata)
    names = sorted(p.name for p in folder.iterdir() if p.name not in (".metadata", RECORD))
    return {
        **{name: sha256_file(folder / name) for name in names},
        ".metadata": repr([sorted(map(repr, part.items())) for part in described]),
    }


def every_case(folder: str) -> dict[str, Any]:
    """All runs on two ranks; at last one whose processes are killed in the middle of a write."""
    torch.set_num_threads(1)
    root, found = Path(folder), {}
    with process_group():
        rank = dist.get_rank()
        found["files"] = files_of_both(root)
        found["waits"] = run(root / "waits", async_save=False)
        found["goes on"] = run(root / "goes on")

        # Rank 1 holds back what step 6 left until step 8 is reported.
        visible: list[str] = []
        reported = threading.Event()

        def release() -> None:
            visible.extend(p.name for p in (root / "slow" / "checkpoints").iterdir())
            reported.set()

        def hold(path: Path) -> None:
            if rank == 1 and "00000006" in str(path):
                wait_for(reported)

        with writers(hold):
            found["slow"] = run(root / "slow", on_line=said_at(8, release))
        found["slow"]["visible"] = sorted(visible)

        def ask() -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        rollback: dict[str, Any] = {"spoil": 5, "nonfinite": "rollback"}
        with writers(lambda path: time.sleep(0.5)):
            found["stopped"] = run(root / "stopped", on_line=said_at(4, ask))
            found["rolled back"] = run(root / "back", **rollback)
            found["stop"] = run(root / "stop", spoil=5, nonfinite="stop")
        found["rolled back, waits"] = run(root / "back waits", async_save=False, **rollback)

        def fails(path: Path) -> None:
            if rank == 1 and "00000006" in str(path):
                raise OSError(28, "No space left on device")

        with writers(fails):
            found["failed"] = run(root / "failed")
        ended: list[Any] = [None, None]
        dist.all_gather_object(ended, found["failed"]["ended"])
        found["failed"]["ended"] = ended
        if rank == 0:
            (root / "found.json").write_text(json.dumps(found))
        dist.barrier()

        def killed(path: Path) -> None:
            if "00000006" in str(path):
                time.sleep(SLOW_S)

        with writers(killed):
            run(
                root / "killed",
                on_line=said_at(8, lambda: os.kill(os.getpid(), signal.SIGKILL)),
            )
    return {}


def resumed(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with process_group():
        return {name: run(Path(folder, name)) for name in ("killed", "failed", "stopped")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("runs")
    with pytest.raises(AssertionError, match="ended with -9"):
        run_distributed(every_case, 2, folder=str(root))
    found = json.loads((root / "found.json").read_text())
    found["left"] = sorted(p.name for p in (root / "killed" / "checkpoints").iterdir())
    found["resumed"] = run_distributed(resumed, 2, folder=str(root))
    return {**found, "root": root}


def test_curve_and_files_are_those_of_a_run_that_waits(runs):
    assert runs["goes on"]["loss"] == runs["waits"]["loss"] == runs["slow"]["loss"]
    for step in (6, 9):
        name = f"checkpoints/step-{step:08d}"
        waits, goes_on, slow = (
            Checkpoint.open(runs["root"] / run / name) for run in ("waits", "goes on", "slow")
        )
        expected = contents(waits.folder)
        assert contents(goes_on.folder) == contents(slow.folder) == expected
        assert sum(file.endswith(".distcp") for file in expected) == 4
        assert waits.progress == goes_on.progress and waits.files.keys() == goes_on.files.keys()
        goes_on.verify()


def test_a_copy_is_written_whatever_training_does_meanwhile(runs):
    foreground, behind = runs["files"]
    assert foreground == behind and len(behind) > 5


def test_nothing_is_visible_before_the_last_rank_has_written(runs):
    assert runs["slow"]["visible"] == ["step-00000003", "step-00000006.tmp"]
    assert runs["slow"]["saved"] == [3, 6, 9]
    assert runs["goes on"]["complete"] == runs["slow"]["complete"] == [6, 9]


def test_sigterm_and_a_stop_wait_for_what_is_being_written(runs):
    assert runs["stopped"]["was stopped"] and runs["stopped"]["saved"][0] == 3
    assert runs["stop"]["ended"].startswith("TrainingStopped") and runs["stop"]["complete"] == [3]
    assert runs["resumed"]["stopped"]["loss"] == runs["waits"]["loss"]


def test_a_rollback_goes_to_the_checkpoint_that_was_being_written(runs):
    assert runs["rolled back"]["loss"] == runs["rolled back, waits"]["loss"]
    assert any("back at step 3" in line for line in runs["rolled back"]["said"])


def test_a_failed_write_ends_the_job_on_every_rank_by_name(runs):
    for ended in runs["failed"]["ended"]:
        assert ended.startswith("CheckpointError: a checkpoint could not be written")
        assert "rank 1: OSError" in ended and "No space left" in ended
    assert runs["failed"]["complete"] == [3]
    assert runs["resumed"]["failed"]["loss"] == runs["waits"]["loss"]


def test_a_kill_in_the_middle_of_a_write_costs_the_steps_since_the_save_before(runs):
    assert runs["left"] == ["step-00000003", "step-00000006.tmp"]
    assert "resumed at step 3" in runs["resumed"]["killed"]["said"]
    assert runs["resumed"]["killed"]["loss"] == runs["waits"]["loss"]
    assert runs["resumed"]["killed"]["complete"] == [6, 9]


class GrowingFiles:
    """Files that grow at some looks and not at others, until the last."""

    def __init__(self, grows: list[bool]) -> None:
        self.grows = grows
        self.moves = 0

    @property
    def writing(self) -> bool:
        return bool(self.grows)

    def wait(self, seconds: float) -> None:
        self.moves += self.grows.pop(0)

    def finish(self) -> dict[str, str]:
        return {}


@pytest.mark.parametrize("async_save", [True, False])
def test_the_watchdog_hears_of_files_that_grow_and_of_no_others(tmp_path, async_save):
    from distill_pretrain.train.metrics import EventLog
    from distill_pretrain.train.saving import Saver

    heard: list[str] = []
    config = TrainConfig(output_dir=tmp_path, steps=9, global_batch_size=1, async_save=async_save)
    store = CheckpointStore(tmp_path)
    with (
        process_group(),
        mock.patch("distill_pretrain.train.saving.BackgroundSave") as started,
    ):
        started.return_value = GrowingFiles([True, False, False, True, False])
        saver = Saver(mock.Mock(), store, {}, config, EventLog(None), torch.device("cpu"))
        saver.save(3, {}, heard.append)
        if async_save:
            assert saver.writing and not heard and not store.complete()
        saver.flush(heard.append)
        assert not saver.writing and [p.name for p in store.complete()] == ["step-00000003"]
        # At the start, and after each look that found more than the one before.
        assert heard == ["step 3: writing the checkpoint"] * 3
        saver.flush(heard.append)
        assert len(heard) == 3
