from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import REPOSITORY


@pytest.mark.parametrize("tool", ["bench_cache", "bench_step", "study_depth"])
def test_a_recipe_that_is_none_is_one_message(tool: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {tokns: x}\n")
    done = subprocess.run(
        [sys.executable, REPOSITORY / f"tools/{tool}.py", str(recipe)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "tokns" in done.stderr
