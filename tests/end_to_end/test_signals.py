"""Signals as launchers send them, to a whole process group: what ends, what is saved, who stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.train.stopping import stop_on_sigterm
from tests.support.distributed import REPOSITORY, torchrun
from tests.support.small_corpus import NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE, write_small_corpus

PATIENCE_S = 300
INTERVAL, STEPS = 2, 100_000
MARK = "TEST_OF_SIGNALS"
"""Set to a run's folder in the environment of all its processes."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")


class Training:
    """A training that would never end, in a session of its own."""

    def __init__(self, tokens: Path, run: Path, *settings: str, num_processes: int = 1) -> None:
        self.run = run
        arguments = [
            "-m",
            "distill_pretrain",
            "train",
            f"data={{tokens: {tokens}, seq_len: {SEQ_LEN}, num_sequences: {NUM_SEQUENCES}}}",
            f"data.vocab_size={VOCAB_SIZE}",
            "model={num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, num_query_groups: 2}",
            f"train={{output_dir: {run}, steps: {STEPS}, global_batch_size: 2, threads: 1}}",
            f"train.checkpoint_interval={INTERVAL}",
            *settings,
        ]
        command = (
            [sys.executable, *arguments]
            if num_processes == 1
            else torchrun(num_processes, *arguments)
        )
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), MARK: str(run)}
        self.log = run.with_suffix(".log")
        self.process = subprocess.Popen(
            # What a shell starts in the background, such as these tests, ignores SIGINT.
            ["env", "--default-signal=INT", *command],
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def everyone(self) -> list[psutil.Process]:
        """All processes of the job that live, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get(MARK) == str(self.run)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def wait_for_a_save(self) -> None:
        """Until a checkpoint is there, and training has gone on."""
        metrics = self.run / "metrics.jsonl"
        self.wait_for(lambda: bool(saved(self.run)))
        self.wait_for(lambda: metrics.read_bytes().count(b"\n") > saved(self.run)[-1])

    def signal_all(self, number: int) -> None:
        """As torchrun, Slurm and containers do: to every process of every group."""
        for group in {os.getpgid(process.pid) for process in self.everyone()}:
            os.killpg(group, number)

    def end(self) -> str:
        """Wait for its end; what it said."""
        self.process.wait(PATIENCE_S)
        return self.log.read_text()

    def kill(self) -> None:
        for process in self.everyone():
            process.kill()
        self.process.wait(PATIENCE_S)


def saved(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in CheckpointStore(run / "checkpoints").complete()]


def unfinished(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_stop_of_the_whole_group_saves_and_leaves_nobody(
    tokens: Path, tmp_path: Path, async_save: str
) -> None:
    training = Training(tokens, tmp_path / "run", f"train.async_save={async_save}")
    try:
        training.wait_for_a_save()
        assert [p.pid for p in training.everyone()] == [training.process.pid], "helpers"
        training.signal_all(signal.SIGTERM)
        time.sleep(0.05)
        training.signal_all(signal.SIGTERM)  # an impatient scheduler
        said = training.end()
        assert training.process.returncode == 143, said
        last = json.loads((training.run / "events.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "stopped" and saved(training.run)[-1] == last["step"]
        assert "asked to stop: saved step" in said and "Traceback" not in said
        assert not unfinished(training.run) and not training.everyone()
    finally:
        training.kill()


def test_a_stop_through_torchrun_saves_on_all_ranks(tokens: Path, tmp_path: Path) -> None:
    training = Training(tokens, tmp_path / "run", "parallel.tensor=2", num_processes=2)
    try:
        training.wait_for_a_save()
        before = saved(training.run)[-1]
        training.process.send_signal(signal.SIGTERM)  # it signals the groups of its ranks
        said = training.end()
        assert f"asked to stop: saved step {saved(training.run)[-1]}" in said
        assert saved(training.run)[-1] >= before
        assert not unfinished(training.run) and not training.everyone()
        assert "BrokenPipe" not in said and "distill_pretrain/cli/main.py" not in said
    finally:
        training.kill()


def test_a_training_that_was_told_to_stop_ends_its_own_way() -> None:
    """However often it is told, and at whatever moment of its end."""
    program = """
import os, signal, sys
from distill_pretrain.cli import train
from distill_pretrain.jobs import train as job
from distill_pretrain.train.stopping import stop_on_sigterm

def train_model(recipe):
    with stop_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    return True

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

sys.last = Last()
job.train_model, job.require_training = train_model, lambda recipe: None
train.run(None, type("Args", (), {"dry_run": False, "world_size": None}))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 143


def test_a_handler_of_the_caller_comes_back() -> None:
    def handler(*_: object) -> None:
        told.append(True)

    told: list[bool] = []
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with stop_on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and not told
        os.kill(os.getpid(), signal.SIGTERM)
        assert told
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with stop_on_sigterm():
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_one_line_and_130_and_spoils_nothing(
    tokens: Path, tmp_path: Path, times: int
) -> None:
    training = Training(tokens, tmp_path / "run", "train.async_save=true")
    try:
        training.wait_for_a_save()
        for _ in range(times):
            training.signal_all(signal.SIGINT)
            time.sleep(0.01)
        said = training.end()
        assert training.process.returncode in ((130,) if times == 1 else (130, -signal.SIGINT))
        assert "Traceback" not in said and "Exception ignored" not in said, said[-3000:]
        if times == 1:
            assert said.splitlines()[-1] == "distill-pretrain train: interrupted"
        assert not training.everyone()
        store = CheckpointStore(training.run / "checkpoints")
        newest = store.newest()
        assert newest is not None
        newest.verify()
    finally:
        training.kill()


def test_a_killed_trainer_leaves_nobody(tokens: Path, tmp_path: Path) -> None:
    training = Training(tokens, tmp_path / "run")
    try:
        training.wait_for_a_save()
        training.process.kill()
        training.process.wait(PATIENCE_S)
        assert not training.everyone()
    finally:
        training.kill()
