"""Runs the tests that versions can break under every combination of versions that is supported.

    launch/test.sh --matrix                 every combination whose Python is on this machine
    launch/test.sh --matrix 3.12 oldest     these
    launch/test.sh --matrix --make 3.12     their environments alone, below .matrix/
    launch/test.sh --matrix --table docs/results/versions

With --table it writes there what ran, `matrix.json`, and the table of it, `matrix.md`; combinations that were not run
keep the line they had. It ends with status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".matrix"
PACKAGES = ("torch", "megatron-core", "transformers", "deepspeed", "numpy")

RESUME = (
    "tests/mcore/test_state.py",
    "tests/mcore/test_resume_table.py",
    "tests/train/test_async_save.py",
    "tests/checkpoint/test_versions.py",
    "tests/checkpoint/test_foreign_folders.py",
)
"""Training, checkpoints, resuming."""
ENGINE = (
    *RESUME,
    "tests/train/test_parallel_layouts.py",
    "tests/mcore/test_hybrid.py",
    "tests/train/test_deepspeed_student.py",
    "tests/end_to_end/test_train_job.py",
)
"""Those, layouts, and both engines."""
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
    tests: tuple[str, ...] = ("tests",)

    @property
    def pins(self) -> str:
        """What is installed beside the package and its torch."""
        asked = {"megatron-core": self.megatron, "transformers": self.transformers}
        return " ".join(f"{name}=={version}" for name, version in asked.items() if version)


COMBINATIONS = {
    "oldest": Combination("3.10", "2.6.0", "0.16.1", "5.5.0", (*RESUME, *TRANSFORMERS)),
    "3.11": Combination("3.11", "2.13.0", "0.16.1"),
    "0.17": Combination("3.12", "2.13.0", "0.17.1", tests=RESUME),
    "0.18": Combination("3.12", "2.11.0", "0.18.2", tests=RESUME),
    "3.12": Combination("3.12", "2.13.0", "0.19.2", tests=ENGINE),
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


def run(name: str, python: Path, workers: int) -> dict[str, object]:
    """Run a combination's tests in so many workers; how many there were and what became of them."""
    results = ENVIRONMENTS / f"{name}.xml"
    results.unlink(missing_ok=True)
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
    start = time.monotonic()
    done = subprocess.run(
        [*command, *options, f"--junitxml={results}", *COMBINATIONS[name].tests],
        cwd=ROOT,
        env=variables,
        check=False,
    )
    if not results.exists():
        raise SystemExit(f"version_matrix.py: error: {name}: pytest ended with {done.returncode}")
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    return {
        **versions(python),
        "files": list(COMBINATIONS[name].tests),
        "passed": counts["tests"] - bad - counts["skipped"],
        "failed": bad,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - start),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(found: dict[str, dict[str, object]]) -> str:
    """Markdown of what ran."""
    columns = ("python", *PACKAGES, "passed", "failed", "skipped", "minutes", "date")
    lines = [
        "| combination | " + " | ".join(columns) + " |",
        "|---|" + "---|" * (1 + len(PACKAGES)) + "--:|" * 4 + "---|",
    ]
    for name in (name for name in COMBINATIONS if name in found):
        row = {**found[name], "minutes": f"{int(str(found[name]['seconds'])) / 60:.1f}"}
        lines.append(f"| {name} | " + " | ".join(str(row[key]) for key in columns) + " |")
    head = (
        f"Written by `launch/test.sh --matrix --table`, on {platform.system()} {platform.machine()}"
    )
    return f"{head} without a GPU.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMBINATIONS)}")
    parser.add_argument("--make", action="store_true", help="make the environments, run nothing")
    most = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=most, help="of pytest; %(default)s here")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="where what ran is written")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(COMBINATIONS)
    if unknown:
        parser.error(f"no such combination: {', '.join(sorted(unknown))}")
    kept = arguments.table / "matrix.json" if arguments.table else None
    found = json.loads(kept.read_text()) if kept and kept.exists() else {}
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
        print(f"== {name}: {' '.join(COMBINATIONS[name].tests)}", flush=True)
        found[name] = run(name, python, arguments.workers)
        print(f"== {name}: {found[name]}", flush=True)
        if found[name]["failed"] or not found[name]["passed"]:
            failed.append(name)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found, indent=1) + "\n")
            kept.with_suffix(".md").write_text(table(found))
    if failed:
        print(f"version_matrix.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
