"""The sampling kernels, run on the CPU, give the bits of the numpy samplers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.kernels.cuda.backend import launcher_for
from distill_pretrain.kernels.cuda.launcher import Launcher
from distill_pretrain.kernels.teacher_sampling import MAX_DRAWS, SOURCE, DeviceColumns
from distill_pretrain.sampling.columns import Draws
from distill_pretrain.sampling.drawing import DRAWN
from distill_pretrain.sampling.figures import DistributionFigures
from distill_pretrain.sampling.host import HostColumns
from distill_pretrain.sampling.samplers import Sampler, sample_columns, sample_sets, sample_split
from distill_pretrain.sampling.weights import BadLogits, integer_weights
from tests.support.emulation import emulated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QWEN_VOCAB = 151_936
EVERY_N = (1, 12, 50, 64, 200, 256)
SEED = (1 << 64) - 3
SAMPLERS = [
    *(Sampler(name="systematic", num_draws=n, seed=SEED) for n in EVERY_N),
    *(Sampler(name="multinomial", num_draws=n, seed=n) for n in EVERY_N),
    *(Sampler(name="topk", num_draws=n, seed=0) for n in EVERY_N),
    *(Sampler(name="topp", num_draws=n, seed=0, top_p=p) for n, p in ((5, 0.9), (256, 0.999))),
]
FEW = [SAMPLERS[2], SAMPLERS[8], SAMPLERS[13], SAMPLERS[-1]]


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    return emulated(SOURCE)


def hard_rows(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ties, excluded ids, a peak, a plain, a lone id, and logits that half precision cannot tell apart."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    logits[::5] = np.round(logits[::5])
    logits[1::5, : vocab // 2] = -np.inf
    logits[2::10, vocab // 3] = 500
    logits[3::10] = 0
    logits[4::10, 1:] = -np.inf
    logits[6::10] *= 8
    return torch.from_numpy(logits).to(dtype)


def positions_of(rows: int) -> np.ndarray:
    """Beyond 32 bits."""
    return np.arange(rows, dtype=np.uint64) * np.uint64(977) + np.uint64(1 << 34)


def require_same(found: list[RaggedTargets], expected: list[RaggedTargets]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.kind, ours.num_draws) == (theirs.kind, theirs.num_draws)
        for name in ("entries_per_token", "ids", "values"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


def require_same_samples(
    columns: DeviceColumns, logits: torch.Tensor, samplers: list[Sampler], **options: Any
) -> None:
    """That these columns give the targets that numpy gives of `logits`."""
    positions = positions_of(len(logits))
    expected = sample_sets(logits.float().numpy(), positions, samplers, **options)
    require_same(sample_columns(columns, positions, samplers, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sampler_gives_the_bits_of_numpy(launcher, dtype):
    logits = hard_rows(11, 600, dtype)
    require_same_samples(DeviceColumns(logits, launcher, threads=64), logits, SAMPLERS)


@pytest.mark.parametrize("vocab", [1, 2, 31, 255, 256, 257, 1023, 8193])
def test_any_width_gives_the_bits_of_numpy(launcher, vocab):
    logits = hard_rows(7, vocab, torch.bfloat16)
    require_same_samples(DeviceColumns(logits, launcher, threads=64), logits, FEW)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_anywhere(launcher, dtype):
    logits = hard_rows(6, 600, dtype)
    wide = torch.full((6, 617), torch.nan, dtype=dtype)
    wide[:, 5:605] = logits
    aligned = torch.full((9, 640), torch.nan, dtype=dtype)
    aligned[3:, :600] = logits
    of_one = logits[:1].expand(6, 600)
    cases = {
        "odd rows": (wide[:, 5:605], logits),
        "padded rows": (aligned[3:, :600], logits),
        "one row many times": (of_one, of_one),
        "columns apart": (logits.t().contiguous().t(), logits),
    }
    for given, expected in cases.values():
        require_same_samples(DeviceColumns(given, launcher, threads=64), expected, FEW)


def test_rows_that_do_not_count_are_not_looked_at(launcher):
    logits = hard_rows(40, 300)
    valid = np.arange(40) % 3 != 1
    valid[:2] = valid[-3:] = False
    logits[~torch.from_numpy(valid)] = torch.nan
    require_same_samples(DeviceColumns(logits, launcher), logits, FEW, valid=valid)
    nothing = DeviceColumns(logits, launcher)
    require_same_samples(nothing, logits, FEW, valid=np.zeros(40, np.bool_))


def test_blocks_of_rows_change_nothing(launcher, monkeypatch):
    monkeypatch.setattr(DeviceColumns, "rows_at_once", 3)
    logits = hard_rows(10, 300)
    require_same_samples(DeviceColumns(logits, launcher, threads=64), logits, FEW)


@pytest.mark.parametrize("schedule", [1, 2, 3, 4])
def test_the_order_of_threads_changes_nothing(schedule):
    logits = hard_rows(7, 2100, torch.bfloat16)
    columns = DeviceColumns(logits, emulated(SOURCE, schedule=schedule), threads=128)
    require_same_samples(columns, logits, FEW)


def test_more_draws_than_the_threads_of_a_block(launcher):
    logits = hard_rows(1, 3000)
    samplers = [
        Sampler(name="systematic", num_draws=MAX_DRAWS, seed=1),
        Sampler(name="multinomial", num_draws=1000, seed=1),
        Sampler(name="multinomial", num_draws=2048, seed=2),
    ]
    require_same_samples(DeviceColumns(logits, launcher, threads=64), logits, samplers)


def test_weights_are_numpy_s_at_every_depth(launcher):
    """From 0 to beyond the 41 binary orders that count; a fused multiply-add would change many of them."""
    rng = np.random.default_rng(1)
    logits = rng.uniform(-30, 0, (2, 60_000)).astype(np.float32)
    logits[0, :5000] = np.float32(-np.log(2)) * np.arange(5000) / 100
    logits[1, :2000] = -rng.uniform(0, 1e-3, 2000)
    logits[:, -1] = 0
    block = DeviceColumns(torch.from_numpy(logits), launcher).block(np.arange(2))
    expected = integer_weights(logits)
    assert block.weigh(block.largest()).tolist() == expected.sum(1).tolist()
    assert block.likeliest(60_000).weights.reshape(2, -1).tolist() == expected.tolist()


def test_points_at_the_very_ends_of_columns_are_found(launcher):
    """No random point comes there, so the weight of lower ids is chosen to bring some: lanes' and blocks' ends too."""
    logits = hard_rows(2, 2000)[1:]  # its first half weighs nothing
    cumulative = integer_weights(logits.numpy()).cumsum(1)[0]
    ends = cumulative[[0, 999, 1000, 1007, 1008, 1023, 1024, 1279, 1280, 1535, 1536, 1998, 1999]]
    wanted = np.concatenate([ends - 1, ends, ends + 1])
    draws = Draws("multinomial", 1, SEED, positions_of(len(wanted)))
    totals = np.full(len(wanted), cumulative[-1])
    below = DRAWN["multinomial"].points(draws.words, totals, 1)[:, 0] - wanted
    rows = logits.expand(len(wanted), 2000)
    drawn = []
    for columns in (DeviceColumns(rows, launcher, threads=64), HostColumns(rows.numpy())):
        block = columns.block(np.arange(len(wanted)))
        block.weigh(block.largest())
        entries = block.drawn(draws, slice(None), below, totals)
        drawn.append([array.tolist() for array in entries])
    assert drawn[0] == drawn[1]
    assert set(drawn[0][1]) > {1000, 1023, 1024, 1280, 1536, 1999}


@pytest.mark.parametrize("k", [1, 40, 300])
def test_a_rank_s_candidates_and_moments_are_numpy_s(launcher, k):
    logits = hard_rows(7, 300)
    blocks = [
        c.block(np.arange(7))
        for c in (DeviceColumns(logits, launcher), HostColumns(logits.numpy()))
    ]
    for block in blocks:
        block.weigh(block.largest())
    found, expected = ([array.tolist() for array in block.likeliest(k)] for block in blocks)
    assert found == expected
    (depths, top), (expected_depths, expected_top) = (b.moments(np.arange(1, 7)) for b in blocks)
    assert top.tolist() == expected_top.tolist()
    assert depths == pytest.approx(expected_depths, rel=1e-12)


def test_a_true_vocabulary_gives_the_bits_of_numpy(launcher):
    logits = hard_rows(3, QWEN_VOCAB, torch.bfloat16)
    require_same_samples(DeviceColumns(logits, launcher), logits, FEW)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_bits_of_numpy(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    launcher = launcher_for(SOURCE, device)
    for vocab, samplers in ((600, SAMPLERS), (257, FEW), (QWEN_VOCAB, FEW)):
        logits = hard_rows(20, vocab, dtype)
        require_same_samples(DeviceColumns(logits.to(device), launcher), logits, samplers)


def softmax64(logits: np.ndarray) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exact / exact.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", ["systematic", "multinomial"])
def test_draws_from_a_true_vocabulary_are_unbiased(launcher, name):
    """One distribution at many positions: by the numpy sampler's parts, and the first of them by the kernels."""
    draws, num_positions = 50, 6000
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal((1, QWEN_VOCAB)) * 2.5).astype(np.float32)
    logits[0, rng.integers(0, QWEN_VOCAB, 300)] += 8
    cumulative = integer_weights(logits).cumsum(1)[0]
    words = Draws(name, draws, SEED, positions_of(num_positions)).words
    points = DRAWN[name].points(words, np.full(num_positions, cumulative[-1]), draws)
    ids = np.searchsorted(cumulative, points, side="right")
    counts = np.bincount(ids.reshape(-1), minlength=QWEN_VOCAB)

    expected = softmax64(logits)[0] * draws
    often = expected * num_positions >= 25
    observed = np.append(counts[often], counts[~often].sum())
    mean = np.append(expected[often], expected[~often].sum())
    if name == "multinomial":
        pvalue = stats.chisquare(observed, mean / mean.sum() * observed.sum()).pvalue
        assert 1e-4 < pvalue < 1 - 1e-4
    else:
        fraction = mean - np.floor(mean)
        errors = observed / num_positions - mean
        assert np.abs(errors / np.sqrt(fraction * (1 - fraction) / num_positions)).max() < 5

    columns = DeviceColumns(torch.from_numpy(logits).expand(4, QWEN_VOCAB), launcher)
    (found,) = sample_columns(
        columns, positions_of(4), [Sampler(name=name, num_draws=draws, seed=SEED)]
    )
    assert np.repeat(found.ids, found.values).tolist() == np.sort(ids[:4], axis=1).ravel().tolist()


class Meeting:
    """Where the ranks of one job, each a thread, exchange what they have; one kernel at a time is emulated."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.lock = threading.Lock()
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._table: list[Any] = [None] * ranks

    def everyone(self, rank: int, value: Any) -> list[Any]:
        self._table[rank] = value
        self._barrier.wait()
        table = list(self._table)
        self._barrier.wait()
        return table


class ThreadSplit:
    """A `Split` over threads."""

    def __init__(self, meeting: Meeting, rank: int, first_id: int) -> None:
        self.first_id = first_id
        self._meeting, self._rank = meeting, rank

    def rows_at_once(self, columns: int) -> int:
        return 8

    def maxima(self, own: np.ndarray) -> np.ndarray:
        return np.max(self._meeting.everyone(self._rank, own.copy()), axis=0)

    def totals(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        everyone = np.array(self._meeting.everyone(self._rank, own.copy()))
        return everyone[: self._rank].sum(0), everyone.sum(0)

    def gathered(self, own: list[np.ndarray]) -> list[list[np.ndarray]]:
        return self._meeting.everyone(self._rank, own)


class LockedLauncher:
    def __init__(self, launcher: Launcher, lock: threading.Lock) -> None:
        self._launcher, self._lock = launcher, lock

    def launch(self, *arguments: Any, **options: Any) -> None:
        with self._lock:
            self._launcher.launch(*arguments, **options)


def sampled_by_ranks(launcher: Launcher, logits: torch.Tensor, bounds: list[int]) -> list[Any]:
    """What each rank gets: (targets, figures), or the rows of its BadLogits."""
    meeting = Meeting(len(bounds) - 1)
    found: list[Any] = [None] * meeting.ranks

    def rank_main(rank: int) -> None:
        own = logits[:, bounds[rank] : bounds[rank + 1]].contiguous()
        columns = DeviceColumns(own, LockedLauncher(launcher, meeting.lock), threads=64)
        split, figures = ThreadSplit(meeting, rank, bounds[rank]), DistributionFigures(600)
        try:
            targets = sample_split(columns, positions_of(len(logits)), FEW, split, figures=figures)
            found[rank] = targets, [figures.entropy, figures.uniform_share, figures.top_share]
        except BadLogits as error:
            found[rank] = error.rows

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(meeting.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


SPLITS = {
    "1": [0, 600],
    "2": [0, 300, 600],
    "4": [0, 150, 300, 450, 600],
    "uneven": [0, 7, 420, 421, 600],
    "empty": [0, 0, 200, 200, 600],
}


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_that_share_the_vocabulary_get_the_bits_and_the_figures_of_numpy(launcher, split):
    logits = hard_rows(20, 600, torch.bfloat16)
    figures = DistributionFigures(600)
    expected = sample_sets(logits.float().numpy(), positions_of(20), FEW, figures=figures)
    for targets, seen in sampled_by_ranks(launcher, logits, SPLITS[split]):
        require_same(targets, expected)
        assert seen[0] == pytest.approx(figures.entropy, rel=1e-12)
        assert seen[1:] == [figures.uniform_share, figures.top_share]


@pytest.mark.parametrize("split", ["1", "4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_softmax_are_those_that_numpy_names(launcher, dtype, split):
    logits = hard_rows(14, 600, dtype)
    logits[1, 599], logits[5, 10], logits[11] = torch.nan, torch.inf, -torch.inf
    logits[12, 3], logits[12, 4:] = torch.nan, -torch.inf
    logits[13, 500], logits[13, 7] = torch.nan, torch.inf
    with pytest.raises(BadLogits) as error:
        sample_sets(logits.float().numpy(), positions_of(14), FEW)
    assert error.value.rows == [1, 5, 11, 12, 13]
    for rows in sampled_by_ranks(launcher, logits, SPLITS[split]):
        assert rows == error.value.rows
