"""A job that waits for a process in silence names that process and ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.data.batches import BatchSource, StudentBatches
from distill_pretrain.processes.process import process_group
from distill_pretrain.processes.watchdog import STUCK_EXIT_CODE, Watchdog
from tests.support.distributed import run_distributed
from tests.support.layouts import WalkPlan, WalkTargets
from tests.support.notices import noted


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
                    while not store.check(["heartbeat/1"]):
                        time.sleep(0.05)
                    os.kill(pid, signal.SIGSTOP)
                else:
                    dog.doing("step 7: reading")
                    time.sleep(8)
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
        dog.doing("step 7: computing")
        dog.start()
        dog._thread.join(timeout=60)
        dog.close()
    assert codes == [STUCK_EXIT_CODE]
    said = capsys.readouterr().err
    assert 'rank 0 is at "step 7: computing"' in said and "rank 0 is gone (Broken pipe)" in said


def watched(
    timeout: float, moments: list[float], act: Callable[[Watchdog, float], None]
) -> list[int]:
    """With what a lonely watchdog ended its process, if it did, while `act` was called at these seconds."""
    codes: list[int] = []
    with process_group():
        dog = Watchdog(dist.HashStore(), timeout, end=codes.append)
        started = time.monotonic()
        dog.start()
        for moment in moments:
            time.sleep(max(0.0, started + moment - time.monotonic()))
            act(dog, moment)
        dog.close()
    return codes


def test_a_rank_that_moves_again_is_left_alone_and_watched_on(capsys):
    # Stuck from 0.8 s on; the second look takes 0.6 s more.
    again = [1.1 + 0.1 * n for n in range(15)]
    assert watched(0.8, again, lambda dog, _: dog.doing("step 8: computing")) == []
    assert capsys.readouterr().err == ""
    assert watched(0.8, [*again, 6.0], lambda dog, at: at < 6 and dog.alive()) == [STUCK_EXIT_CODE]
    assert "no progress for 1 s" in capsys.readouterr().err


def test_a_rank_is_known_from_its_first_moment():
    store = dist.HashStore()
    with process_group():
        dog = Watchdog(store, 1000.0)  # looks every ten seconds
        dog.start()
        deadline = time.monotonic() + 5
        while not store.check(["heartbeat/0"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        dog.close()
    assert store.check(["heartbeat/0"])


def test_progress_of_any_rank_is_progress():
    store = dist.HashStore()
    codes: list[int] = []
    with process_group():
        waiting, working = (Watchdog(store, 0.8, end=codes.append) for _ in range(2))
        for dog in (waiting, working):
            dog.start()
        waiting.doing("step 3: computing")
        for _ in range(15):
            time.sleep(0.2)
            working.alive()
        assert codes == []
        for dog in (waiting, working):
            dog.close()


@pytest.mark.parametrize(
    ("doing", "place"),
    [("step 3: writing the checkpoint", "file system"), ("step 3: computing", "network")],
)
def test_what_all_ranks_do_says_where_to_look(capsys, doing, place):
    assert watched(0.4, [0.0, 3.0], lambda dog, at: at or dog.doing(doing)) == [STUCK_EXIT_CODE]
    said = capsys.readouterr().err
    assert f'all ranks are live and at "{doing}": look at the {place}, or' in said


def walk_batches() -> StudentBatches:
    """Four micro-batches of two sequences a step."""
    plan = WalkPlan()
    return StudentBatches(
        [BatchSource(plan=plan, cache=WalkTargets(plan), num_sequences=plan.num_sequences)],
        seed=3,
        global_batch_size=8,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
        device=torch.device("cpu"),
    )


def test_reading_and_hashing_say_that_they_go_on(tmp_path):
    from distill_pretrain.checkpoint.record import hash_files
    from distill_pretrain.processes import watchdog as module

    (tmp_path / "file").write_bytes(b"x")
    dog = Watchdog(dist.HashStore(), 100.0)
    with mock.patch.object(module, "_current", dog):
        hash_files(tmp_path, ["file"])
        assert dog._moves == 1
        batches = walk_batches()
        batches.host_batches(0, with_targets=True)
        assert dog._moves == 1 + 8 + 4  # sequences and micro-batches
    batches.host_batches(0, with_targets=True)  # watched by nobody


def test_waiting_for_a_store_is_a_sign_of_life_all_along(monkeypatch):
    from distill_pretrain.data import retry
    from distill_pretrain.errors import CacheUnreadable
    from distill_pretrain.processes import watchdog as module

    monkeypatch.setattr(retry, "SIGN_OF_LIFE_S", 0.02)
    dog = Watchdog(dist.HashStore(), 100.0)
    monkeypatch.setattr(module, "_current", dog)
    failures = [CacheUnreadable("the cache cannot be read", where="x.dpt")]

    def read() -> str:
        if failures:
            raise failures.pop()
        return "read"

    with noted() as said:
        assert retry.read_with_retries(read, retry_s=0.3) == "read"
    assert len(said) == 1 and dog._moves >= 5


def test_a_stopped_process_is_named():
    text = run_distributed(reports, 2, kind="stopped")
    pid = text.rpartition(" ")[2]
    assert "rank 1 is silent" in text and f"pid {pid}" in text and "step 7: computing" in text


def test_a_process_that_does_something_else_is_named():
    text = run_distributed(reports, 2, kind="reading")
    assert "rank 1" in text and 'is at "step 7: reading"' in text and "silent" not in text
