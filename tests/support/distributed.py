"""Runs a function of a test module in several processes, as torchrun would, and returns rank 0's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    The function opens the process group itself (`distill_pretrain.dist.process.process_group`).
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
        ours = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            torchrun(num_processes, "-m", "tests.support.distributed", str(request)),
            cwd=REPOSITORY,
            env={**os.environ, **ours, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise AssertionError(
                f"distributed run failed:\n{done.stdout[-3000:]}\n{done.stderr[-12000:]}"
            )
        return json.loads(answer.read_text())


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
