"""Every module of the package can be imported, by every Python and with every version of what it stands on."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import distill_pretrain

PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        # An extra, or what this megatron-core does not have; tests of its own need it.
        if (missing.name or "").startswith("distill_pretrain"):
            raise
        print(f"{name}: without {missing.name}")
"""


def test_every_module_is_imported():
    names = [
        found.name
        for found in pkgutil.walk_packages(distill_pretrain.__path__, "distill_pretrain.")
        if not found.name.endswith(("__main__", "._hc"))  # the coder's library is not Python's
    ]
    assert len(names) > 200
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    allowed = ("lm_eval", "megatron.core.models.hybrid")
    assert all(line.endswith(allowed) for line in done.stdout.splitlines() if ": without " in line)
