"""Runs the commands of the documentation as they are written, and says which are not run and why.

    python tools/run_pages.py --list            what is run, and what is not
    python tools/run_pages.py                   runs it, in a temporary copy of the files that git has
    python tools/run_pages.py --keep trial      in that folder, which stays

A command is a line of a `bash` block of a page, or an indented line of the README. It is run as it stands, in a copy of
this repository in which two things differ: the recipes of the quickstart train few steps, and the files that a reader
is told to have (`student.yaml`, `path/to/text`, ...) are there. A comment before a block says what is otherwise:

    <!-- run as: launch/quickstart.sh --short -->     this line is run in the block's place
    <!-- run by: tests/test_launch_files.py -->       a test runs the block
    <!-- not run: it needs a cluster -->              nothing here can run it

It ends with status 1 if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
MARK = r"(?:<!-- (?P<mark>run as|run by|not run): (?P<word>[^\n]*?) -->\n+)?"
FENCED = re.compile(MARK + r"^(?P<indent> *)```bash\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
INDENTED = re.compile(MARK + r"(?P<body>(?:^    \S[^\n]*\n|^\n(?=    ))+)", re.M)
FIRST = ("docs/start.md", "README.md")
"""What these write, later pages read."""
SMALL = {
    "data": {"data": {"num_sequences": 64}},
    "tokenize": {"tokenizer": {"vocab_size": 512, "training_bytes": 200_000}},
    "teacher": {  # the canary wants one that has learnt something
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160},
        "optimizer": {"warmup_steps": 5},
        "train": {"steps": 60, "checkpoint_interval": 60},
    },
    "student_ce": {"train": {"steps": 6, "checkpoint_interval": 6}},
    "report": {"eval": {"num_sequences": 8}},
}
"""Recipe of the quickstart -> the settings that make it small here."""
STUDENT = "launch/recipes/quickstart/student_kd.yaml"
OF_THE_READER = {
    "tokenize.yaml": {
        "base": "launch/recipes/quickstart/tokenize.yaml",
        "corpus": {"paths": ["path/to/text"], "output_dir": "runs/tokens"},
    },
    "distill.yaml": {
        "base": "launch/recipes/quickstart/capture.yaml",
        "data": {"tokens": "runs/tokens/train", "cache": "runs/cache"},
        "capture": {"output_dir": "runs/cache", "micro_batch_size": 2, "sanity_gate": "warn"},
    },
    "capture.yaml": {"base": "distill.yaml", "data": {"cache": None}},
    "student.yaml": {
        "base": STUDENT,
        "data": {
            "tokens": "runs/tokens/train",
            "cache": "runs/cache",
            "held_out_tokens": "runs/tokens/held_out",
        },
        "train": {"output_dir": "runs/student", "micro_batch_size": 2, "global_batch_size": 64},
    },
    "prune.yaml": {
        "data": {"tokens": "runs/tokens/train", "seq_len": 64},
        "prune": {
            "source": "runs/student",
            "output_dir": "runs/pruned",
            "targets": {"narrow": {"ffn_hidden_size": 64}},
            "num_sequences": 4,
            "loss_sequences": 2,
        },
    },
    "report.yaml": {
        "base": "launch/recipes/quickstart/report.yaml",
        "data": {"tokens": "runs/tokens/train", "held_out_tokens": "runs/tokens/held_out"},
        "eval": {"models": {"student": "runs/student"}, "output": "runs/eval.json"},
        "report": {
            "runs": {"student": "runs/student"},
            "eval": "runs/eval.json",
            "output_dir": "runs/report",
        },
    },
}
"""File that the pages tell a reader to write -> what stands in it here."""


class Command(NamedTuple):
    """A command of a page. `reason` is empty where it is run as it stands or as `instead` says."""

    page: str
    line: int
    text: str
    instead: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The pages written by hand, those whose results others read first."""
    patterns = ("README.md", "docs/*.md", "docs/guides/*.md", "docs/results/README.md")
    found = sorted(page for pattern in patterns for page in ROOT.glob(pattern))
    first = [ROOT / name for name in FIRST]
    return [*first, *(page for page in found if page not in first)]


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page in their order."""
    text = page.read_text(encoding="utf-8")
    for block in (INDENTED if page.name == "README.md" else FENCED).finditer(text):
        mark, word = block["mark"], block["word"]
        first = text.count("\n", 0, block.start("body")) + 1
        for number, line in enumerate(block["body"].splitlines(), first):
            if line.strip():
                yield Command(
                    str(page.relative_to(ROOT)),
                    number,
                    line.strip(),
                    instead=word if mark == "run as" else "",
                    reason=f"{mark}: {word}" if mark in {"run by", "not run"} else "",
                )


def prepare(folder: Path) -> None:
    """A copy of what git has, with small recipes, and with the files that a reader is told to have."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    library = [
        str(path.relative_to(ROOT)) for path in ROOT.glob("distill_pretrain/cache/codec/hc/*.so")
    ]
    for name in [*filter(None, os.fsdecode(listed.stdout).split("\0")), *library]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name, settings in SMALL.items():
        path = folder / f"launch/recipes/quickstart/{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        for section, values in settings.items():
            recipe.setdefault(section, {}).update(values)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name, recipe in OF_THE_READER.items():
        (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    text = folder / "path/to/text"
    text.mkdir(parents=True)
    for module in (argparse, re, shutil, subprocess, tempfile, yaml):
        assert module.__file__ is not None
        shutil.copy2(module.__file__, text)


def run(command: Command, folder: Path, log: Path) -> tuple[int, float]:
    """Run a command as a user's shell does; its status, and its seconds."""
    began = time.monotonic()
    environment = {
        **os.environ,
        "VENV": "none",
        "PYTHONPATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.instead or command.text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode, time.monotonic() - began


def run_all(found: Iterable[Command], folder: Path) -> int:
    """Run what is to be run and print a line for each; how many failed."""
    failures = 0
    tried = set()
    for command in found:
        text = command.instead or command.text
        if command.reason or (command.instead and (command.page, text) in tried):
            continue
        tried.add((command.page, text))
        log = folder / "command.log"
        status, seconds = run(command, folder, log)
        print(
            f"{'ok' if status == 0 else 'FAILED':6} {seconds:5.0f} s  {command.place:32} {text}",
            flush=True,
        )
        if status:
            failures += 1
            print(log.read_text(errors="replace")[-3000:], flush=True)
    return failures


def main() -> int:
    """Run the commands of the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the commands, and run none")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which stays")
    options = parser.parse_args()
    found = [command for page in pages() for command in commands(page)]
    if options.list:
        for command in found:
            told = command.reason or (command.instead and f"run as: {command.instead}")
            print(f"{command.place:32} {command.text}{'   # ' if told else ''}{told}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary, "trial")).resolve()
        folder.mkdir(parents=True)
        prepare(folder)
        failures = run_all(found, folder)
    left_out = [command for command in found if command.reason]
    print(f"{len(found)} commands, {len(left_out)} of them not run here, {failures} failed")
    for command in left_out:
        print(f"  {command.place:32} {command.reason}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
