"""One rank of a test's job, in a process forked from one that has imported what jobs import."""

from __future__ import annotations

import io
import os
import runpy
import sys

# For the server of forks alone: every new process would take seconds for them.
import torch._inductor.compile_fx  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import distill_pretrain.mcore.schedule
import distill_pretrain.teacher.capture
import distill_pretrain.train.job  # noqa: F401


def run_module(
    module: str, arguments: list[str], environment: dict[str, str], folder: str, log: str
) -> None:
    """What `python -u -m module ...arguments` does in a folder, all that it prints in the file `log`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(standard, "w", closefd=False), write_through=True)
        for standard in (1, 2)
    )
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
