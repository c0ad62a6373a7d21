"""The dataset gives what plan and cache hold, to any DataLoader."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distill_pretrain import (
    CacheReader,
    DistillationDataset,
    SequencePlan,
    TokenIndex,
    collate_distillation,
    pad_targets,
)
from distill_pretrain.errors import (
    CacheIncomplete,
    CacheMismatch,
    ConfigError,
    TokenDataError,
    TokenizerMismatch,
)
from tests.support.cache_samples import write_corpus


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_an_item_is_a_sequence_with_its_targets(plan, folder):
    dataset = DistillationDataset(plan, folder / "cache")
    assert len(dataset) == plan.num_sequences == 192 and dataset.vocab_size == 64
    item = dataset[5]
    tokens, labels = plan.read([5])
    with CacheReader.open(folder / "cache") as cache:
        targets = pad_targets(cache.read(5, tokens[0]))
    assert {name: value.dtype for name, value in item.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "ids": torch.int64,
        "probs": torch.float32,
    }
    assert np.array_equal(item["tokens"], tokens[0]) and np.array_equal(item["labels"], labels[0])
    assert torch.equal(item["ids"], targets.ids) and torch.equal(item["probs"], targets.probs)
    torch.testing.assert_close(item["probs"].sum(-1), torch.ones(32))
    assert same(dataset[-1], dataset[191]) and same(dataset[np.int64(5)], item)
    assert set(DistillationDataset(plan, num_sequences=3)[2]) == {"tokens", "labels"}


def test_the_last_position_has_neither_label_nor_target(plan, folder):
    item = DistillationDataset(plan, folder / "cache")[191]
    assert item["labels"][-1] == -100
    assert (item["ids"][-1] == -1).all() and (item["probs"][-1] == 0).all()


def test_a_batch_is_padded_to_its_widest_position(plan, folder):
    dataset = DistillationDataset(plan, folder / "cache")
    items = [dataset[number] for number in range(8)]
    widths = [item["ids"].size(-1) for item in items]
    assert len(set(widths)) > 1
    batch = collate_distillation(items)
    assert batch["tokens"].shape == batch["labels"].shape == (8, 32)
    assert batch["ids"].shape == batch["probs"].shape == (8, 32, max(widths))
    for row, (item, width) in enumerate(zip(items, widths, strict=True)):
        assert torch.equal(batch["ids"][row, :, :width], item["ids"])
        assert torch.equal(batch["probs"][row, :, :width], item["probs"])
        assert (batch["ids"][row, :, width:] == -1).all()
        assert (batch["probs"][row, :, width:] == 0).all()
    with pytest.raises(TokenDataError, match="do not make a batch; where: items; found: 0 of"):
        collate_distillation([])
    with pytest.raises(TokenDataError, match="all with targets or all without"):
        collate_distillation([items[0], DistillationDataset(plan)[1]])


def test_worker_processes_read_what_one_process_reads(plan, folder):
    dataset = DistillationDataset(plan, folder / "cache", num_sequences=12)
    settings = {"batch_size": 4, "collate_fn": collate_distillation}
    expected = list(DataLoader(dataset, **settings))
    found = list(DataLoader(dataset, num_workers=2, **settings))
    assert len(found) == 3 and all(map(same, found, expected))


def test_it_travels_to_other_processes_without_the_corpus(plan, folder):
    dataset = DistillationDataset(plan, folder / "cache")
    expected = dataset[7]
    packed = pickle.dumps(dataset)
    # The corpus alone has 12 kB, and larger ones have terabytes.
    assert len(packed) < 10_000
    assert same(pickle.loads(packed)[7], expected)


def test_the_end_is_an_index_error(plan, folder):
    dataset = DistillationDataset(plan, folder / "cache", num_sequences=3)
    assert sum(1 for _ in dataset) == 3
    with pytest.raises(IndexError, match=r"no such item.*found: 3; expected: -3 to 2"):
        dataset[3]


def test_what_does_not_fit_is_refused(plan, folder, tmp_path):
    index = plan.index
    with pytest.raises(CacheMismatch, match="another order of documents"):
        DistillationDataset(SequencePlan(index, seq_len=32, seed=2), folder / "cache")
    with pytest.raises(CacheMismatch, match="another seq_len"):
        DistillationDataset(SequencePlan(index, seq_len=16, seed=1), folder / "cache")
    held_out = SequencePlan(TokenIndex.open(folder / "held_out"), seq_len=32, seed=1)
    with pytest.raises(CacheMismatch, match="another corpus"):
        DistillationDataset(held_out, folder / "cache")
    with pytest.raises(CacheIncomplete, match="no cache here"):
        DistillationDataset(plan, tmp_path)
    with pytest.raises(TokenDataError, match="found: 193; expected: at most 192"):
        DistillationDataset(plan, num_sequences=193)
    with pytest.raises(ConfigError, match="where: num_sequences; found: 0"):
        DistillationDataset(plan, num_sequences=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 0, "seed": 1}, "where: seq_len; found: 0; expected: a whole number"),
        ({"seq_len": 4.0, "seed": 1}, "where: seq_len; found: 4.0"),
        ({"seq_len": True, "seed": 1}, "where: seq_len; found: True"),
        ({"seq_len": 4, "seed": -1}, "where: seed; found: -1"),
        ({"seq_len": 4, "seed": 1 << 64}, "where: seed"),
    ],
)
def test_a_plan_refuses_what_is_no_setting(plan, settings, words):
    with pytest.raises(ConfigError, match=words):
        SequencePlan(plan.index, **settings)


def test_reading_refuses_numbers_that_name_nothing(plan, folder, tmp_path):
    with pytest.raises(TokenDataError, match="a whole number; where: sequences; found: float64"):
        plan.read([0.5])
    with pytest.raises(TokenDataError, match=r"no such document.*found: 48; expected: 0 to 47"):
        plan.index.read(48, 0, 1)
    with pytest.raises(TokenDataError, match="found: 2 tokens from 127; expected: within its 128"):
        plan.index.read(0, 127, 2)
    with pytest.raises(TokenDataError, match=r"where: document 0.*found: float64"):
        write_corpus(tmp_path / "text", [[0.5]])
    with pytest.raises(TokenizerMismatch, match="ids below the vocabulary size 10"):
        TokenIndex.open(folder / "train", vocab_size=10)


def test_a_cache_refuses_tokens_that_are_no_sequence(plan, folder):
    tokens = plan.read([0])[0][0]
    with CacheReader.open(folder / "cache") as cache:
        for wrong in (tokens[:-1], tokens.astype(np.int64), tokens[None]):
            with pytest.raises(CacheMismatch, match=r"expected: int32 \(32,\)"):
                cache.read(0, wrong)
        with pytest.raises(CacheMismatch, match="found: 4 to 33; expected: start < stop"):
            cache.read(0, tokens, 4, 33)
        with pytest.raises(CacheMismatch, match=r"no such sequence in the cache.*found: 192"):
            cache.read(192, tokens)
