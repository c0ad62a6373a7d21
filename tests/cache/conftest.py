from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cache_samples import Cache, make_plan, write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    plan = make_plan()
    return Cache(write_cache(tmp_path / "cache", plan), plan)
