"""What the tools share: their command line, the machine they ran on, and the JSON they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import distill_pretrain
from distill_pretrain.errors import DistillPretrainError


def command_line(
    doc: str | None, *, recipe: bool, figures: bool = False
) -> argparse.ArgumentParser:
    """A parser with `--output`, and with a recipe and its overrides, or `--figures`, if a tool takes them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    if recipe:
        parser.add_argument("recipe", type=Path)
        parser.add_argument("overrides", nargs="*")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    if figures:
        parser.add_argument(
            "--figures", type=Path, metavar="FILE.jsonl", help="append each figure as it is found"
        )
    return parser


def environment(*packages: str) -> dict[str, Any]:
    """Hardware, date, and versions of Python, this package and others."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "distill-pretrain": distill_pretrain.__version__,
        **{package: version(package) for package in packages},
    }


def run(main: Callable[[], object]) -> NoReturn:
    """Run a tool to its exit status; what its user got wrong is one message and status 2, as in the package."""
    try:
        status = main()
    except DistillPretrainError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def append_line(path: Path | None, figures: dict[str, Any]) -> None:
    """Append figures as a line of JSON, on disk when this returns, if a file was asked for."""
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
            file.flush()
            os.fsync(file.fileno())


def kept_rows(
    path: Path | None,
    report: Mapping[str, Any],
    measured: Mapping[str, Sequence[str]],
    versions: Sequence[str],
) -> list[Any]:
    """Rows of an earlier report that still stand: not measured again, with the same settings and versions.

    Args:
        path: of the earlier report; one that is not there has no rows.
        report: the new one without rows: `environment`, and settings.
        measured: key of a row -> its values in the rows that are measured again.
        versions: keys of `environment` that must be the same.
    """
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text())
    theirs, ours = found["environment"], report["environment"]
    same = all(found[key] == value for key, value in report.items() if key != "environment")
    if not same or any(theirs[name] != ours[name] for name in versions):
        return []
    return [row for row in found["rows"] if all(row[key] not in measured[key] for key in measured)]


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if a file was asked for."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")
