from __future__ import annotations

import io

from distill_pretrain.jobs import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_few_plain_lines_and_the_end():
    stream = io.StringIO()
    with console.Progress(1000, "capturing", unit="sequences", stream=stream) as bar:
        for _ in range(1000):
            bar.advance(loss="2.5")
    assert stream.getvalue() == "capturing: 1,000/1,000 sequences (100%), loss 2.5, 0s\n"


def test_a_terminal_gets_one_line_rewritten_in_place(monkeypatch):
    monkeypatch.setattr(console, "TERMINAL_INTERVAL_S", 0.0)
    stream = Terminal()
    with console.Progress(2, "capturing", stream=stream) as bar:
        bar.advance()
        bar.reach(2)
    lines = stream.getvalue()
    assert lines.count("\n") == 1
    assert lines.count("\r") == 3
    assert lines.rstrip().endswith("capturing: 2/2 (100%), 0s")


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    with console.Progress(1, "capturing", stream=stream) as bar:
        bar.advance()
    console.say("hello")
    assert stream.getvalue() == capsys.readouterr().out == ""


def test_a_failed_job_is_not_shown_as_finished():
    stream = io.StringIO()
    try:
        with console.Progress(2, "capturing", stream=stream) as bar:
            bar.advance()
            raise ValueError
    except ValueError:
        pass
    assert stream.getvalue() == ""


def test_the_last_line_of_a_log_comes_once_and_has_one_estimate(monkeypatch):
    monkeypatch.setattr(console, "LOG_INTERVAL_S", 0.0)
    stream = io.StringIO()
    with console.Progress(2, "capturing", stream=stream) as bar:
        bar.advance(left_s=7200.0, hits="50%")
        bar.advance(left_s=0.0, hits="51%")
    assert stream.getvalue().splitlines() == [
        "capturing: 1/2 (50%), hits 50%, 0s, 2h00m left",
        "capturing: 2/2 (100%), hits 51%, 0s",
    ]
