"""A resumed capture shows the teacher the batches of an unbroken one, so it gives the same bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill_pretrain.cache import CachePlan, CacheWriter
from distill_pretrain.cache.codec.files import read_tables
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.contracts import LogitsChunk, RaggedTargets, Replica
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.errors import CacheCorrupt, CacheError, ConfigError, TeacherError
from distill_pretrain.kernels.teacher_sampling import SOURCE
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.teacher.capture import (
    CaptureWatch,
    capture_shards,
    finish_capture,
    make_plans,
)
from distill_pretrain.teacher.config import CaptureConfig, TargetSetConfig
from distill_pretrain.teacher.gate import SanityGate
from distill_pretrain.teacher.pilot import pilot_tables
from distill_pretrain.teacher.replica_group import ReplicaGroup
from distill_pretrain.teacher.sampling_backend import ReadColumns, device_reader
from tests.support.emulation import emulated
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus


class BatchSensitive:
    """A teacher whose logits depend on who shares the batch: an exaggeration of float rounding."""

    vocab_size = VOCAB_SIZE
    device = torch.device("cpu")
    replica = Replica()

    def __init__(self, calls_until_killed: int | None = None) -> None:
        self.identity: dict[str, Any] = {"kind": "megatron"}
        self.calls_left = calls_until_killed
        self.calls = 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise KeyboardInterrupt
            self.calls_left -= 1
        g = torch.Generator().manual_seed(int(tokens.sum()) + 1000 * tokens.size(0))
        return torch.randn(*tokens.shape, VOCAB_SIZE, generator=g) * 3

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """Two, which part within a sequence."""
        logits = self.logits(tokens).flatten(0, 1)
        half = len(logits) // 2 - 3
        yield LogitsChunk(first=0, first_id=0, logits=logits[:half])
        yield LogitsChunk(first=half, first_id=0, logits=logits[half:])


def watching(mode: Any = "refuse", **settings: Any) -> CaptureWatch:
    return CaptureWatch(SanityGate(vocab_size=VOCAB_SIZE, mode=mode), **settings)


def tables_of(sequences: SequenceData, plans: list[CachePlan], engine: Any = None) -> list[Any]:
    """Of a pilot on 100 positions."""
    group = ReplicaGroup(engine or BatchSensitive(), sequences)
    tables = group.run(lambda: pilot_tables(group.score, plans, num_tokens=100))
    assert tables is not None
    return tables


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SequenceData:
    prefix = write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")
    return open_sequences(DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))


LAYOUT = {"micro_batch_size": 3, "shard_sequences": 8, "block_tokens": 20}
SETS: dict[str, dict[str, Any]] = {
    "systematic": {"num_draws": 11},
    "multinomial": {"sampler": "multinomial", "num_draws": 7, "seed": 9},
    "top-k": {"sampler": "topk", "num_draws": 5},
    "top.p": {"sampler": "topp", "num_draws": 30, "top_p": 0.7},
}


def capture(
    folder: Path,
    sequences: SequenceData,
    engine: BatchSensitive,
    read: ReadColumns = host_columns,
    **settings: Any,
) -> dict[str, bytes]:
    """Bytes by path of what a capture writes."""
    config = CaptureConfig(output_dir=folder, **LAYOUT, **settings)
    plans = make_plans(sequences, config, engine.identity)
    writers = [
        CacheWriter.create_or_resume(
            path,
            plan,
            make_tables=lambda plan=plan: tables_of(sequences, [plan])[0],
            labels_of=lambda sequence: sequences.plan.read([sequence])[1][0],
            sync_every=1,
        )
        for path, plan in plans.items()
    ]
    group = ReplicaGroup(engine, sequences, read=read)
    capture_shards(writers, group, first_shard=0, watch=watching("off"))
    assert set(finish_capture(writers)) == set(plans)
    return contents(folder)


def test_sampling_by_kernels_writes_the_bytes_of_numpy(sequences, tmp_path):
    expected = capture(tmp_path / "numpy", sequences, BatchSensitive(), sets=SETS)
    by_kernels = device_reader(emulated(SOURCE))
    found = capture(tmp_path / "kernels", sequences, BatchSensitive(), by_kernels, sets=SETS)
    assert found == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


@pytest.fixture(scope="module")
def alone(sequences, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What a capture of every set on its own writes."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: capture(folder / name, sequences, BatchSensitive(), **settings)
        for name, settings in SETS.items()
    }


def assert_each_set_is_as_alone(found: dict[str, bytes], alone: dict[str, dict[str, bytes]]):
    assert found == {
        f"{name}/{f}": data for name, files in alone.items() for f, data in files.items()
    }


def test_sets_from_one_pass_have_the_bytes_of_captures_of_their_own(sequences, tmp_path, alone):
    engine = BatchSensitive()
    assert_each_set_is_as_alone(capture(tmp_path, sequences, engine, sets=SETS), alone)
    batches = sum(-(-size // 3) for size in shard_sizes(sequences))
    assert engine.calls == batches, "the teacher scored a micro-batch more than once"


def shard_sizes(sequences: SequenceData) -> list[int]:
    count = sequences.num_sequences
    return [min(8, count - first) for first in range(0, count, 8)]


def test_tables_of_several_sets_from_one_pilot_are_those_of_pilots_of_their_own(sequences):
    config = CaptureConfig(output_dir=Path("x"), **LAYOUT, sets=SETS)
    plans = list(make_plans(sequences, config, BatchSensitive().identity).values())
    engine = BatchSensitive()
    together = tables_of(sequences, plans, engine)
    assert engine.calls == 1
    for tables, plan in zip(together, plans, strict=True):
        (own,) = tables_of(sequences, [plan])
        assert tables.to_bytes() == own.to_bytes()


def test_after_a_failed_write_no_later_batch_is_appended(sequences, tmp_path, monkeypatch):
    """The teacher is ahead of the disk: its later batches may not fill the gap."""
    expected = capture(tmp_path / "whole", sequences, BatchSensitive())
    sound, calls = ShardWriter.append, []

    def failing(self: ShardWriter, *arguments: Any) -> None:
        calls.append(1)
        time.sleep(0.02)
        if len(calls) == 4:  # the second of two blocks of a sequence
            raise TeacherError("no distribution")
        sound(self, *arguments)

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(TeacherError, match="no distribution"):
        capture(tmp_path / "broken", sequences, BatchSensitive())
    assert len(calls) == 4
    monkeypatch.undo()
    assert capture(tmp_path / "broken", sequences, BatchSensitive()) == expected


def test_a_faulty_teacher_keeps_shards_and_publishes_nothing(sequences, tmp_path, monkeypatch):
    class Frozen(BatchSensitive):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, VOCAB_SIZE)

    monkeypatch.setattr("distill_pretrain.teacher.gate.STRETCH_POSITIONS", 40)
    monkeypatch.setattr("distill_pretrain.teacher.gate.FEWEST_STRETCHES", 4)
    monkeypatch.setattr("distill_pretrain.teacher.gate.FEWEST_SEQUENCES", 10)
    monkeypatch.setattr("distill_pretrain.teacher.gate.UNIFORM_MASS", 30.0)
    config = CaptureConfig(output_dir=tmp_path, codec="raw", **LAYOUT)
    ((_, plan),) = make_plans(sequences, config, Frozen().identity).items()
    writer = CacheWriter.create_or_resume(tmp_path, plan)
    group = ReplicaGroup(Frozen(), sequences)

    def refused() -> None:
        with pytest.raises(TeacherError, match="uniform"):
            capture_shards([writer], group, first_shard=0, watch=watching())

    refused()
    assert writer.pending() == [1] and (tmp_path / "s-000000.dpt").exists()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(CacheError, match="not finished"):
        writer.publish_manifest()


def test_micro_batches_are_given_in_sequences_or_in_positions():
    def size(**settings: Any) -> int:
        return CaptureConfig(output_dir=Path("x"), **settings).sequences_per_pass(256)

    assert size() == 8 and size(micro_batch_size=3) == 3
    assert size(micro_batch_tokens=1024) == 4 and size(micro_batch_tokens=1023) == 3
    assert "are both" in settings_error(micro_batch_size=1, micro_batch_tokens=512)
    with pytest.raises(ConfigError, match="255 positions, sequences of 256"):
        size(micro_batch_tokens=255)


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_an_interrupted_capture_of_sets_resumes_from_shards_at_different_blocks(
    sequences, tmp_path, alone, calls
):
    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path, sequences, BatchSensitive(calls_until_killed=calls), sets=SETS)
    for number, part in enumerate(sorted(tmp_path.rglob("*.part"))):
        with part.open("r+b") as file:
            file.truncate(max(0, part.stat().st_size - 300 * number))
    engine = BatchSensitive()
    assert_each_set_is_as_alone(capture(tmp_path, sequences, engine, sets=SETS), alone)


def test_only_what_a_set_lacks_is_scored_again(sequences, tmp_path, alone):
    capture(tmp_path, sequences, BatchSensitive(), sets=SETS)
    for name in ("s-000000.json", "s-000000.dpt", "manifest.json"):
        (tmp_path / "top-k" / name).unlink()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("s-*") if p.parent.name != "top-k"}
    engine = BatchSensitive()
    assert_each_set_is_as_alone(capture(tmp_path, sequences, engine, sets=SETS), alone)
    assert engine.calls == 3  # eight sequences in micro-batches of three
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_a_shard_owned_in_the_first_set_is_left_alone_in_all(sequences, tmp_path):
    """No two processes score the same sequences, and one beside a capture of a later set alone goes on."""
    config = CaptureConfig(output_dir=tmp_path, **LAYOUT, codec="raw", sets=SETS)
    engine = BatchSensitive()
    plans = make_plans(sequences, config, engine.identity)
    writers = [CacheWriter.create_or_resume(path, plan) for path, plan in plans.items()]
    group = ReplicaGroup(engine, sequences)
    options: dict[str, Any] = {"first_shard": 0, "watch": watching("off")}
    with writers[0].claim(0) as _, writers[2].claim(1) as _:
        capture_shards(writers, group, **options)
        last = len(shard_sizes(sequences))
        assert [writer.pending() for writer in writers] == [[0], [0], [0, 1], [0]]
        assert engine.calls == sum(-(-size // 3) for size in shard_sizes(sequences)[1:])
    assert finish_capture(writers) == {}
    capture_shards(writers, group, **options)
    assert len(finish_capture(writers)) == len(writers)
    assert last >= 2


def settings_error(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        CaptureConfig(output_dir=Path("x"), **settings)
    return str(caught.value)


def test_settings_that_contradict_each_other_are_refused():
    assert "topp needs it" in settings_error(sampler="topp")
    assert "leave it out" in settings_error(sampler="topk", top_p=0.9)
    assert "leave it out" in settings_error(sets={"a": {"top_p": 0.9}})
    assert "topp needs it" in settings_error(sets={"a": {"sampler": "topp"}})
    for top_p in (0, 1, -0.5, 1.5):
        assert "top_p" in settings_error(sampler="topp", top_p=top_p)
    assert "sampler, num_draws given beside sets" in settings_error(
        sampler="topk", num_draws=5, sets={"a": {}}
    )
    assert "codec_tables" in settings_error(codec_tables="x.bin", sets={"a": {}})
    assert "at least 1" in settings_error(sets={})
    for name in ("", ".", "..", "a/b", "-a", "a b", "a\n", "é", "x" * 101):
        assert "a name for a folder" in settings_error(sets={name: {}})


def test_a_set_takes_the_seed_of_the_section_unless_it_has_its_own():
    config = CaptureConfig(output_dir=Path("x"), seed=5, sets={"a": {}, "b": {"seed": 0}})
    assert {path.name: kept.seed for path, kept in config.targets.items()} == {"a": 5, "b": 0}
    (only,) = CaptureConfig(output_dir=Path("x"), seed=6, num_draws=3).targets.items()
    assert only == (Path("x"), TargetSetConfig(num_draws=3, seed=6))


def test_the_section_reads_back_what_it_dumps():
    config = CaptureConfig(output_dir=Path("x"), sets=SETS)
    assert CaptureConfig(**config.model_dump(mode="json")) == config


def test_plans_of_the_older_samplers_have_no_new_key(sequences):
    def described(**settings: Any) -> dict[str, Any]:
        config = CaptureConfig(output_dir=Path("x"), **settings)
        (plan,) = make_plans(sequences, config, BatchSensitive().identity).values()
        return plan.sampler

    old = {"name", "num_draws", "temperature", "seed", "rng"}
    for sampler in ("systematic", "multinomial", "topk"):
        assert set(described(sampler=sampler)) == old
    assert set(described(sampler="topp", top_p=0.9)) == {*old, "top_p"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "lottery"}, "sampler.name"),
        ({"name": "topk"}, "keys"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.0}, "top_p"),
        ({"top_p": 1}, "top_p"),
        ({"top_p": None}, "top_p"),
    ],
)
def test_plans_of_unknown_samplers_or_masses_are_refused(sequences, changes, expected):
    config = CaptureConfig(output_dir=Path("x"), sampler="topp", top_p=0.9)
    (plan,) = make_plans(sequences, config, BatchSensitive().identity).values()
    named = plan.with_tables("a" * 64)
    again = CachePlan.from_json_bytes(named.to_json_bytes(), num_sequences=plan.num_sequences)
    assert again == named and again.kind == "logprobs"
    with pytest.raises(CacheError, match=expected):
        replace(plan, sampler={**plan.sampler, **changes})


class Padded(BatchSensitive):
    """A teacher that keeps the padding columns of its output layer."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(super().logits(tokens), (0, 3), value=50.0)


@pytest.mark.parametrize("sampler", SETS)
def test_padding_columns_of_a_teacher_are_never_stored(sequences, tmp_path, sampler):
    with pytest.raises(TeacherError, match="padding columns"):
        capture(tmp_path, sequences, Padded(), codec="raw", **SETS[sampler])
    assert not list(tmp_path.glob("*.dpt"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampler", SETS)
def test_logits_that_are_no_distribution_are_refused(sequences, tmp_path, sampler, bad):
    class Broken(BatchSensitive):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().logits(tokens)
            logits[0, 2, 1] = bad
            return logits

    with pytest.raises(TeacherError, match=r"sequences? \[?0\b"):
        capture(tmp_path, sequences, Broken(), codec="raw", **SETS[sampler])


@pytest.mark.parametrize("codec", ["raw", "hc"])
@pytest.mark.parametrize(
    ("ids", "values", "error", "expected"),
    [
        ([1, 2], [-0.1, -0.1], TeacherError, "add up to 1.8"),
        ([1, 2], [0.5, -3.0], TeacherError, "positive or NaN"),
        ([1, 2], [float("nan"), -3.0], TeacherError, "positive or NaN"),
        # No teacher can cause these two: the columns of its logits are counted.
        ([1, VOCAB_SIZE], [-1.0, -3.0], AssertionError, "outside the vocabulary"),
        ([-1, 2], [-1.0, -3.0], AssertionError, "outside the vocabulary"),
    ],
)
def test_likeliest_ids_that_are_no_distribution_are_never_written(
    sequences, tmp_path, codec, ids, values, error, expected
):
    config = CaptureConfig(
        output_dir=tmp_path, sampler="topp", top_p=0.9, num_draws=2, codec=codec, **LAYOUT
    )
    ((_, plan),) = make_plans(sequences, config, BatchSensitive().identity).items()
    writer = CacheWriter.create_or_resume(
        tmp_path,
        plan,
        make_tables=lambda: tables_of(sequences, [plan])[0],
    )
    with writer.claim(0) as shard:
        size = shard.place(0)[2]
        entries = np.zeros(size, np.int32)
        entries[0] = len(ids)
        targets = RaggedTargets(
            kind="logprobs",
            num_draws=2,
            entries_per_token=entries,
            ids=np.array(ids, np.int32),
            values=np.array(values, np.float32),
        )
        with pytest.raises(error, match=expected):
            shard.append(targets, np.zeros(size, np.int32))
        assert shard.next_block == 0


def test_damaged_tables_are_reported_with_their_path(sequences, tmp_path):
    settings = CaptureConfig(output_dir=tmp_path)
    (plan,) = make_plans(sequences, settings, BatchSensitive().identity).values()
    path = tmp_path / "codec-a.bin"
    data = tables_of(sequences, [plan])[0].to_bytes()
    path.write_bytes(data)
    assert read_tables(path, plan).to_bytes() == data
    path.write_bytes(data[:-1])
    with pytest.raises(CacheCorrupt, match=re.escape(str(path))):
        read_tables(path, plan)
