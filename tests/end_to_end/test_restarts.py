"""Ranks that torchrun starts again find each other, not the addresses of those that died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import REPOSITORY
from tests.support.jobs import kill_all

PATIENCE_S = 200

JOB = """
import os, signal, torch, torch.distributed as dist
from distill_pretrain.processes.process import process_group
with process_group():
    total = torch.ones(1)
    dist.all_reduce(total)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    os.write(1, f"met again: {total.item()}\\n".encode())  # whole: both ranks write to one file
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings_of", ["several nodes", "one node"])
def test_a_killed_rank_is_started_again_under(settings_of: str, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    launch = (
        # As launch/torchrun_multi.sh sets it.
        ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; " if settings_of == "several nodes" else "")
        + f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1 {job}"
    )
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    agent = subprocess.Popen(
        ["bash", "-c", launch],
        cwd=REPOSITORY,
        env={**os.environ, **settings},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert agent.wait(PATIENCE_S) == 0, log.read_text()[-4000:]
    finally:
        if agent.poll() is None:
            kill_all(agent)
    assert log.read_text().count("met again: 2.0") == 2
