"""What a disk refuses is said with the path, what is wrong and a remedy; nothing that is finished is rewritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.config import dump_recipe
from distill_pretrain.corpus.config import TokenizerConfig
from distill_pretrain.errors import StorageError
from distill_pretrain.files import disk
from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.files.disk import naming, require_room, require_writable, storage_error


def refuse(code: int):
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_where_a_folder_should_be_is_named_and_nothing_else_is_printed(tmp_path, capsys):
    (tmp_path / "runs").write_text("a note")
    (tmp_path / "text.txt").write_text("words " * 99)
    arguments = [f"corpus.paths=[{tmp_path / 'text.txt'}]", "corpus.held_out_fraction=0"]
    status = main(["tokenize", *arguments, f"corpus.output_dir={tmp_path / 'runs/tokens'}"])
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    assert f"a file is where a folder should be; where: {tmp_path / 'runs'};" in error
    assert "remedy:" in error
    assert (tmp_path / "runs").read_text() == "a note"


def test_of_a_path_through_a_file_that_file_is_named(tmp_path):
    (tmp_path / "note").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        (tmp_path / "note" / "runs" / "first").mkdir()
    assert f"where: {tmp_path / 'note'};" in str(storage_error(error.value))


def test_a_full_disk_names_the_file_the_bytes_free_and_those_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError) as error:
        publish_bytes(tmp_path / "plan.json", b"{}")
    said = str(storage_error(error.value, needed=12345678))
    assert "the disk is full" in said and f"where: {tmp_path / 'plan.json'}" in said
    assert "bytes free" in said and "expected: 12,345,678 bytes" in said
    assert not list(tmp_path.iterdir())


def test_a_short_write_of_numpy_is_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "is_full", lambda path: True)
    with pytest.raises(StorageError, match="the disk is full"), naming(tmp_path / "train.bin"):
        raise OSError("960 requested and 512 written")


@pytest.mark.parametrize("make", ["a folder in its place", "no room"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, make):
    output = tmp_path / "new" / "eval.json"
    if make == "no room":
        monkeypatch.setattr(Path, "write_bytes", refuse(errno.ENOSPC))
    else:
        output.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"eval\.json"):
        require_writable(output)
    monkeypatch.undo()
    if make == "no room":
        require_writable(output)
        assert not list(tmp_path.iterdir())  # nor a folder


def test_a_trial_of_an_output_makes_no_folder(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: made.append(path))
    require_writable(tmp_path / "new" / "eval.json")  # others may be making `new` at this moment
    assert made == [] and not list(tmp_path.iterdir())


def test_room_is_compared_with_what_is_needed(tmp_path):
    require_room(tmp_path / "new", 10, what="it", remedy="leave it")
    with pytest.raises(StorageError, match="no room for it"):
        require_room(tmp_path / "new", 10**18, what="it", remedy="leave it")


def test_a_recipe_that_says_the_same_is_not_rewritten(tmp_path):
    path = tmp_path / "recipe.yaml"
    dump_recipe(TokenizerConfig(vocab_size=99), path)
    before = path.stat().st_ino
    dump_recipe(TokenizerConfig(vocab_size=99), path)
    assert path.stat().st_ino == before
    dump_recipe(TokenizerConfig(vocab_size=88), path)
    assert "88" in path.read_text()


def test_a_recipe_that_does_not_fit_is_named_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError) as error:
        dump_recipe(TokenizerConfig(), tmp_path / "recipe.yaml")
    assert error.value.filename == str(tmp_path / "recipe.yaml")
    assert not list(tmp_path.iterdir())
