"""A job that waits for a process in silence names that process and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from distill_pretrain.processes.process import process_group
from distill_pretrain.processes.watchdog import STUCK_EXIT_CODE, Watchdog
from tests.support.distributed import run_distributed


def reports(kind: str) -> str:
    """What rank 0's watchdog prints while rank 1 keeps it waiting."""
    import contextlib
    import io

    with process_group():
        store = dist.distributed_c10d._get_default_store()
        said, codes = io.StringIO(), []
        dog = Watchdog(store.clone(), 2.0, end=codes.append)
        with contextlib.redirect_stderr(said):
            dog.start()
            dog.doing("step 7: computing")
            if dist.get_rank() == 1:
                pid = os.getpid()
                store.set("pid", str(pid))
                if kind == "stopped":
                    # A child wakes it, so that the test ends.
                    if os.fork() == 0:
                        time.sleep(10)
                        os.kill(pid, signal.SIGCONT)
                        os._exit(0)
                    while not store.check(["beat/1"]):
                        time.sleep(0.05)
                    os.kill(pid, signal.SIGSTOP)
                else:
                    for _ in range(16):
                        dog.doing("step 7: reading")
                        time.sleep(0.5)
            dist.all_reduce(torch.zeros(1))
            dog.close()
        if dist.get_rank() == 0:
            assert codes == [STUCK_EXIT_CODE], codes
            return said.getvalue() + "pid of rank 1: " + store.get("pid").decode()
        return ""


class LostStore:
    """The store of a rank 0 that is gone."""

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Broken pipe")

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Broken pipe")


def test_a_store_that_is_gone_is_said_and_the_process_ends(capsys):
    codes: list[int] = []
    with process_group():
        dog = Watchdog(LostStore(), 0.4, end=codes.append)
        dog.start()
        dog.doing("step 7: computing")
        dog._thread.join(timeout=60)
        dog.close()
    assert codes == [STUCK_EXIT_CODE]
    said = capsys.readouterr().err
    assert 'rank 0 is at "step 7: computing"' in said and "rank 0 is gone (Broken pipe)" in said


def test_the_helpers_of_a_process_end_with_it():
    code = (
        "import multiprocessing, sys, threading\n"
        "from distill_pretrain.processes.watchdog import end_process\n"
        "if __name__ == '__main__':\n"
        "    helper = multiprocessing.get_context('spawn').Manager()\n"
        "    threading.Thread(target=end_process, args=(75,)).start()\n"
        "    threading.Event().wait()\n"
    )
    command = [sys.executable, "-c", code]
    # Ends only when nobody holds the pipe open any more.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr


def test_a_stopped_process_is_named():
    text = run_distributed(reports, 2, kind="stopped")
    pid = text.rpartition(" ")[2]
    assert "rank 1 is silent" in text and f"pid {pid}" in text and "step 7: computing" in text


def test_a_process_that_does_something_else_is_named():
    text = run_distributed(reports, 2, kind="reading")
    assert "rank 1" in text and 'is at "step 7: reading"' in text and "silent" not in text
