"""What megatron-core says of itself asks nothing of a user, and does not reach their console."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.distributed import REPOSITORY

OURS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ rank \d: |(capturing|scoring): ")
"""How a line of standard error begins that is no warning of another package: a notice, or progress."""
FOREIGN = re.compile(r"megatron|warning: |deprecated|site-packages", re.IGNORECASE)


@pytest.fixture
def new_install(tmp_path: Path) -> Path:
    """Megatron-core as it is just after its installation: compiling it, as the first job does, has its own warnings."""
    spec = find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    for place in spec.submodule_search_locations:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(place, tmp_path / "new/megatron", ignore=ignored, dirs_exist_ok=True)
    return tmp_path / "new"


@pytest.mark.slow
def test_no_verb_lets_a_message_through(job, new_install, tmp_path):
    run = (f"train.output_dir={tmp_path / 'run'}", "train.steps=4", "train.async_save=true")
    models = (f"eval.models={{teacher: {job.teacher}}}", "eval.num_sequences=8")
    verbs = {
        "train": [str(job.recipe), *run, "parallel.distributed_optimizer=true"],
        "capture": [str(job.recipe), f"capture.output_dir={tmp_path / 'cache'}"],
        "eval": [str(job.recipe), *models, f"eval.output={tmp_path / 'eval.json'}"],
        "export": [str(job.teacher), str(tmp_path / "exported")],
    }
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONWARNINGS"}
    for verb, arguments in verbs.items():
        places = [str(REPOSITORY), *([str(new_install)] if verb == "train" else [])]
        done = subprocess.run(
            [sys.executable, "-m", "distill_pretrain", verb, *arguments],
            cwd=REPOSITORY,
            env={**variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (verb, done.stderr)
        assert [x for x in done.stderr.splitlines() if not OURS.match(x)] == [], verb
        assert not FOREIGN.search(done.stdout), verb


def test_no_rank_of_a_job_that_goes_on_under_another_layout_lets_one_through(job, tmp_path):
    run = (f"train.output_dir={tmp_path}", "optimizer.decay_steps=4", "model.arch=gpt2")
    ends = (
        ("train.steps=2", "train.async_save=true", "parallel.distributed_optimizer=true"),
        ("train.steps=4", "parallel.pipeline=2", "parallel.distributed_optimizer=true"),
    )
    said = "".join(job.run("train", *run, *end, num_processes=2) for end in ends)
    assert "resumed at step 2" in said
    assert [line for line in said.splitlines() if not OURS.match(line)] == []
