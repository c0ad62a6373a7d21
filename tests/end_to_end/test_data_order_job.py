"""What a training job really consumes, over kills, resumes and numbers of ranks; blends; the canary."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.cli.main import main
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from tests.support.distributed import run_distributed
from tests.support.jobs import SEQ_LEN, Job

NUM_SEQUENCES = 40
STEPS_PER_EPOCH = 5


def digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype(np.int64).tobytes()).hexdigest()


def train_recorded(arguments: list[str], record: str, kill_after: int | None) -> int:
    """Train; note the sequences of every step the model was given; perhaps end by SIGKILL after some steps."""
    from distill_pretrain.data.prefetch import PrefetchedBatches
    from distill_pretrain.train.trainer import Trainer

    give, finish = PrefetchedBatches.host_batches, Trainer._record
    rank = int(os.environ["RANK"])

    def host_batches(self: Any, step: int) -> Any:
        batches = give(self, step)
        seen = [digest(row.numpy()) for batch in batches for row in batch.tokens]
        with Path(record).with_suffix(f".{rank}").open("a") as file:
            file.write(json.dumps([step, seen]) + "\n")
        return batches

    def after_step(self: Any, step: int, *rest: Any) -> Any:
        if step == kill_after and rank == 0:
            kill_job()
        return finish(self, step, *rest)

    PrefetchedBatches.host_batches = host_batches
    Trainer._record = after_step
    return main(arguments)


def kill_job() -> None:
    """kill -9 every process of this job, helpers and other ranks included, this one last."""
    for process in psutil.Process(os.getppid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("MASTER_PORT") == os.environ["MASTER_PORT"]
            if ours and process.pid != os.getpid():
                process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def consumed(record: Path, first: int, stop: int) -> dict[int, list[str]]:
    """What all ranks of a run saw in steps [first, stop)."""
    steps: dict[int, list[str]] = {step: [] for step in range(first, stop)}
    for file in record.parent.glob(f"{record.name}.*"):
        for line in file.read_text().splitlines():
            step, seen = json.loads(line)
            if step in steps:
                steps[step] += seen
    return steps


def newest_step(run: Path) -> int:
    return max(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*[0-9]"))


@pytest.mark.slow
def test_a_killed_run_on_one_then_two_ranks_sees_every_sequence_once_per_epoch(job, tmp_path):
    """One rank, killed in mid-epoch; two ranks, killed in another; one rank to the end of the third epoch."""
    arguments = [
        "train",
        str(job.recipe),
        f"data.cache={job.cache}",
        "data.prefetch_steps=2",
        "objective.kd_weight=0.8",
        f"train.output_dir={tmp_path / 'run'}",
        f"train.steps={3 * STEPS_PER_EPOCH}",
        "train.checkpoint_interval=2",
    ]
    survived: dict[int, list[str]] = {}
    done = 0
    for number, (ranks, kill_after) in enumerate([(1, 3), (2, 9), (1, None)]):
        record = tmp_path / f"record-{number}"
        start = {"arguments": arguments, "record": str(record), "kill_after": kill_after}
        if kill_after is None:
            assert run_distributed(train_recorded, ranks, **start) == 0
        else:
            with pytest.raises(AssertionError, match="distributed run failed"):
                run_distributed(train_recorded, ranks, **start)
            assert len(consumed(record, kill_after - 1, kill_after)[kill_after - 1]) == 8
            assert newest_step(tmp_path / "run") == kill_after - 1, "a step is to be repeated"
        survived.update(consumed(record, done, newest_step(tmp_path / "run")))
        done = newest_step(tmp_path / "run")

    plan = open_sequences(DataConfig(tokens=job.tokens / "train", seq_len=SEQ_LEN)).plan
    tokens, _ = plan.read(np.arange(NUM_SEQUENCES))
    every = Counter(digest(row) for row in tokens)
    assert len(every) == NUM_SEQUENCES and list(survived) == list(range(15))
    orders = []
    for epoch in range(3):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        seen = [name for step in steps for name in survived[step]]
        assert Counter(seen) == every
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


@pytest.fixture(scope="module")
def topk_cache(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the held-out text, of another kind than the job's."""
    folder = tmp_path_factory.mktemp("topk") / "cache"
    job.cli(
        "capture",
        f"data.tokens={job.tokens / 'held_out'}",
        "data.num_sequences=null",
        "capture.sampler=topk",
        f"capture.output_dir={folder}",
    )
    return folder


def blend_arguments(job: Job, topk_cache: Path, run: Path, weight: float = 0.25) -> list[str]:
    other = {"tokens": str(job.tokens / "held_out"), "cache": str(topk_cache), "weight": weight}
    return [
        f"data.cache={job.cache}",
        "data.weight=0.75",
        f"data.blend=[{json.dumps(other)}]",
        "objective.kd_weight=1.0",
        f"train.output_dir={run}",
        "train.checkpoint_interval=2",
    ]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_blend_trains_resumes_and_guards_its_checkpoints(job, topk_cache, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job.cli("train", *blend_arguments(job, topk_cache, whole), "train.steps=4")
    assert capsys.readouterr().err.count("canary of ") == 2
    job.cli("train", *blend_arguments(job, topk_cache, cut), "train.steps=2")
    synchronous = "data.prefetch_steps=0"
    job.cli("train", *blend_arguments(job, topk_cache, cut), "train.steps=4", synchronous)
    for a, b in zip(records(whole), records(cut), strict=True):
        assert [a[key] for key in ("loss", "kl", "grad_norm")] == [
            b[key] for key in ("loss", "kl", "grad_norm")
        ]
        assert 0 <= a["data_wait"] < a["seconds"]

    for changed in (blend_arguments(job, topk_cache, cut, 0.5), ["data.blend=[]"]):
        arguments = [*blend_arguments(job, topk_cache, cut), *changed, "train.steps=8"]
        assert main(["train", str(job.recipe), *arguments]) == 2
        assert "weights of data.blend: checkpoint" in capsys.readouterr().err


def rows_of(targets: RaggedTargets, rows: np.ndarray) -> RaggedTargets:
    """Some rows in the given order, by ascending id within each, as a codec takes them."""
    ends = np.concatenate([[0], np.cumsum(targets.entries_per_token)])
    spans = [np.arange(ends[row], ends[row + 1]) for row in rows]
    entries = np.concatenate([span[np.argsort(targets.ids[span])] for span in spans])
    return RaggedTargets(
        kind=targets.kind,
        num_draws=targets.num_draws,
        entries_per_token=targets.entries_per_token[rows],
        ids=targets.ids[entries],
        values=targets.values[entries],
    )


def test_a_cache_of_shifted_targets_is_refused_before_anything_is_written(job, tmp_path, capsys):
    """The blocks carry the right tokens and checksums; only the canary can see it."""
    data = open_sequences(
        DataConfig(tokens=job.tokens / "train", seq_len=SEQ_LEN, num_sequences=NUM_SEQUENCES)
    )
    sound = open_cache(job.cache, data)
    plan = dataclasses.replace(sound.plan, codec=1, codec_sha256=None)
    writer = CacheWriter.create_or_resume(tmp_path / "cache", plan)
    for shard in writer.pending():
        claimed = writer.claim(shard)
        assert claimed is not None
        with claimed:
            while claimed.next_block < claimed.num_blocks:
                sequence, offset, size = claimed.place(claimed.next_block)
                tokens = data.plan.read([sequence])[0][0]
                positions = np.arange(offset, offset + size)
                before = rows_of(sound.read(sequence, tokens), (positions - 1) % SEQ_LEN)
                claimed.append(before, tokens[positions])
            claimed.finish()
    writer.publish_manifest()

    arguments = [
        f"data.cache={tmp_path / 'cache'}",
        "objective.kd_weight=1.0",
        f"train.output_dir={tmp_path / 'run'}",
        "train.steps=1",
    ]
    job.cli("verify", *arguments)
    assert main(["train", str(job.recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert "one position before theirs" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    job.cli("train", *arguments, "data.canary=warn")
    assert "WARNING rank 0: the targets fit" in capsys.readouterr().err
