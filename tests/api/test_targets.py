"""Sampling from logits gives what a capture stores, whatever the logits came in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_pretrain import CacheReader, pad_targets, sample_targets
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import ConfigError, LossInputError, TeacherError
from tests.support.cache_samples import by_id


def equal(first: RaggedTargets, second: RaggedTargets) -> bool:
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("entries_per_token", "ids", "values")
    )


def logits_of(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_they_are_the_targets_that_a_cache_holds(plan, folder, own_teacher):
    numbers = np.array([3, 191])
    tokens, labels = plan.read(numbers)
    found = sample_targets(
        own_teacher["teacher"](torch.from_numpy(tokens).long()),
        numbers[:, None] * plan.seq_len + np.arange(plan.seq_len),
        valid=labels >= 0,
    )
    with CacheReader.open(folder / "cache") as cache:
        stored = [by_id(cache.read(n, row)) for n, row in zip(numbers, tokens, strict=True)]
    assert by_id(found) == [position for sequence in stored for position in sequence]


@pytest.mark.parametrize("sampler", ["systematic", "multinomial", "topk", "topp"])
def test_neither_batch_nor_kind_of_array_matters(sampler):
    logits, positions = logits_of(2, 5, 40), np.arange(10).reshape(2, 5) + 7
    settings = {"sampler": sampler, "num_draws": 9, "seed": 5}
    settings |= {"top_p": 0.8} if sampler == "topp" else {}
    whole = sample_targets(logits, positions, **settings)
    assert equal(whole, sample_targets(logits.numpy(), torch.from_numpy(positions), **settings))
    assert equal(
        sample_targets(logits.bfloat16(), positions, **settings),
        sample_targets(logits.bfloat16().float().numpy(), positions, **settings),
    )
    alone = sample_targets(logits[1, 2:3], positions[1, 2:3], **settings)
    assert by_id(alone) == by_id(whole)[7:8]
    another = sample_targets(logits[1, 2:3], positions[1, 2:3] + 1, **settings)
    assert (by_id(another) == by_id(alone)) is (sampler in ("topk", "topp"))


def test_they_become_the_tensors_of_a_loss():
    targets = sample_targets(
        logits_of(2, 3, 40),
        np.arange(6).reshape(2, 3),
        num_draws=8,
        valid=np.array([[True] * 3, [True, False, True]]),
    )
    padded = pad_targets(targets, (2, 3))
    assert padded.ids.shape == padded.probs.shape == (2, 3, targets.entries_per_token.max())
    assert padded.ids.dtype == torch.int64 and padded.probs.dtype == torch.float32
    assert (padded.ids[1, 1] == -1).all() and (padded.probs[1, 1] == 0).all()
    torch.testing.assert_close(padded.probs.sum(-1), torch.tensor([[1.0, 1, 1], [1, 0, 1]]))
    kept = padded.ids >= 0
    assert np.array_equal(padded.ids[kept], targets.ids)
    assert np.array_equal(padded.probs[kept], targets.values / np.float32(8))
    assert torch.equal(pad_targets(targets).ids, padded.ids.flatten(0, 1))
    for shape in ((2, 2), (-2, -3), ()):
        with pytest.raises(LossInputError, match=r"where: shape; .*product is the 6 positions"):
            pad_targets(targets, shape)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "nucleus"}, "where: sampler; found: 'nucleus'; expected: 'systematic'"),
        ({"num_draws": 0}, "where: num_draws; found: 0"),
        ({"num_draws": 1025}, "where: num_draws; found: 1025"),
        ({"seed": -1}, "where: seed; found: -1"),
        ({"sampler": "topp"}, "top_p is not given"),
        ({"top_p": 0.9}, "top_p=0.9 says nothing to sampler systematic"),
    ],
)
def test_settings_that_are_none_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        sample_targets(logits_of(2, 40), [0, 1], **settings)


@pytest.mark.parametrize(
    ("logits", "positions", "words"),
    [
        (logits_of(2, 40).double(), [0, 1], "where: logits; found: float64"),
        (logits_of(2, 40).double().numpy(), [0, 1], "where: logits; found: float64"),
        ([[0.0, 1.0]], [0], "where: logits; found: "),
        (logits_of(40), [], r"where: logits; found: float32 \[40\]"),
        (logits_of(2, 1), [0, 1], r"found: float32 \[2, 1\]; expected: .* V from 2"),
        (logits_of(2, 40), [0], r"where: positions; found: int64 \[1\]; expected: integers \[2\]"),
        (logits_of(2, 40), [0.0, 1.0], "where: positions; found: float64"),
        (logits_of(2, 40), [0, -1], "where: positions; found: -1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(logits, positions, words):
    with pytest.raises(LossInputError, match=words):
        sample_targets(logits, positions)


def test_valid_is_a_mask_and_logits_are_finite():
    with pytest.raises(LossInputError, match=r"where: valid; found: int64 \[2\]; expected: bool"):
        sample_targets(logits_of(2, 40), [0, 1], valid=[0, 1])
    logits = logits_of(2, 40)
    logits[1, 3] = torch.nan
    with pytest.raises(TeacherError, match="where: rows 1; found: NaN"):
        sample_targets(logits, [0, 1])
    assert sample_targets(logits, [0, 1], valid=[True, False]).entries_per_token[1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["systematic", "multinomial", "topk"])
def test_a_gpu_samples_the_same_bits(sampler):
    logits, positions = logits_of(64, 4000).bfloat16(), np.arange(64)
    settings = {"sampler": sampler, "num_draws": 50}
    expected = sample_targets(logits, positions, **settings)
    assert equal(sample_targets(logits.cuda(), positions, **settings), expected)
