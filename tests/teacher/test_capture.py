"""A resumed capture shows the teacher the batches of an unbroken one, so it gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.errors import CacheCorrupt
from distill_pretrain.formats import CacheWriter
from distill_pretrain.formats.codec_files import read_tables
from distill_pretrain.teacher.capture import capture_shards, finish_capture, make_plan, pilot_tables
from distill_pretrain.teacher.config import CaptureConfig
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus


class BatchSensitive:
    """A teacher whose logits depend on who shares the batch: an exaggeration of float rounding."""

    vocab_size = VOCAB_SIZE
    device = torch.device("cpu")

    def __init__(self, calls_until_killed: int | None = None) -> None:
        self.identity: dict[str, Any] = {"kind": "megatron"}
        self.calls_left = calls_until_killed

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise KeyboardInterrupt
            self.calls_left -= 1
        g = torch.Generator().manual_seed(int(tokens.sum()) + 1000 * tokens.size(0))
        return torch.randn(*tokens.shape, VOCAB_SIZE, generator=g) * 3


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SequenceData:
    prefix = write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")
    return open_sequences(DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))


def capture(folder: Path, sequences: SequenceData, engine: BatchSensitive) -> dict[str, bytes]:
    settings = CaptureConfig(
        output_dir=folder, micro_batch_size=3, shard_sequences=8, block_tokens=20
    )
    plan = make_plan(sequences, settings, engine.identity)
    writer = CacheWriter.create_or_resume(
        folder,
        plan,
        make_tables=lambda: pilot_tables(BatchSensitive(), sequences, plan, num_tokens=100),
        sync_every=1,
    )
    capture_shards(writer, engine, sequences, first_shard=0, progress=lambda positions: None)
    assert finish_capture(writer) is not None
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@pytest.mark.parametrize("lost_bytes", [0, 1, 700])
def test_an_interrupted_capture_resumes_to_the_bytes_of_an_unbroken_one(
    sequences, tmp_path, calls, lost_bytes
):
    expected = capture(tmp_path / "whole", sequences, BatchSensitive())
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        capture(folder, sequences, BatchSensitive(calls_until_killed=calls))
    for part in folder.glob("*.part"):  # a torn tail makes the resume start within a micro-batch
        with part.open("r+b") as file:
            file.truncate(max(0, part.stat().st_size - lost_bytes))
    assert capture(folder, sequences, BatchSensitive()) == expected


def test_damaged_tables_are_reported_with_their_path(sequences, tmp_path):
    settings = CaptureConfig(output_dir=tmp_path)
    plan = make_plan(sequences, settings, BatchSensitive().identity)
    path = tmp_path / "codec-a.bin"
    data = pilot_tables(BatchSensitive(), sequences, plan, num_tokens=100).to_bytes()
    path.write_bytes(data)
    assert read_tables(path, plan).to_bytes() == data
    path.write_bytes(data[:-1])
    with pytest.raises(CacheCorrupt, match=re.escape(str(path))):
        read_tables(path, plan)
