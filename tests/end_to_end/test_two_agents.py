"""Two launchers that meet at a rendezvous train as one would, also when one of them is killed and started again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from distill_pretrain.corpus.token_writer import TokenIndexWriter
from tests.support.distributed import REPOSITORY
from tests.support.jobs import kill_all

STEPS, INTERVAL, KILL_AFTER = 100, 40, 45
PATIENCE_S = 400
"""A busy machine may take minutes for what an idle one does in seconds."""


def environment(**settings: object) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))}
    bin_folder = Path(sys.executable).parent
    return {
        **inherited,
        "PATH": f"{bin_folder}:{inherited['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VENV": "none",
        "MAX_RESTARTS": "0",
        "RETRY_WAIT_S": "1",
        **{name: str(value) for name, value in settings.items()},
    }


def launch(script: str, log: Path, recipe: Path, output: Path, **settings: object):
    """A launcher as a user starts it; what it prints goes to a file, so that no pipe fills."""
    return subprocess.Popen(
        [REPOSITORY / "launch" / script, "train", str(recipe), f"train.output_dir={output}"],
        cwd=REPOSITORY,
        env=environment(**settings),
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(done: Callable[[], bool], job: list[subprocess.Popen[str]], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        assert all(agent.poll() in (None, 0) for agent in job), log.read_text()[-4000:]
        time.sleep(0.01)


def curve(output: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    with TokenIndexWriter(tmp_path / "train", 64) as writer:
        for _ in range(40):
            writer.add_document(np.cumsum(rng.integers(0, 3, 50)) % 64)
    path = tmp_path / "recipe.yaml"
    model = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    path.write_text(
        yaml.safe_dump(
            {
                "data": {"tokens": str(tmp_path / "train"), "vocab_size": 64, "seq_len": 16},
                "model": model,
                "optimizer": {"lr": 0.01},
                "train": {
                    "output_dir": "unused",
                    "steps": STEPS,
                    "global_batch_size": 4,
                    "checkpoint_interval": INTERVAL,
                    "threads": 1,
                },
            }
        )
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE_S)
def test_an_agent_that_is_killed_and_comes_back_leaves_no_mark_on_the_curve(recipe, tmp_path):
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    reference = launch("torchrun_single.sh", tmp_path / "whole.log", recipe, whole, NPROC=2)
    assert reference.wait(PATIENCE_S) == 0, (tmp_path / "whole.log").read_text()[-4000:]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "NPROC": 1,
        "NNODES": 2,
        "JOB_ID": "two-agents",
        "RDZV_ENDPOINT": f"localhost:{port}",
        # Seconds until a silent agent counts as lost; join_timeout bounds the wait for its successor.
        "RDZV_CONF": "keep_alive_interval=2,keep_alive_max_attempt=4,join_timeout=300",
    }
    metrics = broken / "metrics.jsonl"
    host = launch("torchrun_multi.sh", log, recipe, broken, **settings)
    agents = [host]
    try:
        wait_until(lambda: is_listening(port), agents, log)
        agents.append(launch("torchrun_multi.sh", log, recipe, broken, **settings))
        wait_until(
            lambda: metrics.exists() and metrics.read_text().count("\n") >= KILL_AFTER, agents, log
        )
        kill_all(agents.pop())
        done = metrics.read_text().count("\n")
        assert KILL_AFTER <= done < STEPS, "killed too late to show anything"
        agents.append(launch("torchrun_multi.sh", log, recipe, broken, **settings))
        wait_until(lambda: all(agent.poll() == 0 for agent in agents), agents, log)
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_all(agent)
    assert f"resumed at step {INTERVAL}" in log.read_text()
    assert curve(broken) == curve(whole)
    assert len(curve(whole)) == STEPS


def is_listening(port: int) -> bool:
    """Whether the first agent hosts the rendezvous by now."""
    return any(
        c.laddr.port == port and c.status == psutil.CONN_LISTEN
        for c in psutil.net_connections("tcp")
    )
