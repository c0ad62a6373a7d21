"""A vocabulary split over ranks gives the targets of the whole rows, bit for bit, however it is split."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import TeacherError
from distill_pretrain.processes.process import process_group
from distill_pretrain.sampling.figures import DistributionFigures
from distill_pretrain.sampling.samplers import Sampler, sample_sets
from distill_pretrain.sampling.vocab_parallel import sample_sets_parallel
from distill_pretrain.sampling.weights import BadLogits
from tests.support.distributed import run_distributed

ROWS, VOCAB = 70, 600
SPLITS = {
    "even": [0, 150, 300, 450, 600],
    "uneven": [0, 7, 420, 421, 600],
    "an empty shard in the midst": [0, 200, 200, 590, 600],
    "empty shards at the ends": [0, 0, 300, 600, 600],
    "one rank has all": [0, 0, 600, 600, 600],
}
SAMPLERS = [
    Sampler(name="systematic", num_draws=50, seed=3),
    Sampler(name="multinomial", num_draws=50, seed=(1 << 64) - 1),
    Sampler(name="multinomial", num_draws=1, seed=9),
    Sampler(name="topk", num_draws=12, seed=0),
    Sampler(name="topk", num_draws=900, seed=0),
    Sampler(name="topp", num_draws=40, seed=0, top_p=0.9),
    Sampler(name="topp", num_draws=600, seed=0, top_p=0.99),
]


def hard_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, positions, validity: ties, excluded ids, peaks, a plain, and rows not to be looked at."""
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
    logits[::5] = np.round(logits[::5])
    logits[1::5, : VOCAB // 2] = -np.inf
    logits[2, 333] = 500
    logits[3] = 0
    logits[4, 1:] = -np.inf
    valid = np.arange(ROWS) % 7 != 5
    logits[~valid] = np.nan
    return logits, np.arange(ROWS, dtype=np.uint64) + np.uint64(1 << 34), valid


def digest(targets: list[RaggedTargets]) -> str:
    parts = [a for t in targets for a in (t.entries_per_token, t.ids, t.values)]
    assert all(a.dtype.itemsize == 4 for a in parts)
    return hashlib.sha256(b"".join(a.tobytes() for a in parts)).hexdigest()


def figures_of(figures: DistributionFigures) -> list[float]:
    return [figures.entropy, figures.uniform_share, figures.top_share]


def split_job() -> dict[str, Any]:
    """Every split, and every fault on one rank; what each rank saw."""
    torch.set_num_threads(1)
    with process_group():
        rank, group = dist.get_rank(), dist.group.WORLD
        logits, positions, valid = hard_rows()

        def sample(
            bounds: list[int], changed: np.ndarray = logits, vocab_size: int = VOCAB
        ) -> tuple[str, list[float]]:
            own = torch.from_numpy(changed[:, bounds[rank] : bounds[rank + 1]].copy())
            figures = DistributionFigures(VOCAB)
            targets = sample_sets_parallel(
                own,
                bounds[rank],
                positions,
                SAMPLERS,
                group,
                vocab_size=vocab_size,
                valid=valid,
                figures=figures,
            )
            return digest(targets), figures_of(figures)

        def failing(**arguments: Any) -> str:
            try:
                return str(sample(**{"bounds": SPLITS["even"], **arguments}))
            except TeacherError as error:
                return f"{getattr(error, 'rows', '')}{error.what}"

        bad = logits.copy()
        bad[11, 599], bad[50, 10], bad[64] = np.nan, np.inf, -np.inf
        mine = {
            **{name: sample(bounds) for name, bounds in SPLITS.items()},
            "bad": failing(changed=bad),
            "padding": failing(vocab_size=VOCAB - 8),
            "gap": failing(bounds=[[0, 100, 300, 450, 600], SPLITS["even"]][rank % 2]),
        }
        everyone: list[Any] = [None] * 4
        dist.all_gather_object(everyone, mine)
    return {name: [of_rank[name] for of_rank in everyone] for name in mine}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_distributed(split_job, 4)


@pytest.fixture(scope="module")
def whole() -> tuple[str, list[float]]:
    logits, positions, valid = hard_rows()
    figures = DistributionFigures(VOCAB)
    targets = sample_sets(logits, positions, SAMPLERS, valid=valid, figures=figures)
    return digest(targets), figures_of(figures)


@pytest.mark.parametrize("split", SPLITS)
def test_every_rank_gets_the_bytes_of_the_whole_rows(found, whole, split):
    for of_rank, figures in found[split]:
        assert of_rank == whole[0]
        assert figures == pytest.approx(whole[1], rel=1e-12)


def test_a_bad_shard_is_an_error_on_every_rank(found):
    assert set(found["bad"]) == {"[11, 50, 64]the teacher's logits are unusable in 3 row(s)"}


def test_columns_that_are_not_the_vocabulary_are_refused_on_every_rank(found):
    message = "the teacher's logits do not have one column per token of the vocabulary"
    assert set(found["padding"]) == set(found["gap"]) == {message}


def test_figures_are_those_of_the_softmax():
    logits, positions, valid = hard_rows()
    figures = DistributionFigures(VOCAB)
    sample_sets(logits, positions, SAMPLERS[:1], valid=valid, figures=figures)
    looked_at = logits[valid][::8].astype(np.float64)
    probs = np.exp(looked_at - looked_at.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    entropies = -(probs * np.log(np.maximum(probs, 1e-300))).sum(1)
    assert figures.entropy == pytest.approx(entropies.mean(), abs=1e-6)
    tops = np.bincount(looked_at.argmax(1))
    assert figures.top_share == tops.max() / len(looked_at)
    plain = DistributionFigures(VOCAB)
    sample_sets(np.zeros((9, VOCAB), np.float32), positions[:9], SAMPLERS[:1], figures=plain)
    assert figures_of(plain) == [pytest.approx(np.log(VOCAB)), 1.0, 1.0]


def test_logprobs_of_integer_totals_are_within_a_millionth_of_exact():
    rng = np.random.default_rng(0)
    worst = 0.0
    for scale in (0.1, 1, 3, 10):
        logits = (rng.standard_normal((4, 130_000)) * scale).astype(np.float32)
        positions = np.arange(4, dtype=np.uint64)
        (found,) = sample_sets(logits, positions, [Sampler(name="topk", num_draws=20, seed=0)])
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True).astype(np.float64)
        exact = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        values = exact[np.repeat(np.arange(4), 20), found.ids]
        # Beside the definition's own error there is the rounding to float32.
        worst = max(
            worst,
            float((np.abs(found.values - values) - np.spacing(np.abs(found.values)) / 2).max()),
        )
    assert worst < 1e-6


def test_bad_logits_travel_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(BadLogits([3, 5])))
    assert error.rows == [3, 5]
