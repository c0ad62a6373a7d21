"""Checkpoints that one environment writes and another reads: the jobs, and both ends of them.

Run as a module it writes into a folder, or reads from it, under the interpreter that runs it:

    python -m tests.support.versions write FOLDER
    python -m tests.support.versions read FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.distributed import REPOSITORY, run_distributed
from tests.support.layouts import GPT2, LLAMA, make_job, take_step

COMPLETEP = {**LLAMA, "init": "completep", "base_num_layers": 1, "base_hidden_size": 16}
SAVED_AT, STEPS = 2, 5


@dataclass(frozen=True)
class Case:
    """One run, and the other layout under which it goes on."""

    model: dict[str, Any]
    layout: dict[str, Any]
    other: dict[str, Any]
    precision: str = "fp32"
    behind: bool = False


CASES = {
    "tensor": Case(LLAMA, {"tensor": 2}, {"pipeline": 2}, behind=True),
    # The stages share the tied embedding.
    "pipeline": Case(GPT2, {"pipeline": 2}, {"tensor": 2}),
    "distributed optimizer": Case(
        LLAMA, {"distributed_optimizer": True}, {"distributed_optimizer": True, "tensor": 2}
    ),
    # Groups of parameters with rates of their own.
    "completep": Case(COMPLETEP, {"pipeline": 2}, {"tensor": 2}),
    "completep bf16": Case(
        COMPLETEP,
        {"distributed_optimizer": True},
        {"distributed_optimizer": True, "overlap_grad_reduce": True},
        precision="bf16",
    ),
}


def take_steps(student: Any, batches: Any) -> list[list[float]]:
    """Terms, gradient norm and rate of every step after the saved one."""
    results = [take_step(student, batches, step) for step in range(SAVED_AT, STEPS)]
    return [[*r.terms.tolist(), r.grad_norm, r.learning_rate] for r in results]


def write_all(folder: str) -> dict[str, list[list[float]]]:
    """Save every case in a folder of its name; how each goes on."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.background_save import BackgroundSave

    torch.set_num_threads(1)
    found = {}
    with process_group():
        for name, case in CASES.items():
            layout, target = ParallelConfig(**case.layout), Path(folder, name)
            if dist.get_rank() == 0:
                target.mkdir()
            with released_groups(), model_parallel(layout, seed=1) as groups:
                student, batches = make_job(
                    case.model, layout, groups, kd=True, steps=STEPS, precision=case.precision
                )
                for step in range(SAVED_AT):
                    take_step(student, batches, step)
                save = BackgroundSave(student, target, behind=case.behind)
                found[name] = take_steps(student, batches)
                save.finish()
    return found


def read_all(folder: str) -> dict[str, dict[str, list[list[float]]]]:
    """How every case in the folder goes on: under the `same` layout and under the `other`."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    torch.set_num_threads(1)
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in CASES}
    with process_group():
        for name, case in CASES.items():
            for which, keys in (("same", case.layout), ("other", case.other)):
                layout = ParallelConfig(**keys)
                with released_groups(), model_parallel(layout, seed=1) as groups:
                    student, batches = make_job(
                        case.model, layout, groups, kd=True, steps=STEPS, precision=case.precision
                    )
                    load_student(student, Path(folder, name))
                    found[name][which] = take_steps(student, batches)
    return found


def run_under(python: str, what: str, folder: Path) -> tuple[Any, str]:
    """`write` or `read` under another interpreter; what it found, and its version of torch.

    Raises:
        RuntimeError: it failed; the text is the end of what it printed.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [python, "-m", "tests.support.versions", what, str(folder)],
        cwd=REPOSITORY,
        env={**variables, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{python} could not {what}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
    found, version = json.loads(done.stdout.splitlines()[-1])
    return found, version


if __name__ == "__main__":
    function = {"write": write_all, "read": read_all}[sys.argv[1]]
    print(json.dumps([run_distributed(function, 2, folder=sys.argv[2]), torch.__version__]))
