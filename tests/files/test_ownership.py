"""What is written has one owner; the second is told who; a kill lets go at once, whatever the children do."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from distill_pretrain.errors import InUse
from distill_pretrain.files import ownership
from distill_pretrain.files.ownership import owner_beside, owner_of, owning
from tests.support.owner import owned_elsewhere


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)


def enter(owner: Path) -> None:
    with owning(owner, what=owner.parent, remedy="wait for it"):
        pass


@pytest.mark.parametrize("place", [owner_of, owner_beside])
def test_the_second_is_told_who_and_since_when_and_a_kill_lets_go_at_once(tmp_path, place):
    owner = place(tmp_path / "run")
    with owned_elsewhere(owner) as holder:
        with pytest.raises(InUse) as error:
            enter(owner)
        said = str(error.value)
        assert f"process {holder.pid} on node7, since 2026-09-21 14:13:20 UTC" in said, said
        assert "remedy: wait for it" in said
        holder.kill()
        holder.wait()
        enter(owner)  # though a child of the killed process lives on


def test_blocks_of_one_process_lie_in_one_another_and_keep_others_out(tmp_path):
    owner = owner_of(tmp_path)
    with owning(owner, what=tmp_path, remedy=""):
        with owning(owner, what=tmp_path, remedy=""):
            pass
        child = os.fork()
        if child == 0:
            try:
                enter(owner)
            except InUse as error:
                os._exit(7 if f"process {os.getppid()} " in str(error) else 8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    enter(owner)


def test_the_file_beside_what_is_replaced_as_a_whole_does_not_stay(tmp_path):
    enter(owner_beside(tmp_path / "tokens"))
    assert not list(tmp_path.iterdir())


def test_an_owner_that_removes_its_file_between_our_two_looks_is_not_joined(tmp_path, monkeypatch):
    owner, real, inodes = owner_beside(tmp_path / "tokens"), fcntl.lockf, []

    def late(fd: int, flags: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        if len(inodes) == 1:
            owner.unlink()
        real(fd, flags)

    monkeypatch.setattr(fcntl, "lockf", late)
    with owning(owner, what=tmp_path, remedy=""):
        assert len(inodes) == 2 and owner.stat().st_ino == inodes[1]


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOLCK])
def test_without_leave_to_write_or_without_locks_the_block_runs(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    name = "open" if code == errno.EROFS else "lockf"
    monkeypatch.setattr(os if name == "open" else fcntl, name, refuse)
    ran = []
    with owning(owner_of(tmp_path), what=tmp_path, remedy=""):
        ran.append(True)
    assert ran


def test_who_wrote_nothing_leaves_no_folder(tmp_path):
    folder = tmp_path / "runs" / "first"
    with owning(owner_of(folder), what=folder, remedy="wait"):
        assert folder.exists()
    assert not list(tmp_path.iterdir())
    with owning(owner_of(folder), what=folder, remedy="wait"):
        (folder / "file").touch()
    assert (folder / "file").exists()


def test_a_folder_that_vanishes_while_it_is_taken_is_made_again(tmp_path, monkeypatch):
    folder, take, calls = tmp_path / "run", ownership.FileLock.take, []

    def take_late(path, **options):
        if not calls:
            path.parent.rmdir()
        calls.append(path)
        return take(path, **options)

    monkeypatch.setattr(ownership.FileLock, "take", take_late)
    with owning(owner_of(folder), what=folder, remedy="wait"):
        assert owner_of(folder).exists()
    assert len(calls) == 2
