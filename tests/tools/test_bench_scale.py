from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--sparse"]])
def test_processes_share_the_tables_of_a_large_corpus(tmp_path: Path, kind: list[str]):
    """Eight bytes for each document of each process would be ten MB."""
    output = tmp_path / "scale.json"
    command = [sys.executable, "tools/bench_scale.py", "--documents", "1250000", "--processes", "2"]
    subprocess.run(
        [*command, *kind, "--folder", str(tmp_path), "--output", str(output)], check=True, cwd=ROOT
    )
    report = json.loads(output.read_text())
    built, again = report["rows"]
    assert (built["start"], again["start"]) == ("built", "again")
    for row in (built, again):
        assert row["anonymous_mb"] < 8
        assert row["shared_mb"] > 16 * 1.25
    assert again["peak_mb"] < 8 < built["peak_mb"]
    assert report["idx_bytes_on_disk"] < 100_000 or not kind
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
