"""One replica of a capture with a teacher that takes its time, as a program: PREFIX OUTPUT [SECONDS PER BATCH]."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.cache import CacheWriter
from distill_pretrain.cache.manifest import Manifest
from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_sequences
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.teacher.capture import (
    CaptureWatch,
    capture_shards,
    finish_capture,
    make_plans,
)
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.gate import SanityGate
from distill_pretrain.teacher.pilot import pilot_tables
from distill_pretrain.teacher.replica_group import ReplicaGroup, first_replica_first
from distill_pretrain.teacher.sampling_backend import ReadColumns
from distill_pretrain.teacher.telemetry import CaptureLog, Stopwatch, TimedTeacher, telemetry_path

ALONE = Replica()
VOCAB_SIZE, SEQ_LEN = 200, 16
LAYOUT = {"micro_batch_size": 2, "shard_sequences": 8, "block_tokens": 16, "num_draws": 12}


class SlowTeacher:
    """Logits depend on who shares the batch, and come after a while.

    Args:
        seconds: per batch.
        replica: the processes that hold it.
        columns: ids of this rank.
    """

    vocab_size = VOCAB_SIZE
    device = torch.device("cpu")

    def __init__(
        self, seconds: float, replica: Replica = ALONE, columns: slice = slice(0, VOCAB_SIZE)
    ) -> None:
        self.identity: dict[str, Any] = {"kind": "megatron"}
        self.seconds = seconds
        self.replica = replica
        self.columns = columns

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        time.sleep(self.seconds)
        g = torch.Generator().manual_seed(int(tokens.sum()) + 1000 * tokens.size(0))
        logits = torch.randn(tokens.numel(), VOCAB_SIZE, generator=g) * 3
        half = len(logits) // 2
        for first in (0, half):
            yield LogitsChunk(
                first=first,
                first_id=self.columns.start,
                logits=logits[first : first + half, self.columns].contiguous(),
            )


def capture(
    prefix: Path, output: Path, teacher: SlowTeacher, *, read: ReadColumns = host_columns
) -> dict[Path, Manifest] | None:
    """What the verb does, but for the teacher."""
    sequences = open_sequences(DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))
    stopwatch = Stopwatch()
    group = ReplicaGroup(TimedTeacher(teacher, stopwatch), sequences, read=read)
    config = CaptureConfig(output_dir=output, **LAYOUT)
    ((folder, plan),) = make_plans(sequences, config, teacher.identity).items()

    def join() -> CacheWriter:
        return CacheWriter.create_or_resume(
            folder,
            plan,
            make_tables=lambda: pilot_tables(group.score, [plan], num_tokens=100)[0],
            labels_of=lambda sequence: sequences.plan.read([sequence])[1][0],
        )

    writer = first_replica_first(group, join)

    def lead() -> dict[Path, Manifest]:
        assert writer is not None
        log = CaptureLog(
            telemetry_path(output),
            replica=teacher.replica.number,
            folder=folder,
            plan=writer.plan,
            watch=stopwatch,
            interval_s=0.1,
        )
        gate = SanityGate(vocab_size=VOCAB_SIZE, mode="off")
        watch = CaptureWatch(gate, log=log, stopwatch=stopwatch)
        first = teacher.replica.number * plan.num_shards // teacher.replica.count
        capture_shards([writer], group, first_shard=first, watch=watch)
        log.write()
        return finish_capture([writer])

    return group.run(lead)


if __name__ == "__main__":
    capture(Path(sys.argv[1]), Path(sys.argv[2]), SlowTeacher(float(sys.argv[3])))
