from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.sampling.drawing import systematic_points
from distill_pretrain.sampling.host import _locate
from distill_pretrain.sampling.kinds import SAMPLERS
from distill_pretrain.sampling.samplers import Sampler, sample_sets, sample_targets
from distill_pretrain.sampling.weights import BadLogits, integer_weights


def settings_of(sampler: str, num_draws: int, seed: int = 5) -> dict[str, object]:
    """Keywords of `sample_targets`."""
    top_p = {"top_p": 0.8} if sampler == "topp" else {}
    return {"sampler": sampler, "num_draws": num_draws, "seed": seed, **top_p}


def softmax64(logits: np.ndarray) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exact / exact.sum(-1, keepdims=True)


def some_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)


def dense_counts(targets: RaggedTargets, vocab: int) -> np.ndarray:
    """int64[T, V]."""
    rows = np.repeat(np.arange(len(targets.entries_per_token)), targets.entries_per_token)
    dense = np.zeros((len(targets.entries_per_token), vocab), np.int64)
    dense[rows, targets.ids] = targets.values
    return dense


def repeated(
    logits_row: np.ndarray, sampler: str, num_positions: int, num_draws: int
) -> np.ndarray:
    """Counts [num_positions, V] of one distribution at many positions."""
    logits = np.broadcast_to(logits_row, (num_positions, len(logits_row)))
    targets = sample_targets(
        logits,
        np.arange(num_positions, dtype=np.uint64) * np.uint64(977),
        sampler=sampler,
        num_draws=num_draws,
        seed=20,
    )
    return dense_counts(targets, len(logits_row))


@pytest.mark.parametrize("vocab", [40, 300])
def test_multinomial_counts_follow_the_softmax(vocab: int):
    logits = some_logits(1, vocab)[0]
    expected = softmax64(logits)
    observed = repeated(logits, "multinomial", 8000, 20).sum(0)
    likely = expected * 160000 >= 10
    observed = np.append(observed[likely], observed[~likely].sum() + 1e-9)
    expected = np.append(expected[likely], expected[~likely].sum() + 1e-9 / 160000)
    result = stats.chisquare(observed, expected / expected.sum() * observed.sum())
    assert 1e-4 < result.pvalue < 1 - 1e-4


@pytest.mark.parametrize("vocab", [40, 300])
def test_systematic_counts_follow_the_softmax(vocab: int):
    """Per id the count is floor or ceil, so its mean over P positions is a Bernoulli mean."""
    logits, positions, draws = some_logits(1, vocab)[0], 20000, 20
    expected = softmax64(logits) * draws
    fraction = expected - np.floor(expected)
    deviation = repeated(logits, "systematic", positions, draws).mean(0) - expected
    z = deviation / np.sqrt(fraction * (1 - fraction) / positions + 1e-12)
    assert np.abs(z).max() < 5
    # The ids' counts are correlated, so the statistic is compared loosely.
    assert 0.4 < np.mean(z**2) < 2.5


def test_draws_of_a_position_and_of_neighbours_are_independent():
    logits = some_logits(1, 6, scale=1.0)[0]
    expected = softmax64(logits)
    targets = [
        sample_targets(
            np.broadcast_to(logits, (20000, 6)),
            np.arange(20000, dtype=np.uint64),
            sampler="multinomial",
            num_draws=2,
            seed=3,
        )
    ]
    counts = dense_counts(targets[0], 6)
    pairs = np.array(
        [[np.sum((counts[:, a] > 0) & (counts[:, b] > 0)) for b in range(6)] for a in range(6)]
    )
    twice = np.array([(counts[:, a] == 2).sum() for a in range(6)])
    observed = np.concatenate([twice, pairs[np.triu_indices(6, 1)]])
    outer = np.outer(expected, expected)
    probs = np.concatenate([np.diag(outer), 2 * outer[np.triu_indices(6, 1)]])
    assert stats.chisquare(observed, probs * 20000).pvalue > 1e-4
    single = repeated(logits, "multinomial", 20001, 1).argmax(1)
    joint = np.zeros((6, 6))
    np.add.at(joint, (single[:-1:2], single[1::2]), 1)
    assert stats.chisquare(joint.reshape(-1), (outer * joint.sum()).reshape(-1)).pvalue > 1e-4


@pytest.mark.parametrize("num_draws", [1, 7, 50, 300])
def test_systematic_counts_are_floor_or_ceil_and_sum_to_num_draws(num_draws: int):
    logits = some_logits(200, 500)
    targets = sample_targets(
        logits, np.arange(200, dtype=np.uint64), sampler="systematic", num_draws=num_draws, seed=1
    )
    counts = dense_counts(targets, 500)
    weights = integer_weights(logits).astype(object)
    totals = weights.sum(1, keepdims=True)
    assert np.all(counts >= weights * num_draws // totals)
    assert np.all(counts <= -(-weights * num_draws // totals))
    assert np.all(counts.sum(1) == num_draws)


def test_variances_are_those_of_the_formulas_and_systematic_s_is_smaller():
    """Var(count_i / N): t (1 - t) / N multinomial; f (1 - f) / N**2 systematic, f = frac(N t)."""
    logits, draws, positions = some_logits(1, 200, scale=2.5)[0], 50, 12000
    t = softmax64(logits)
    f = draws * t - np.floor(draws * t)
    formula = {"multinomial": t * (1 - t) / draws, "systematic": f * (1 - f) / draws**2}
    measured = {
        name: (repeated(logits, name, positions, draws) / draws).var(0).sum() for name in formula
    }
    for name, variances in formula.items():
        assert measured[name] == pytest.approx(variances.sum(), rel=0.05)
    assert measured["multinomial"] / measured["systematic"] > 1.5


@settings(deadline=None, max_examples=200)
@given(st.integers(1, (1 << 60)), st.integers(0, (1 << 64) - 1), st.integers(1, 1024))
def test_systematic_points_are_exact_where_the_product_exceeds_64_bits(total, draw, num_draws):
    found = systematic_points(
        np.array([[draw]], np.uint64), np.array([total], np.int64), num_draws
    )[0]
    h = draw * total >> 64
    assert found.tolist() == [(k * total + h) // num_draws for k in range(num_draws)]
    assert found[0] >= 0 and found[-1] < total


def test_systematic_hits_every_point_equally_often_over_all_offsets():
    for total, num_draws in [(7, 3), (12, 5), (3, 8), (10, 10)]:
        hits = np.zeros(total, int)
        for h in range(total):
            draw = -(-h * (1 << 64) // total)
            points = systematic_points(
                np.array([[draw]], np.uint64), np.array([total], np.int64), num_draws
            )
            np.add.at(hits, points[0], 1)
        assert np.all(hits == num_draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("vocab", [37, 5000, 70000])
def test_rows_do_not_depend_on_their_batch(sampler: str, vocab: int):
    rows = 6 if vocab == 70000 else 60
    logits = some_logits(rows, vocab)
    positions = (np.arange(rows, dtype=np.uint64) + np.uint64(1 << 33)) * np.uint64(3)
    options = settings_of(sampler, 13, seed=(1 << 64) - 1)
    whole = sample_targets(logits, positions, **options)
    order = np.random.default_rng(0).permutation(rows)
    shuffled = sample_targets(logits[order], positions[order], **options)
    singles = [
        sample_targets(logits[r : r + 1], positions[r : r + 1], **options) for r in range(rows)
    ]
    assert np.array_equal(np.concatenate([s.ids for s in singles]), whole.ids)
    assert np.array_equal(np.concatenate([s.values for s in singles]), whole.values)
    ends = np.cumsum(whole.entries_per_token)[:-1]
    ids, values = np.split(whole.ids, ends), np.split(whole.values, ends)
    assert np.array_equal(shuffled.ids, np.concatenate([ids[r] for r in order]))
    assert np.array_equal(shuffled.values, np.concatenate([values[r] for r in order]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_ascend_and_invalid_rows_are_empty(sampler: str):
    logits = some_logits(40, 700)
    valid = np.arange(40) % 3 != 1
    logits[~valid] = np.nan
    options = settings_of(sampler, 9)
    targets = sample_targets(logits, np.arange(40, dtype=np.uint64), valid=valid, **options)
    assert np.array_equal(targets.entries_per_token > 0, valid)
    assert (targets.entries_per_token.dtype, targets.ids.dtype) == (np.int32, np.int32)
    for row in np.split(targets.ids, np.cumsum(targets.entries_per_token)[:-1]):
        assert np.all(np.diff(row) > 0)
    kept = sample_targets(logits[valid], np.flatnonzero(valid).astype(np.uint64), **options)
    assert np.array_equal(kept.ids, targets.ids)
    nothing = sample_targets(
        logits, np.arange(40, dtype=np.uint64), valid=np.zeros(40, bool), **options
    )
    assert len(nothing.ids) == 0 and not nothing.entries_per_token.any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unusable_rows_are_numbered_in_the_callers_logits(sampler: str):
    logits = some_logits(60, 5000)
    logits[[3, 41], 7] = np.nan
    logits[50] = np.inf
    valid = np.ones(60, bool)
    valid[0] = False
    with pytest.raises(BadLogits, match="rows 3, 41, 50") as caught:
        sample_targets(
            logits,
            np.arange(60, dtype=np.uint64),
            valid=valid,
            **settings_of(sampler, 3),
        )
    assert caught.value.rows == [3, 41, 50]


def test_seeds_positions_and_samplers_draw_apart():
    logits = np.zeros((1, 5000), np.float32)
    seen = set()
    for sampler in ("systematic", "multinomial"):
        for seed in (0, 1, 1 << 32):
            for position in (0, 1, 1 << 32):
                targets = sample_targets(
                    logits, np.array([position], np.uint64), sampler=sampler, num_draws=8, seed=seed
                )
                seen.add(tuple(targets.ids.tolist()))
    assert len(seen) == 18


def test_a_point_belongs_to_the_half_open_interval_of_its_id():
    cumulative = np.array([[2, 5, 5, 7], [0, 0, 1, 7]])
    points = np.array([[0, 1, 2, 4, 5, 6], [0, 0, 1, 2, 5, 6]])
    assert _locate(cumulative, points).tolist() == [[0, 0, 1, 1, 3, 3], [2, 2, 3, 3, 3, 3]]


def test_draws_of_fixed_logits_never_change():
    logits = ((np.arange(3 * 64) * 37 % 23) / np.float32(4)).astype(np.float32).reshape(3, 64)
    positions = np.array([0, 7, (1 << 33) + 5], np.uint64)
    for sampler, expected in GOLDEN_DIGESTS.items():
        found = sample_targets(logits, positions, **settings_of(sampler, 20, seed=99))
        stored = np.rint(found.values * (2048 if found.kind == "logprobs" else 1)).astype("<i4")
        parts = [found.entries_per_token, found.ids, stored]
        data = b"".join(part.astype("<i4").tobytes() for part in parts)
        assert hashlib.sha256(data).hexdigest()[:16] == expected


GOLDEN_DIGESTS = {
    "systematic": "e87f1f89a7185ad7",
    "multinomial": "98e4fa3e0466fe90",
    "topk": "098f502fb82272d0",
    "topp": "0e8ab770d7f39de6",
}


def test_topk_is_torch_s_topk_of_the_log_softmax():
    logits = some_logits(50, 900)
    targets = sample_targets(
        logits, np.arange(50, dtype=np.uint64), sampler="topk", num_draws=12, seed=0
    )
    logprobs = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    values, ids = logprobs.topk(12)
    order = ids.argsort(-1)
    assert np.array_equal(targets.ids.reshape(50, 12), ids.gather(1, order).numpy())
    expected = values.gather(1, order).numpy()
    assert np.abs(targets.values.reshape(50, 12) - expected).max() < 1e-6


def test_topk_ties_go_to_lower_ids_and_excluded_tokens_never_count():
    logits = np.array([[1, 2, 1, 1, 2, 1], [0, -np.inf, -np.inf, 3, -np.inf, -np.inf]], np.float32)
    targets = sample_targets(
        logits, np.arange(2, dtype=np.uint64), sampler="topk", num_draws=4, seed=0
    )
    assert targets.entries_per_token.tolist() == [4, 2]
    assert targets.ids.tolist() == [0, 1, 2, 4, 0, 3]
    assert np.exp(targets.values[4:]).sum() == pytest.approx(1)


def test_more_draws_than_tokens():
    logits = some_logits(3, 4)
    positions = np.arange(3, dtype=np.uint64)
    assert sample_targets(logits, positions, sampler="topk", num_draws=9, seed=0).ids.size == 12
    counts = sample_targets(logits, positions, sampler="systematic", num_draws=900, seed=0)
    assert np.abs(dense_counts(counts, 4) - 900 * softmax64(logits)).max() < 1.001


def rows_of(targets: RaggedTargets) -> list[tuple[list[int], list[float]]]:
    ends = np.cumsum(targets.entries_per_token)[:-1]
    parts = zip(np.split(targets.ids, ends), np.split(targets.values, ends), strict=True)
    return [(ids.tolist(), values.tolist()) for ids, values in parts]


def nucleus_by_hand(logits: np.ndarray, top_p: float, cap: int) -> list[int]:
    """Ids of one row, ascending, in Python's exact arithmetic."""
    weights = [int(w) for w in integer_weights(logits[None])[0]]
    kept: list[int] = []
    for token in sorted(range(len(weights)), key=lambda i: (-logits[i], i)):
        kept.append(token)
        if Fraction(sum(weights[i] for i in kept), sum(weights)) >= Fraction(top_p):
            break
    return sorted(kept[:cap])


@pytest.mark.parametrize("top_p", [1e-3, 0.25, 0.5, 0.9, 1 - 2**-53])
@pytest.mark.parametrize("cap", [1, 12, 400])
def test_topp_keeps_the_fewest_likeliest_ids_that_reach_its_mass(top_p: float, cap: int):
    logits = np.round(some_logits(60, 300) * 2) / np.float32(2)  # many ties
    logits[::4] *= 4
    logits[1::4, ::2] = -np.inf
    targets = sample_targets(
        logits, np.arange(60, dtype=np.uint64), sampler="topp", num_draws=cap, seed=0, top_p=top_p
    )
    exact = np.log(softmax64(logits), where=logits > -np.inf, out=np.full((60, 300), -np.inf))
    for row, (ids, values) in enumerate(rows_of(targets)):
        assert ids == nucleus_by_hand(logits[row], top_p, cap)
        assert values == pytest.approx(exact[row, ids], abs=1e-6)
    assert (targets.kind, targets.num_draws) == ("logprobs", cap)


def test_a_mass_that_is_just_reached_needs_no_further_id():
    """Four equal logits have a quarter of the mass each, exactly."""
    logits = np.array([[0, 2, 2, -np.inf, 2, 2]], np.float32)
    logits[0, 0] = -np.inf
    for top_p, ids in [(0.25, [1]), (0.5, [1, 2]), (0.5 + 1e-15, [1, 2, 4]), (0.75, [1, 2, 4])]:
        found = sample_targets(
            logits, np.zeros(1, np.uint64), sampler="topp", num_draws=9, seed=0, top_p=top_p
        )
        assert found.ids.tolist() == ids


def test_samplers_that_share_a_softmax_give_what_each_gives_alone():
    logits = some_logits(70, 5000)
    positions = np.arange(70, dtype=np.uint64) * np.uint64(31)
    valid = np.arange(70) % 5 != 2
    logits[~valid] = np.nan
    settings = [settings_of(name, n, seed=n) for name in SAMPLERS for n in (3, 40)]
    samplers = [Sampler(name=str(s.pop("sampler")), **s) for s in map(dict, settings)]  # type: ignore[arg-type]
    together = sample_sets(logits, positions, samplers, valid=valid)
    for found, options in zip(together, settings, strict=True):
        alone = sample_targets(logits, positions, valid=valid, **options)
        assert (found.kind, found.num_draws) == (alone.kind, alone.num_draws)
        for name in ("entries_per_token", "ids", "values"):
            a, b = getattr(found, name), getattr(alone, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
