from __future__ import annotations

import socket

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
