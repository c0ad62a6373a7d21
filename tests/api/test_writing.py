"""A cache from a teacher of one's own: the bytes of a capture, after any interruption, and of one teacher only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_pretrain import CacheReader, SequencePlan, TokenIndex, write_cache
from distill_pretrain.cache.verify import verify_cache
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import CacheMismatch, ConfigError, TeacherError, TokenizerMismatch
from distill_pretrain.teacher.capture import (
    CaptureWatch,
    capture_shards,
    finish_capture,
    make_plans,
)
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.gate import SanityGate
from distill_pretrain.teacher.pilot import pilot_tables
from distill_pretrain.teacher.replica_group import ReplicaGroup
from tests.support.small_corpus import NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE, write_small_corpus

LAYOUT = {"micro_batch_size": 2, "shard_sequences": 5, "block_tokens": 16, "num_draws": 12}
NAME = {"name": "random", "revision": 3}


class Teacher:
    """Logits that depend on who shares the batch, as float rounding does; stops the program after some calls."""

    def __init__(self, calls_until_killed: int = 1 << 30) -> None:
        self.calls_left = calls_until_killed
        self.calls = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.calls == self.calls_left:
            raise KeyboardInterrupt
        self.calls += 1
        assert not torch.is_grad_enabled()
        g = torch.Generator().manual_seed(int(tokens.sum()) + 1000 * tokens.size(0))
        return torch.randn(*tokens.shape, VOCAB_SIZE, generator=g) * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SequencePlan:
    index = TokenIndex.open(write_small_corpus(tmp_path_factory.mktemp("corpus") / "text"))
    return SequencePlan(index, seq_len=SEQ_LEN, seed=4)


def write(folder, plan, score, **changes):
    settings = {"vocab_size": VOCAB_SIZE, "teacher": NAME, **LAYOUT, **changes}
    return write_cache(folder, plan, score, **settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def captured(folder, plan, identity):
    """The same by the engine, group and writer of the verb `capture`."""

    class Engine:
        vocab_size, device, replica = VOCAB_SIZE, torch.device("cpu"), Replica()
        score = Teacher()

        def chunks(self, tokens):
            logits = self.score(tokens).flatten(0, 1)
            for first in range(0, len(logits), 24):
                yield LogitsChunk(first=first, first_id=0, logits=logits[first : first + 24])

    data = SequenceData(
        index=plan.index,
        plan=plan,
        vocab_size=VOCAB_SIZE,
        tokenizer_digests=(),
        num_sequences=NUM_SEQUENCES,
    )
    ((_, cache_plan),) = make_plans(
        data, CaptureConfig(output_dir=folder, **LAYOUT), identity
    ).items()
    group = ReplicaGroup(Engine(), data)
    with torch.no_grad():
        writer = group.run(
            lambda: CacheWriter.create_or_resume(
                folder,
                cache_plan,
                make_tables=lambda: pilot_tables(group.score, [cache_plan], num_tokens=65536)[0],
                labels_of=lambda sequence: plan.read([sequence])[1][0],
            )
        )
        watch = CaptureWatch(SanityGate(vocab_size=VOCAB_SIZE, mode="off"))
        group.run(lambda: capture_shards([writer], group, first_shard=0, watch=watch))
    finish_capture([writer])
    return folder


def test_it_has_the_bytes_of_a_capture(small, tmp_path):
    counted = []
    assert write(tmp_path / "mine", small, Teacher(), progress=counted.append)
    assert sum(counted) == NUM_SEQUENCES * SEQ_LEN
    theirs = captured(tmp_path / "theirs", small, {"kind": "own", **NAME})
    assert files(tmp_path / "mine") == files(theirs)
    assert not verify_cache(tmp_path / "mine").problems


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_killed_and_called_again_it_goes_on(small, tmp_path, calls):
    write(tmp_path / "whole", small, whole := Teacher())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", small, Teacher(calls))
    write(tmp_path / "parts", small, rest := Teacher())
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    # One more batch may be scored again than was written.
    assert rest.calls <= whole.calls - (calls if calls > 1 else 0) + 1
    finished = Teacher(0)
    assert write(tmp_path / "parts", small, finished) and finished.calls == 0


def test_another_teacher_or_setting_does_not_touch_it(small, tmp_path):
    write(tmp_path / "cache", small, Teacher())
    before = files(tmp_path / "cache")
    for change, words in (
        ({"teacher": {**NAME, "revision": 4}}, "teacher.revision: found 3, expected 4"),
        ({"num_draws": 13}, "sampler.num_draws: found 12, expected 13"),
        ({"seed": 1}, "sampler.seed: found 1234, expected 1"),
    ):
        with pytest.raises(CacheMismatch, match=words):
            write(tmp_path / "cache", small, Teacher(0), **change)
    assert files(tmp_path / "cache") == before


def test_a_larger_number_of_sequences_extends_it(small, tmp_path):
    write(tmp_path / "cache", small, Teacher(), num_sequences=5)
    with CacheReader.open(tmp_path / "cache") as cache:
        assert cache.plan.num_sequences == 5
    write(tmp_path / "cache", small, rest := Teacher())
    assert rest.calls == 4  # of 7 sequences, in shards of 5 and 2
    with CacheReader.open(tmp_path / "cache") as cache:
        assert cache.plan.num_sequences == NUM_SEQUENCES


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda x: torch.zeros(*x.shape, VOCAB_SIZE + 1), r"found: \[2, 32, 201\]; .*\[2, 32, 200\]"),
        (lambda x: torch.zeros(x.numel(), VOCAB_SIZE), r"found: \[64, 200\]"),
        (lambda x: None, "found: <class 'NoneType'>"),
        (lambda x: torch.zeros(*x.shape, VOCAB_SIZE).double(), "dtype that is not sampled; .*float64"),
        (lambda x: np.full((*x.shape, VOCAB_SIZE), np.nan, np.float32), "sequences 0, 1; .*NaN"),
    ],
)  # fmt: skip
def test_a_teacher_that_returns_something_else_is_refused(small, tmp_path, score, words):
    with pytest.raises(TeacherError, match=words):
        write(tmp_path / "cache", small, score)


def test_a_teacher_that_is_shifted_is_refused(own_teacher, tmp_path):
    # Nothing is judged before 8192 positions.
    corpus = own_teacher["write_corpus"](tmp_path / "text", documents=80, seed=4)
    plan = SequencePlan(corpus, seq_len=128, seed=1)

    def shifted(tokens):
        return own_teacher["teacher"](tokens.roll(1, -1))

    settings = {"vocab_size": 64, "teacher": NAME, "codec": "raw"}
    with pytest.raises(TeacherError, match="where: sequences 0 to"):
        write_cache(tmp_path / "a", plan, shifted, **settings)
    write_cache(tmp_path / "b", plan, shifted, sanity_gate="off", **settings)


def test_settings_that_are_none_are_refused(small, tmp_path):
    for change, words in (
        ({"micro_batch_size": 0}, "where: micro_batch_size; found: 0"),
        ({"codec": "zip"}, "where: codec; found: 'zip'"),
        ({"sanity_gate": "maybe", "block_tokens": 1}, r"sanity_gate(.|\n)*block_tokens|block_tokens"),
        ({"vocab_size": 1}, "where: vocab_size; found: 1"),
        ({"teacher": {}}, "whose targets it holds; where: teacher; found: {}"),
        ({"teacher": {"model": torch.nn.Linear(1, 1)}}, "where: teacher; .*not JSON serializable"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            write(tmp_path / "cache", small, Teacher(0), **change)
    with pytest.raises(TokenizerMismatch, match="ids below the vocabulary size 100"):
        write(tmp_path / "cache", small, Teacher(0), vocab_size=100)
    assert not (tmp_path / "cache").exists()
