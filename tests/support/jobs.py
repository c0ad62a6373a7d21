"""Small jobs through the real command line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from distill_pretrain.cli.main import main
from tests.support.distributed import REPOSITORY, run_ranks, torchrun

SEQ_LEN = 64


def run_cli(*arguments: str) -> None:
    """Run a verb in this process; fail the test unless it succeeds."""
    status = main(list(arguments))
    if status != 0:
        pytest.fail(f"distill-pretrain {' '.join(arguments)} exited with {status}")


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 a job with every process it started (torchrun gives its workers sessions of their own)."""
    children = psutil.Process(process.pid).children(recursive=True)
    for victim in [*children, process]:
        # As one rank falls, torchrun ends the others.
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(children, timeout=10)
    process.wait()


@dataclass(frozen=True)
class Job:
    """A recipe over a tokenised corpus, and the folders its verbs write."""

    folder: Path
    tokens: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def recipe(self) -> Path:
        path = self.folder / "recipe.yaml"
        if not path.exists():
            path.write_text(
                yaml.safe_dump(
                    {
                        "data": {
                            "tokens": str(self.tokens / "train"),
                            "held_out_tokens": str(self.tokens / "held_out"),
                            "seq_len": SEQ_LEN,
                            "num_sequences": 40,
                        },
                        "teacher": {"path": str(self.teacher)},
                        "capture": {
                            "output_dir": str(self.cache),
                            "micro_batch_size": 4,
                            "shard_sequences": 10,
                            "block_tokens": 48,
                            "num_draws": 20,
                        },
                        "model": {
                            "num_layers": 2,
                            "hidden_size": 32,
                            "ffn_hidden_size": 64,
                            "num_attention_heads": 4,
                            "num_query_groups": 2,
                        },
                        "optimizer": {"lr": 5e-3, "warmup_steps": 2, "decay_style": "constant"},
                        "train": {
                            "output_dir": str(self.folder / "run"),
                            "steps": 12,
                            "global_batch_size": 8,
                            "micro_batch_size": 4,
                            "checkpoint_interval": 5,
                            "threads": 1,
                        },
                    }
                )
            )
        return path

    def cli(self, verb: str, *overrides: str) -> None:
        """Run a verb on this job's recipe in this process."""
        run_cli(verb, str(self.recipe), *overrides)

    def command(self, verb: str, *overrides: str, num_processes: int = 1) -> list[str]:
        """The command line of a verb on this job's recipe in other processes."""
        arguments = ["-m", "distill_pretrain", verb, str(self.recipe), *overrides]
        if num_processes == 1:
            return [sys.executable, *arguments]
        return torchrun(num_processes, *arguments)

    def start(self, verb: str, *overrides: str, num_processes: int = 1) -> subprocess.Popen[str]:
        """Start a verb in other processes."""
        return subprocess.Popen(
            self.command(verb, *overrides, num_processes=num_processes),
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str, *overrides: str, num_processes: int = 1) -> str:
        """Run a verb in other processes; fail the test unless it succeeds; return its output."""
        if num_processes > 1:
            return run_ranks(
                "distill_pretrain", [verb, str(self.recipe), *overrides], num_processes
            )
        process = self.start(verb, *overrides, num_processes=num_processes)
        output, errors = process.communicate(timeout=600)
        if process.returncode != 0:
            pytest.fail(f"{verb} exited with {process.returncode}:\n{output}\n{errors[-6000:]}")
        return output
