"""Runs a function of a test module in several processes, as torchrun would, and returns rank 0's result."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIMIT_S = 600
REPOSITORY = Path(__file__).resolve().parents[2]


def torchrun(num_processes: int, *arguments: str) -> list[str]:
    """The command line that starts `python -m ...arguments` in so many processes on this machine."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_processes),
        *arguments,
    ]


def run_distributed(
    function: Callable[..., Any],
    num_processes: int,
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """Call `function(**arguments)` in every process; arguments and rank 0's result travel as JSON.

    The function opens the process group itself (`distill_pretrain.processes.process.process_group`).
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request.json")
        answer = Path(folder, "answer.json")
        request.write_text(
            json.dumps(
                {
                    "module": _module_name(function),
                    "function": function.__name__,
                    "arguments": arguments,
                    "answer": str(answer),
                }
            )
        )
        run_ranks("tests.support.distributed", [str(request)], num_processes, environment)
        return json.loads(answer.read_text())


def run_ranks(
    module: str,
    arguments: list[str],
    num_processes: int,
    environment: dict[str, str] | None = None,
) -> str:
    """Run `python -m module ...arguments` in every rank of a job as torchrun would, without the seconds that it takes.

    The ranks are forked from a server that has imported torch and megatron-core: see `preloaded`.

    Returns:
        What the ranks printed, one after another.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(num_processes)]
        ranks = []
        for number, path in enumerate(logs):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            variables = {**os.environ, **job, **own, **(environment or {})}
            rank = _processes().Process(
                target=_run_module, args=(module, arguments, variables, str(path))
            )
            rank.start()
            ranks.append(rank)
        _wait(ranks)
        texts = [path.read_text() if path.exists() else "" for path in logs]
        if any(rank.exitcode for rank in ranks):
            ends = [
                f"rank {number} ended with {rank.exitcode}:\n{text[-6000:]}"
                for number, (rank, text) in enumerate(zip(ranks, texts, strict=True))
            ]
            raise AssertionError("distributed run failed:\n" + "\n".join(ends))
        return "".join(texts)


@cache
def _processes() -> BaseContext:
    """How ranks are started: forked; on a GPU's machine from nothing, since CUDA may be awake in what forks."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.support.preloaded"])
    return server


def _run_module(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What `python -u -m module ...arguments` does in the repository, all that it prints in the file `log`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
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


def _wait(ranks: Sequence[BaseProcess]) -> None:
    """Until all have ended, or one has failed: the others would wait for it."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                # A moment for the others to say what they saw.
                time.sleep(1)
                break
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _module_name(function: Callable[..., Any]) -> str:
    """Dotted name from the repository's root, however pytest named the module."""
    path = Path(function.__code__.co_filename).relative_to(REPOSITORY)
    return ".".join(path.with_suffix("").parts)


def _main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    module = __import__(request["module"], fromlist=["_"])
    result = getattr(module, request["function"])(**request["arguments"])
    if os.environ["RANK"] == "0":
        Path(request["answer"]).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
