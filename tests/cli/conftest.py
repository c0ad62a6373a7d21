from __future__ import annotations

from pathlib import Path

import pytest
from small_cache import SmallCache, make_small_cache


@pytest.fixture
def small_cache(tmp_path: Path) -> SmallCache:
    return make_small_cache(tmp_path)
