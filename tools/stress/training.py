"""A small training job under the launcher, its processes, its disk: what stress_train.py strikes at."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).parents[2]
SEQ_LEN = 64
INTERVAL = 7
STUCK_AFTER_S = 20
PATIENCE_S = 900
DISK_BYTES = 96 << 20
RESUMED = b"resumed at step "
LAYOUTS = {"tensor": ("parallel.tensor=2",), "data": ("parallel.distributed_optimizer=true",)}
MARK = "STRESS_TRAIN_RUN"
_OUR_FRAME = re.compile(rb'File ".*/distill_pretrain/')


class Failed(Exception):
    """A promise that the job broke."""


class Recipe:
    """A corpus, a cache and a recipe in a folder.

    Args:
        folder: to put them into.
        layout: overrides that lay the student out over two ranks.
    """

    def __init__(self, folder: Path, layout: tuple[str, ...]) -> None:
        self.folder, self.layout = folder, layout
        self.path = folder / "recipe.yaml"
        self.path.write_text(yaml.safe_dump(self._sections()))
        self.slow_fsync = folder / "slow_fsync"
        self._shim = folder / "slow_fsync.so"
        source = Path(__file__).with_name("slow_fsync.c")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-o", self._shim, source, "-ldl"]
        subprocess.run(command, check=True)
        self._tokenize_and_capture()

    def _sections(self) -> dict[str, Any]:
        folder = self.folder
        model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64}
        return {
            "data": {
                "tokens": str(folder / "tokens/train"),
                "held_out_tokens": str(folder / "tokens/held_out"),
                "seq_len": SEQ_LEN,
                "num_sequences": 200,
            },
            "teacher": {"path": str(folder / "teacher")},
            "capture": {"output_dir": str(folder / "cache"), "shard_sequences": 20},
            "model": {**model, "num_attention_heads": 4, "num_query_groups": 2, "dropout": 0.1},
            # A constant rate: the unbroken run then need not know how far the other one will get.
            "optimizer": {"lr": 2e-3, "warmup_steps": 2, "decay_style": "constant"},
            "train": {
                "output_dir": "unused",
                "steps": 1_000_000,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "checkpoint_interval": INTERVAL,
                "threads": 1,
                "stuck_after_s": STUCK_AFTER_S,
            },
        }

    def _tokenize_and_capture(self) -> None:
        text = Path(ast.__file__).with_name("asyncio")
        self._verb(
            "tokenize",
            f"corpus.paths=[{text}]",
            "corpus.include=['*.py']",
            f"corpus.output_dir={self.folder / 'tokens'}",
            "tokenizer.vocab_size=512",
        )
        self._verb(
            "train",
            str(self.path),
            f"train.output_dir={self.folder / 'teacher'}",
            "train.steps=150",
            "train.global_batch_size=16",
            "train.checkpoint_interval=150",
            "model.dropout=0.0",
        )
        self._verb("capture", str(self.path))

    def _verb(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "distill_pretrain", *arguments],
            cwd=REPOSITORY,
            env=self.environment(0),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def environment(self, restarts: int) -> dict[str, str]:
        """Of the launcher, and so of its ranks."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "VENV": "none",
            "NPROC": "2",
            "MAX_RESTARTS": str(restarts),
            # A stopped rank cannot end: the launcher kills it after that.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
            "LD_PRELOAD": str(self._shim),
            "STRESS_FSYNC": str(self.slow_fsync),
        }


class Training:
    """One run folder, and the job that writes it, started as often as needed.

    Args:
        recipe: what is trained.
        run: the run folder.
        log: gets what all starts print.
        settings: more overrides.
        restarts: of the launcher, per start.
    """

    def __init__(
        self, recipe: Recipe, run: Path, log: Path, *settings: str, restarts: int = 1000
    ) -> None:
        self.recipe, self.run, self.log = recipe, run, log
        self.settings, self.restarts = settings, restarts
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start the job under the launcher."""
        self.process = self.another(self.log, *more)

    def another(self, log: Path, *more: str) -> subprocess.Popen[bytes]:
        """The same job in the same folder, whether or not it runs already."""
        arguments = [
            f"train.output_dir={self.run}",
            f"data.cache={self.recipe.folder / 'cache'}",
            "objective.ce_weight=0.2",
            "objective.kd_weight=0.8",
            *self.recipe.layout,
            *self.settings,
            *more,
        ]
        return subprocess.Popen(
            [REPOSITORY / "launch/torchrun_single.sh", "train", self.recipe.path, *arguments],
            cwd=REPOSITORY,
            env={**self.recipe.environment(self.restarts), MARK: str(self.run)},
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_running(self) -> bool:
        """Whether the launcher lives."""
        return self.process is not None and self.process.poll() is None

    def steps(self) -> int:
        """Complete lines of metrics.jsonl."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run / "checkpoints").glob("*.tmp"))

    def resumes(self) -> int:
        """How often the job has gone on from a checkpoint."""
        return self.log.read_bytes().count(RESUMED)

    def resumed_at(self) -> int:
        """Step of the last checkpoint that it went on from."""
        return int(self.log.read_bytes().rpartition(RESUMED)[2].split()[0])

    def frames(self) -> int:
        """Lines of our own code in the tracebacks of the log."""
        return len(_OUR_FRAME.findall(self.log.read_bytes()))

    def wait_until(self, done: Callable[[], bool], *, alive: bool = True) -> None:
        """Until that is so; raises Failed when it takes too long, or when the job ends meanwhile though it must not."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if (alive and not self.is_running()) or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-4000:]
                raise Failed(f"the job ended or hangs:\n{tail}")
            time.sleep(0.03)

    def processes(self) -> list[psutil.Process]:
        """All of this run, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get(MARK) == str(self.run)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks by number."""
        assert self.process is not None
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error, AttributeError):
                settings = process.environ()
                # A rank's own helpers, if it had any, would have its environment too.
                if "RANK" in settings and "RANK" not in process.parent().environ():
                    found[int(settings["RANK"])] = process
        return found

    def helpers(self) -> int:
        """Processes that the ranks have started."""
        count = 0
        for rank in self.ranks().values():
            with suppress(psutil.Error):
                count += len(rank.children(recursive=True))
        return count

    def orphans(self) -> list[int]:
        """Processes of the run that no living launcher has as descendants, after a moment to end."""
        deadline = time.monotonic() + 20
        while True:
            known = set()
            if self.is_running():
                assert self.process is not None
                with suppress(psutil.Error):
                    launcher = psutil.Process(self.process.pid)
                    known = {launcher, *launcher.children(recursive=True)}
            left = [process.pid for process in self.processes() if process not in known]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def stop_all(self) -> int:
        """SIGTERM to every process group of the job, as a scheduler sends it; the launcher's exit status."""
        assert self.process is not None
        groups = set()
        for process in self.processes():
            with suppress(ProcessLookupError):
                groups.add(os.getpgid(process.pid))
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.wait(PATIENCE_S)


@contextmanager
def small_disk(folder: Path, num_bytes: int = DISK_BYTES) -> Iterator[Path]:
    """A file system of its own, in memory; needs root."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free on a file system; the file that takes them."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0")
    return filler
