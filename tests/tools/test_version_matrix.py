from __future__ import annotations

import subprocess
import sys

from tools.version_matrix import results_by_file


def test_results_are_counted_by_file_those_of_a_file_that_cannot_be_imported_too(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "tests/test_sound.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\ndef test_b(): assert 0\n\ndef test_c(): pytest.skip('why')\n"
    )
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--junitxml=results.xml", "tests"],
        cwd=tmp_path,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    assert results_by_file(tmp_path / "results.xml") == {
        "tests/test_broken.py": {"passed": 0, "failed": 1, "skipped": 0},
        "tests/test_sound.py": {"passed": 1, "failed": 1, "skipped": 1},
    }
