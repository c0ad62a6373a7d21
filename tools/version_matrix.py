"""Runs the tests that versions can break under every combination of versions that is supported.

    launch/test.sh --matrix                 every combination whose Python is on this machine
    launch/test.sh --matrix 3.12 oldest     these
    launch/test.sh --matrix --make 3.12     their environments alone, below .matrix/
    launch/test.sh --matrix --table docs/results/versions
    launch/test.sh --matrix --table docs/results/versions --only tests/teacher/test_gate.py oldest

With --table it writes there what ran, file by file, `matrix.json`, and the table of it, `matrix.md`; what was not run
keeps the figures it had under the same versions. It ends with status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".matrix"
PACKAGES = ("torch", "megatron-core", "transformers", "deepspeed", "numpy")
FATES = ("passed", "failed", "skipped")

RESUME = (
    "tests/test_every_module.py",
    "tests/processes/test_process.py",
    "tests/mcore/test_state.py",
    "tests/mcore/test_resume_table.py",
    "tests/train/test_async_save.py",
    "tests/checkpoint/test_versions.py",
    "tests/checkpoint/test_foreign_folders.py",
)
"""Imports, training, checkpoints, resuming."""
ENGINE = (
    *RESUME,
    "tests/train/test_parallel_layouts.py",
    "tests/mcore/test_hybrid.py",
    "tests/train/test_deepspeed_student.py",
    "tests/end_to_end/test_train_job.py",
    "tests/end_to_end/test_quiet_console.py",
)
"""Those, layouts, and both engines."""
FAMILIES = (
    "tests/checkpoint/test_families.py",
    "tests/checkpoint/test_family_frame.py",
    "tests/mcore/test_missing_pieces.py",
    "tests/teacher/test_teachers_only.py",
)
"""Families of models in megatron-core, and what it lacks for others."""
TRANSFORMERS = (
    "tests/checkpoint/test_hf_conversion.py",
    "tests/cli/test_export.py",
    "tests/corpus/test_tokenizers.py",
    "tests/teacher",
)
"""Reading teachers of Hugging Face, and writing students as such."""


@dataclass(frozen=True)
class Combination:
    """Versions that are asked for, empty for the newest, and the tests that they get."""

    python: str
    torch: str
    megatron: str
    transformers: str = ""
    tests: tuple[str, ...] = field(kw_only=True)

    @property
    def pins(self) -> str:
        """What is installed beside the package and its torch."""
        asked = {"megatron-core": self.megatron, "transformers": self.transformers}
        return " ".join(f"{name}=={version}" for name, version in asked.items() if version)


COMBINATIONS = {
    "oldest": Combination("3.10", "2.6.0", "0.16.1", "5.5.0", tests=(*RESUME, *TRANSFORMERS)),
    "3.11": Combination("3.11", "2.13.0", "0.16.1", tests=(*ENGINE, *TRANSFORMERS)),
    "0.17": Combination("3.12", "2.13.0", "0.17.1", tests=RESUME),
    "0.18": Combination("3.12", "2.11.0", "0.18.2", tests=RESUME),
    "3.12": Combination(
        "3.12",
        "2.13.0",
        "0.19.2",
        tests=(*ENGINE, *FAMILIES, "tests/tools/test_bench_rivals.py"),
    ),
    "3.13": Combination("3.13", "", "0.19.2", tests=RESUME),
}


def make(name: str) -> Path | None:
    """The interpreter of a combination's environment, made where there is none; None if its Python is not here.

    Raises:
        SystemExit: it could not be made.
    """
    asked = COMBINATIONS[name]
    environment = ENVIRONMENTS / name
    script = 'source launch/env.sh hf eval test >&2 || { _env_python "$PYTHON" >/dev/null && exit 1; exit 3; }'
    variables = {
        **os.environ,
        "VENV": str(environment),
        "PYTHON": asked.python,
        "TORCH_SPEC": f"torch=={asked.torch}" if asked.torch else "torch",
        "PINS": asked.pins,
    }
    ENVIRONMENTS.mkdir(exist_ok=True)
    status = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, check=False).returncode
    if status == 3:
        return None
    if status:
        raise SystemExit(f"version_matrix.py: error: the environment of {name} could not be made")
    return environment / "bin/python"


def versions(python: Path) -> dict[str, str]:
    """What an environment has."""
    program = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))"
    )
    done = subprocess.run(
        [python, "-c", program, *PACKAGES], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(name: str, python: Path, workers: int, tests: Sequence[str]) -> dict[str, Any]:
    """Run these tests of a combination in so many workers; its versions, and what became of the tests of each file."""
    variables = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        # The environment that runs this has other versions of most of them.
        "DISTILL_PRETRAIN_OTHER_PYTHON": sys.executable,
    }
    command = [str(python), "-m", "pytest", "-n", str(workers)]
    options = ["--dist", "loadfile", "-q", "-rfEs", "-m", "not gpu", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        done = subprocess.run(
            [*command, *options, f"--junitxml={results}", *tests],
            cwd=ROOT,
            env=variables,
            check=False,
        )
        if not results.exists():
            raise SystemExit(
                f"version_matrix.py: error: {name}: pytest ended with {done.returncode}"
            )
        files = results_by_file(results)
    return {**versions(python), "date": time.strftime("%Y-%m-%d"), "files": files}


def results_by_file(results: Path) -> dict[str, dict[str, int]]:
    """How many tests of each file passed, failed and were skipped, of pytest's JUnit file."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        # Of a file that could not be imported there is no class, and its name stands in the other place.
        file = (case.get("classname") or case.get("name", "")).replace(".", "/") + ".py"
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        fate = "failed" if failed else "skipped" if skipped else "passed"
        found.setdefault(file, Counter())[fate] += 1
    return {file: {fate: found[file][fate] for fate in FATES} for file in sorted(found)}


def totals(found: dict[str, Any]) -> dict[str, int]:
    """How many tests of a combination passed, failed and were skipped."""
    return {fate: sum(file[fate] for file in found["files"].values()) for fate in FATES}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of what ran."""
    columns = ("python", *PACKAGES, *FATES, "date")
    lines = [
        "| combination | " + " | ".join(columns) + " |",
        "|---|" + "---|" * (1 + len(PACKAGES)) + "--:|" * len(FATES) + "---|",
    ]
    for name in (name for name in COMBINATIONS if name in found):
        row = {**found[name], **totals(found[name])}
        lines.append(f"| {name} | " + " | ".join(str(row[key]) for key in columns) + " |")
    head = (
        f"Written by `launch/test.sh --matrix --table`, on {platform.system()} {platform.machine()}"
    )
    return f"# Tests by versions\n\n{head} without a GPU.\n\n" + "\n".join(lines) + "\n"


def keep(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Put what a combination did beside what the others did, and its other files under the same versions."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "matrix.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    before = known.get(name, {})
    if all(before.get(key) == found[key] for key in ("python", *PACKAGES)):
        found = {**found, "files": {**before["files"], **found["files"]}}
    known[name] = found
    kept.write_text(json.dumps(known, indent=1) + "\n")
    kept.with_suffix(".md").write_text(table(known))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMBINATIONS)}")
    parser.add_argument("--make", action="store_true", help="make the environments, run nothing")
    most = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=most, help="of pytest; %(default)s here")
    parser.add_argument("--only", action="append", metavar="FILE", help="these tests alone")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="where what ran is written")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(COMBINATIONS)
    if unknown:
        parser.error(f"no such combination: {', '.join(sorted(unknown))}")
    failed = []
    for name in arguments.names or COMBINATIONS:
        python = make(name)
        if python is None:
            print(f"== {name}: left out, no Python {COMBINATIONS[name].python} here", flush=True)
            if arguments.names:
                failed.append(name)
            continue
        if arguments.make:
            continue
        tests = arguments.only or COMBINATIONS[name].tests
        print(f"== {name}: {' '.join(tests)}", flush=True)
        found = run(name, python, arguments.workers, tests)
        counts = totals(found)
        print(f"== {name}: {counts}", flush=True)
        if counts["failed"] or not counts["passed"]:
            failed.append(name)
        if arguments.table:
            keep(arguments.table, name, found)
    if failed:
        print(f"version_matrix.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
