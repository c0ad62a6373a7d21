"""Checkpoints are published whole, pruned, compared by field, and only into folders every rank sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from distill_pretrain.checkpoint import ownership, store
from distill_pretrain.checkpoint.ownership import require_shared_folder
from distill_pretrain.checkpoint.record import RECORD, Checkpoint
from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.errors import CheckpointError, ConfigError, StorageError
from distill_pretrain.processes.process import process_group
from tests.support.checkpoints import save
from tests.support.distributed import run_distributed
from tests.support.notices import noted


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


@pytest.fixture
def group():
    with process_group():
        yield


def test_the_newest_are_kept_and_found_by_step(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    for step in (5, 10, 15):
        save(checkpoints, step, {"seed": 1}, write(f"at {step}"), keep=2)
    assert [p.name for p in checkpoints.complete()] == ["step-00000010", "step-00000015"]
    newest = checkpoints.find({"seed": 1})
    assert newest.step == 15 and (newest.folder / "weights").read_text() == "at 15"
    newest.verify()


def test_a_save_that_dies_leaves_the_one_before(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {}, write("good"), keep=1)

    def dies(folder: Path) -> None:
        write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 10, {}, dies, keep=1)
    assert checkpoints.newest().step == 5
    save(checkpoints, 10, {}, write("whole"), keep=1)
    assert (checkpoints.newest().folder / "weights").read_text() == "whole"


def test_a_step_saved_again_replaces_the_old_one_only_when_it_is_there(
    tmp_path, group, monkeypatch
):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {}, write("old"), keep=1)
    replace, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        seen.append(sorted((p / "weights").read_text() for p in tmp_path.glob("step-*")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save(checkpoints, 5, {}, write("new"), keep=1)
    # Neither the one nor the other is removed before the new one has its name.
    assert seen[1:] == [["new", "old"], ["new", "old"]]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert (tmp_path / "step-00000005" / "weights").read_text() == "new"


def test_a_kill_between_two_names_loses_neither(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {}, write("old"), keep=1)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000005.old")
    found = checkpoints.find({})
    assert found is not None and (found.folder / "weights").read_text() == "old"
    # And the name of one that was replaced is cleared away.
    (tmp_path / "step-00000005.old").mkdir()
    checkpoints.find({})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_another_run_is_refused_field_by_field(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {"seed": 1, "model": "a", "same": 0}, write(""), keep=1)
    with pytest.raises(CheckpointError) as error:
        checkpoints.find({"seed": 2, "model": "b", "same": 0})
    assert "train.seed: checkpoint 1, this run 2" in str(error.value)
    assert "model: checkpoint a, this run b" in str(error.value)
    assert "same" not in str(error.value)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, group, damage):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {}, write("good"), keep=1)
    file = checkpoints.newest().folder / "weights"
    if damage == "changed":
        file.write_text("goof")
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="weights"):
        checkpoints.newest().verify()


@pytest.mark.parametrize("damage", ["a bit", "a missing file", "the record"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, group, damage):
    checkpoints = CheckpointStore(tmp_path)
    for step in (5, 10):
        save(checkpoints, step, {}, write(f"at {step}"), keep=2)
    newest = checkpoints.newest().folder
    if damage == "a bit":
        (newest / "weights").write_bytes(b"at 11")
    elif damage == "a missing file":
        (newest / "weights").unlink()
    else:
        (newest / RECORD).write_text("{")
    with noted() as said:
        found = checkpoints.find({})
    assert found.step == 5 and (found.folder / "weights").read_text() == "at 5"
    (line,) = said
    assert "WARNING" in line and newest.name in line and f"{newest.name}.bad" in line
    # Set aside, it is in the way of nothing: neither of later saves nor of what is kept.
    save(checkpoints, 10, {}, write("again at 10"), keep=2)
    assert [p.name for p in checkpoints.complete()] == ["step-00000005", "step-00000010"]
    assert (checkpoints.find({}).folder / "weights").read_text() == "again at 10"


def test_damage_to_all_is_an_error_not_a_fresh_start(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    for step in (5, 10):
        save(checkpoints, step, {}, write(""), keep=2)
    for folder in checkpoints.complete():
        (folder / RECORD).write_text("{")
    with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
        checkpoints.find({})
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Checkpoint.open(tmp_path)


def folders_of_their_own(root: str) -> str:
    """Every rank in a working folder of its own, as on nodes without a shared file system."""
    ownership.SHARED_FOLDER_WAIT_S = 0.3
    with process_group():
        mine = Path(root, str(dist.get_rank()))
        mine.mkdir()
        require_shared_folder(Path(root, "shared"))
        os.chdir(mine)
        try:
            require_shared_folder(Path("run"))
        except ConfigError as error:
            return str(error)
    return "not noticed"


def test_an_output_folder_that_is_not_shared_is_refused(tmp_path):
    message = run_distributed(folders_of_their_own, 2, root=str(tmp_path))
    assert "ranks 1 do not see what rank 0 writes" in message
    assert not list((tmp_path / "shared").iterdir())


FAILURES = {
    "torch.save": RuntimeError("unexpected pos 704 vs 598\nframe 0: c10::Error\nframe 1: ..."),
    # It is no Exception, and brings the traceback of another rank.
    "torch's own": CheckpointException("write", {0: (ValueError("pos 704 vs 598"), None)}),
    "ours": CheckpointError("not written", where="x", found="rank 0: pos 704 vs 598", remedy="no"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("behind", [False, True])
def test_a_save_on_a_full_disk_says_so_and_leaves_room_for_the_next_start(
    tmp_path, group, behind, kind
):
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, 5, {}, write("good"), keep=2)
    checkpoints.num_bytes = 10**18

    def fail(folder: Path) -> Any:
        write("half")(folder)
        raise FAILURES[kind]

    class Files:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def finish(self) -> dict[str, str]:
            return fail(self.folder)

    begun = checkpoints.begin_save(10, {}, Files, keep=2) if behind else None
    with pytest.raises(CheckpointError) as error:
        begun.publish() if begun else save(checkpoints, 10, {}, fail, keep=2)
    said = str(error.value)
    assert "could not be written: the disk is full" in said and "bytes free" in said
    assert f"where: {tmp_path / 'step-00000010'};" in said and "\n" not in said
    assert "about 1,000,000,000,000,000,000 bytes" in said and "pos 704 vs 598" in said
    assert "frame" not in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    save(checkpoints, 10, {}, write("whole"), keep=2)
    assert checkpoints.newest().step == 10


def test_what_killed_starts_left_unfinished_is_dropped_by_the_next(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    save(checkpoints, 5, {}, write("good"), keep=2)
    for name in ("checkpoints/step-00000099.tmp", "hf/step-00000004.tmp", "hf/step-00000002"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text("...")
    (tmp_path / ".recipe.yaml.123.tmp").write_text("half")
    store.drop_unfinished(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert left == {"checkpoints", "checkpoints/step-00000005", "hf", "hf/step-00000002"}
    assert not list(tmp_path.glob(".*"))


def test_room_for_checkpoints_is_asked_for_before_the_first_step(tmp_path, group):
    checkpoints = CheckpointStore(tmp_path)
    free = store.free_bytes(tmp_path)
    with noted() as said:
        checkpoints.require_room(1000, keep=2)
        assert not said
        checkpoints.require_room(free // 2, keep=2)  # three until the first goes
    (line,) = said
    assert "WARNING" in line and "3 checkpoints" in line and "train.keep_checkpoints=2" in line
    with pytest.raises(StorageError, match="no room for a checkpoint"):
        checkpoints.require_room(free * 2, keep=2)
