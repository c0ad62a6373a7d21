"""One small corpus and cache for all tests of the API and the examples: what examples/own_teacher.py writes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from distill_pretrain import SequencePlan, TokenIndex

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def own_teacher() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "own_teacher.py"))


@pytest.fixture(scope="session")
def folder(own_teacher, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("example")
    own_teacher["main"](made)
    return made


@pytest.fixture(scope="session")
def plan(folder) -> SequencePlan:
    return SequencePlan(TokenIndex.open(folder / "train"), seq_len=32, seed=1)
