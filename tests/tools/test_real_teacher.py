"""launch/real_teacher.sh in its short form: a packaged pretrained model, from nothing to a report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import REPOSITORY


def short_form(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One process, with this interpreter."""
    beside = Path(sys.executable).parent
    return subprocess.run(
        ["launch/real_teacher.sh", "--short", *arguments],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
            "VENV": "none",
            "NPROC": "1",
            "RUN": str(run),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_the_short_form_goes_from_nothing_to_a_report(tmp_path):
    done = short_form(tmp_path / "run")
    folder = tmp_path / "run-short"
    # Half a gigabyte of weights; pytest keeps folders of several runs.
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    shutil.rmtree(folder / "packages", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped: " in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    made = json.loads((folder / "tokens/tokens.json").read_text())
    assert (made["vocab_size"], made["eod_id"]) == (49_152, 0)
    assert "sound: every byte is as written" in done.stdout
    report = (folder / "report/report.md").read_text()
    assert "| systematic-50 |" in report and "## Out of domain, and copying from context" in report
    assert "The teacher's cross-entropy there is" in report


def test_a_model_that_cannot_be_had_is_said_and_is_no_failure(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, f"file://{tmp_path}/nowhere")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    done = short_form(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("real_teacher.sh: skipped: pip cannot install")
    assert not (tmp_path / "run-short/teacher").exists()


def test_a_wrong_argument_is_one_message(tmp_path):
    done = short_form(tmp_path / "run", "teacher=x")
    assert done.returncode == 2 and "unknown argument teacher=x" in done.stderr
    assert not list(tmp_path.iterdir())
