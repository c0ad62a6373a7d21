"""The table of samplers: whoever reads it finds every sampler, and every sampler that draws keeps what it promises."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from distill_pretrain.cache.codec.registry import CODECS, codec_number
from distill_pretrain.cache.plan import _KEYS_OF_SAMPLER
from distill_pretrain.planning.cache_size import Targets, density_without_pilot
from distill_pretrain.sampling.drawing import DRAWN
from distill_pretrain.sampling.kinds import SAMPLERS, SUMMARY, UNBIASED, SamplerName
from distill_pretrain.sampling.samplers import sample_targets
from distill_pretrain.teacher.capture import _described
from distill_pretrain.teacher.config import TargetsConfig, TargetSetConfig

POSITIONS, VOCAB = 20_000, 23
LOGITS = (np.random.default_rng(0).standard_normal(VOCAB) * 2).astype(np.float32)


def test_what_recipes_take_is_the_table():
    assert set(get_args(SamplerName)) == set(SAMPLERS)
    assert set(DRAWN) == set(UNBIASED)
    streams = [kind.stream for kind in SAMPLERS.values() if kind.values == "counts"]
    assert None not in streams and len(set(streams)) == len(streams)
    assert TargetsConfig.model_fields["sampler"].description == SUMMARY
    assert all(f"`{name}`" in SUMMARY for name in SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_described_in_a_plan_encoded_and_sized(name):
    own = dict.fromkeys(SAMPLERS[name].own_settings, 0.5)
    targets = TargetSetConfig(sampler=name, num_draws=20, seed=1, **own)
    assert set(_described(targets)) == set(_KEYS_OF_SAMPLER[name])
    assert CODECS[codec_number("hc", name)] == ("hc", SAMPLERS[name].values)
    assert 1 <= density_without_pilot(Targets(sampler=name, num_draws=20)).entries <= 20


@pytest.mark.parametrize("num_draws", [1, 7, 40])
@pytest.mark.parametrize("name", UNBIASED)
def test_a_sampler_that_draws_is_unbiased_with_the_error_that_it_states(name, num_draws):
    logits = np.broadcast_to(LOGITS, (POSITIONS, VOCAB))
    positions = np.arange(POSITIONS, dtype=np.uint64) * np.uint64(31)
    targets = sample_targets(logits, positions, sampler=name, num_draws=num_draws, seed=4)
    dense = np.zeros((POSITIONS, VOCAB))
    rows = np.repeat(np.arange(POSITIONS), targets.entries_per_token)
    dense[rows, targets.ids] = targets.values / num_draws
    exact = np.exp(LOGITS.astype(np.float64))
    exact /= exact.sum()
    squares = (dense - exact) ** 2
    deviations = (dense.mean(0) - exact) / np.sqrt(squares.mean(0) / POSITIONS)
    assert np.abs(deviations).max() < 4.5
    (stated,) = DRAWN[name].errors(exact[None], num_draws)
    errors = squares.sum(1)
    assert abs(errors.mean() - stated) < 4.5 * errors.std() / np.sqrt(POSITIONS) + 1e-9
