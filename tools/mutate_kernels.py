"""Break the sparse_kd kernels on purpose, one change at a time, and see that the tests' cases notice each.

    python tools/mutate_kernels.py [--only TEXT] [--output docs/results/kernels/mutations.md]

Needs a C++ compiler, no GPU. Ends with status 1 if a broken kernel passes, or the right one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BATCH = 10

HEADER = """\
# Broken kernels that the tests notice

`python tools/mutate_kernels.py` makes one change to `sparse_kd.cuh`, compiles it for the CPU and runs the cases of
`mutation_checks` in `tests/kernels/sparse_kd_cases.py`: {killed} of {total} changes are noticed, and the right source
passes. A schedule other than 0 is a random order of the threads.

| change | first noticed by |
|---|---|
"""


def table(results: dict[str, str | None]) -> str:
    rows = [
        f"| {name} | {'**not noticed**' if found is None else found.replace('|', '/')} |"
        for name, found in results.items()
    ]
    killed = sum(found is not None for found in results.values())
    return HEADER.format(killed=killed, total=len(results)) + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only changes whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table here")
    options = parser.parse_args(arguments)

    from tests.kernels.sparse_kd_mutants import MUTANTS, noticed, poison_buffers

    poison_buffers()
    names = [None, *(name for name in MUTANTS if options.only in name)]
    results: dict[str, str | None] = {}
    for first in range(0, len(names), BATCH):
        batch = names[first : first + BATCH]
        with tempfile.TemporaryDirectory() as folder:
            for name, found in zip(batch, noticed(batch, Path(folder)), strict=True):
                if name is not None:
                    results[name] = found
                    print(f"{name}: {found or 'NOT NOTICED'}", flush=True)
                elif found is not None:
                    print(f"the right source fails: {found}", file=sys.stderr)
                    return 1
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table(results), encoding="utf-8")
    return int(None in results.values())


if __name__ == "__main__":
    sys.exit(main())
