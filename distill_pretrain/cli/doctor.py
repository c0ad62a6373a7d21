"""`distill-pretrain doctor`. Uses the standard library alone, so that it runs where nothing else does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.jobs.doctor.checks import examine

if TYPE_CHECKING:
    from distill_pretrain.jobs.recipe import Recipe

SECTIONS = ()

HELP = """
Checks this machine: one line for each package and device, what was found, and what it is for; for anything missing or
unusable, the line that installs it. Also checks the file system of FOLDER: locks, which `capture` needs where several
processes write one cache, the replacing of files, and space. Name the folder your caches and checkpoints go to, if it
is on another file system.

Exit status 2 if something required is missing, else 0.

Example
  distill-pretrain doctor /data/caches
"""


class MachineNotReady(DistillPretrainError):
    """Something required is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=Path(),
        help="folder on the file system that caches go to (default: the current one)",
    )


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        MachineNotReady: a required package is missing.
    """
    findings = examine(args.folder)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        for line in finding.lines(width):
            print(line)
    lacking = [finding for finding in findings if finding.required and not finding.usable]
    if lacking:
        raise MachineNotReady(
            "something required is missing",
            found=", ".join(f"{finding.name}: {finding.found}" for finding in lacking),
            remedy="; ".join(dict.fromkeys(finding.install for finding in lacking)),
        )
