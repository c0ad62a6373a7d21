"""Settings of the whole test suite."""

from __future__ import annotations

import os

import pytest

# Tests share the machine with the processes they start; must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
