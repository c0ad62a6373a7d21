"""The examples run, and end below plain cross-entropy in as many steps."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.conftest import EXAMPLES
from tests.support.distributed import run_distributed


def figures(printed: str) -> tuple[float, float]:
    """Held-out cross-entropy after (cross-entropy, cached targets); every line printed is one of the two."""
    lines = re.findall(r"^held-out cross-entropy after training on (.*): ([\d.]+)$", printed, re.M)
    assert [name for name, _ in lines] == ["cross-entropy", "cached targets"], printed
    return float(lines[0][1]), float(lines[1][1])


def run_here(name: str, folder: Path, monkeypatch, capsys) -> tuple[float, float]:
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    # A test of DeepSpeed that ran in this process before leaves it; accelerate takes it for a launcher.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return figures(capsys.readouterr().out)


def test_plain_pytorch(folder, monkeypatch, capsys):
    ce, kd = run_here("plain_pytorch.py", folder, monkeypatch, capsys)
    assert kd < ce - 0.05
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) < 90


def test_hf_trainer(folder, monkeypatch, capsys):
    pytest.importorskip("transformers")
    ce, kd = run_here("hf_trainer.py", folder, monkeypatch, capsys)
    assert kd < ce - 0.05


@pytest.mark.slow
def test_hf_trainer_under_accelerate(folder):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "hf_trainer.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr
    ce, kd = figures(done.stdout)
    assert kd < ce - 0.05


def run_megatron(folder: str, answer: str) -> None:
    """In a rank: what the example prints goes to a file."""
    import contextlib
    import io

    sys.argv = ["megatron_loop.py", folder]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / "megatron_loop.py"), run_name="__main__")
    if printed.getvalue():
        Path(answer).write_text(json.dumps(printed.getvalue()))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_megatron_loop(folder, tmp_path, processes):
    answer = tmp_path / "printed.json"
    run_distributed(run_megatron, processes, folder=str(folder), answer=str(answer))
    ce, kd = figures(json.loads(answer.read_text()))
    assert kd < ce - 0.05
