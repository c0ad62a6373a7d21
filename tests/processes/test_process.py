from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from distill_pretrain.errors import LaunchError
from distill_pretrain.processes.process import process_group


def test_a_port_that_another_program_has_taken_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
        for name, value in launched.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port}"), process_group():
            pass
    assert not dist.is_initialized()


BROADCASTS = """
import torch, torch.distributed as dist
from distill_pretrain.processes.process import process_group
for _ in range(15):
    with process_group():
        for _ in range(20):
            dist.broadcast(torch.zeros(3), 0)
        dist.broadcast_object_list([1])
"""


def test_a_group_is_closed_while_gloo_still_drops_the_tensors_of_the_last_collective():
    # With torch 2.6 the two waited for one another, of such groups at the 10th at the latest.
    subprocess.run([sys.executable, "-c", BROADCASTS], check=True, timeout=120)
