"""A teacher that expects a token which the corpus does not have is noticed before its targets fill a cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.teacher import bos
from distill_pretrain.teacher.bos import SEQUENCES, measure_bos, missing_bos
from distill_pretrain.teacher.capture import make_plans
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.replica_group import ReplicaGroup
from tests.support.notices import noted
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

BOS = 3


class NeedsBos:
    """Knows the next token of the corpus where a sequence begins with BOS, and nothing where not."""

    vocab_size = VOCAB_SIZE
    device = torch.device("cpu")
    replica = Replica()
    identity: dict[str, Any] = {"kind": "megatron"}  # noqa: RUF012

    def __init__(self, sequences: SequenceData) -> None:
        every, _ = sequences.plan.read(np.arange(sequences.plan.num_sequences))
        self._known = {tuple(row[:-1]): row for row in every.tolist()}
        self.seen = 0

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
        for row, ids in zip(logits, tokens.tolist(), strict=True):
            self.seen += 1
            if ids[0] == BOS:
                row[torch.arange(SEQ_LEN), torch.tensor(self._known[tuple(ids[1:])])] = 50.0
        yield LogitsChunk(first=0, first_id=0, logits=logits.flatten(0, 1))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SequenceData:
    prefix = write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")
    return open_sequences(DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))


def test_what_a_teacher_says_is_measured_without_and_with_the_token(tmp_path, sequences):
    engine = NeedsBos(sequences)
    capture = CaptureConfig(output_dir=tmp_path / "cache", micro_batch_size=3, num_draws=10)
    (plan,) = make_plans(sequences, capture, engine.identity).values()
    figures = measure_bos(partial(ReplicaGroup, engine), sequences, plan, BOS)
    assert figures is not None
    assert engine.seen == 2 * SEQUENCES
    assert figures.entropies == pytest.approx((math.log(VOCAB_SIZE), 0), abs=1e-3)
    assert figures.hit_rates[0] < 0.15 and figures.hit_rates[1] == 1
    warning = figures.warning(BOS)
    assert "names token 3 as BOS" in warning and "tokenizer.bos=always" in warning
    assert "5.298 nats without and 0.000 with it" in warning


def test_a_token_that_documents_begin_or_end_with_is_not_missing(tmp_path, sequences):
    def of(config: dict[str, Any] | None, index: TokenIndex = sequences.index) -> int | None:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return missing_bos(folder, index)

    assert of({"bos_token_id": BOS}) == BOS
    assert of({"text_config": {"bos_token_id": BOS}}) == BOS
    assert of({"bos_token_id": None}) is None and of({}) is None and of(None) is None
    assert of({"bos_token_id": BOS, "vocab_size": BOS}) is None, "beyond the vocabulary"
    for name, document in {"first": [BOS, 9, 1], "last": [9, 1, BOS]}.items():
        with TokenIndexWriter(tmp_path / name, VOCAB_SIZE) as writer:
            writer.add_document(document)
        assert of({"bos_token_id": BOS}, TokenIndex.open(tmp_path / name)) is None


def test_a_capture_says_that_the_token_is_missing(tmp_path, sequences):
    from distill_pretrain.jobs import capture as job

    engine = NeedsBos(sequences)
    config = CaptureConfig(output_dir=tmp_path / "cache", micro_batch_size=4)
    (plan,) = make_plans(sequences, config, engine.identity).values()
    group = ReplicaGroup(engine, sequences)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": BOS}))
    with noted() as said:
        job._warn_of_missing_bos(tmp_path, group, plan, partial(ReplicaGroup, engine))
        (line,) = said
        assert line.startswith("WARNING: the teacher's config.json names token 3 as BOS")
        (tmp_path / "config.json").write_text("{}")
        job._warn_of_missing_bos(tmp_path, group, plan, partial(ReplicaGroup, engine))
        assert said == [line]


def test_padding_behind_the_text_is_no_label_after_a_token_in_front(sequences):
    plan = SequencePlan(sequences.plan.index, seq_len=SEQ_LEN - 1, seed=1)
    last = [plan.num_sequences - 1]
    is_text = plan.valid(last)
    assert not is_text.all()
    tokens, labels = bos._BosFirst(plan, 1).read(last)
    assert (tokens[:, 0] == 1).all()
    assert np.array_equal(labels, np.where(is_text, plan.read(last)[0], -100))


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_separate_documents_have_the_token_in_front_of_each(packing, tmp_path):
    end, seq_len = 2, 12
    with TokenIndexWriter(tmp_path / "train", 50) as writer:
        draw = np.random.default_rng(0)
        for length in draw.integers(1, 9, 40):
            writer.add_document([*draw.integers(10, 50, length), end])
    index = TokenIndex.open(tmp_path / "train")
    plan = SequencePlan(index, seq_len=seq_len, seed=1, document_end=end, packing=packing)
    numbers = np.arange(plan.num_sequences)
    tokens, labels = plan.unmasked.read(numbers)
    shifted, with_bos = bos._BosFirst(plan, 1).unmasked.read(numbers)
    for row in numbers.tolist():
        expected: list[tuple[int, int]] = []
        for place in range(seq_len):
            token, label = int(tokens[row, place]), int(labels[row, place])
            if not plan.valid([row])[0, place]:
                break
            if place == 0 or tokens[row, place - 1] == end:
                expected.append((1, token))
            expected.append((token, label))
        # What lies behind the cut of a sequence is no longer seen.
        expected = [*expected, *[(0, -100)] * seq_len][:seq_len]
        found = list(zip(shifted[row].tolist(), with_bos[row].tolist(), strict=True))
        last = int(plan.valid([row]).sum()) + int((shifted[row] == 1).sum()) - 1
        if last < seq_len and found[last][1] == -100:
            expected[last] = (expected[last][0], -100)
        assert found == expected, row
    assert (shifted == 1).sum() > plan.num_sequences + 10
