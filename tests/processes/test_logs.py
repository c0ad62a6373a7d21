"""Notices carry time, level and rank, and go to standard error; results stay alone on standard output."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

from distill_pretrain.cli import main as cli
from distill_pretrain.processes.logs import ANY_RANK, PACKAGE, shown

_log = logging.getLogger("distill_pretrain.somewhere")


def speak() -> None:
    _log.debug("fine print")
    _log.info("of the job")
    _log.info("of this process", extra=ANY_RANK)
    _log.warning("100% bad")


@pytest.mark.parametrize(
    ("level", "rank", "expected"),
    [
        (logging.INFO, 0, ["INFO of the job", "INFO of this process", "WARNING 100% bad"]),
        (logging.INFO, 3, ["INFO of this process"]),
        (logging.WARNING, 0, ["WARNING 100% bad"]),
        (logging.ERROR, 0, []),
    ],
)
def test_a_level_and_a_rank_decide_what_is_shown(capsys, monkeypatch, level, rank, expected):
    monkeypatch.setenv("RANK", str(rank))
    with shown(level):
        speak()
    captured = capsys.readouterr()
    lines = [re.sub(r"^\d{4}(-\d\d){2} (\d\d:?){3} ", "", x) for x in captured.err.splitlines()]
    assert lines == [line.replace(" ", f" rank {rank}: ", 1) for line in expected]
    assert captured.out == ""


def test_debug_names_the_module_too(capsys):
    with shown(logging.DEBUG):
        speak()
    assert " DEBUG rank 0 distill_pretrain.somewhere: fine print\n" in capsys.readouterr().err


def test_other_loggers_and_what_was_set_before_are_left_alone(capsys):
    ours, root, other = (logging.getLogger(name) for name in (PACKAGE, "", "megatron.core"))

    def state() -> list[object]:
        return [(x.level, x.propagate, list(x.handlers), list(x.filters)) for x in (root, other)]

    before, own = state(), (ours.level, ours.propagate, list(ours.handlers))
    with shown(logging.INFO):
        assert state() == before
    assert (ours.level, ours.propagate, list(ours.handlers)) == own
    speak()
    assert capsys.readouterr().err == ""


def test_importing_the_package_sets_up_nothing():
    code = (
        "import logging, distill_pretrain as d, distill_pretrain.data.retry\n"
        "log = logging.getLogger('distill_pretrain')\n"
        "assert [type(h).__name__ for h in log.handlers] == ['NullHandler'], log.handlers\n"
        "assert log.level == logging.NOTSET and log.propagate and not logging.root.handlers\n"
        "log.warning('nobody asked')\n"
        "logging.basicConfig(format='%(name)s %(message)s'); log.warning('asked')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "distill_pretrain asked\n")


def tokenize(folder, *options: str) -> list[str]:
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"some words of text, number {number}\n" * 30)
    return [
        "tokenize",
        f"corpus={{paths: [{folder}], output_dir: {folder}/out, held_out_fraction: 0.3, workers: 1}}",
        "tokenizer.vocab_size=300",
        *options,
    ]


@pytest.mark.parametrize("by", ["nothing", "option", "variable", "both"])
def test_the_command_line_sets_the_level(tmp_path, capsys, monkeypatch, by):
    if by in ("variable", "both"):
        monkeypatch.setenv("DISTILL_PRETRAIN_LOG", "ERROR" if by == "variable" else "debug")
    options = ["--log-level", "error"] if by in ("option", "both") else []
    assert cli.main(tokenize(tmp_path, *options)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("train: 2") and captured.out.count("\n") == 3
    assert (" INFO rank 0: training a tokenizer" in captured.err) == (by == "nothing")


def test_a_level_that_is_none_is_a_mistake(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISTILL_PRETRAIN_LOG", "loud")
    assert cli.main(tokenize(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "DISTILL_PRETRAIN_LOG; found: loud; expected: one of: debug, info" in error
    assert not (tmp_path / "out").exists()
