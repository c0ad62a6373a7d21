"""The canary passes targets that fit their text and refuses shifted, frozen and uniform ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets
from distill_pretrain.data.canary import Canary, check_canary, measure_canary, run_canary
from distill_pretrain.errors import CacheMismatch, TeacherError
from distill_pretrain.sampling.samplers import sample_targets
from tests.support.notices import noted

VOCAB = 64
SEQ_LEN = 48


class Text:
    """Sequences whose next token is likely a fixed successor of the current one."""

    seq_len = SEQ_LEN

    @property
    def unmasked(self):
        return self

    def __init__(self, num_sequences=80):
        self.num_sequences = num_sequences
        rng = np.random.default_rng(5)
        self.successor = rng.permutation(VOCAB)
        self.stream = np.zeros((num_sequences, SEQ_LEN + 1), np.int32)
        common = 1 / np.arange(1, VOCAB + 1)
        for i in range(SEQ_LEN):
            random = rng.choice(VOCAB, num_sequences, p=common / common.sum())
            follows = rng.random(num_sequences) < 0.5
            self.stream[:, i + 1] = np.where(follows, self.successor[self.stream[:, i]], random)

    def read(self, sequences):
        labels = self.stream[sequences, 1:].copy()
        labels[np.asarray(sequences) % 7 == 0, -5:] = IGNORED_LABEL
        return self.stream[sequences, :-1].copy(), labels


class Sampled:
    """Targets sampled from a teacher's logits, by default a bigram model of the text."""

    def __init__(self, text, sampler="systematic", num_draws=20, roll=0, logits=None):
        self.text, self.sampler, self.num_draws = text, sampler, num_draws
        self.roll, self.logits = roll, logits

    def read(self, sequence, tokens, start=0, stop=None):
        if self.logits is None:
            logits = np.tile(-np.log(np.arange(1, VOCAB + 1)), (SEQ_LEN, 1)).astype(np.float32)
            logits[np.arange(SEQ_LEN), self.text.successor[tokens]] += 3
        else:
            logits = np.tile(self.logits, (SEQ_LEN, 1)).astype(np.float32)
        _, labels = self.text.read(np.array([sequence]))
        return sample_targets(
            np.roll(logits, self.roll, axis=0),
            np.arange(SEQ_LEN, dtype=np.uint64) + np.uint64(sequence * SEQ_LEN),
            sampler=self.sampler,
            num_draws=self.num_draws,
            seed=1,
            valid=labels[0] != IGNORED_LABEL,
        )


SAMPLERS = [("systematic", 20), ("systematic", 1), ("multinomial", 5), ("topk", 1), ("topk", VOCAB)]
FROZEN = -np.log(np.arange(1, VOCAB + 1))
UNIFORM = np.zeros(VOCAB)


def check(captured_rate=None, num_sequences=80, **settings):
    text = Text(num_sequences)
    canary = measure_canary(text, Sampled(text, **settings), num_sequences=num_sequences)
    return check_canary(canary, where="cache", captured_rate=captured_rate)


@pytest.mark.parametrize(("sampler", "num_draws"), SAMPLERS)
def test_targets_that_fit_pass(sampler, num_draws):
    assert check(sampler=sampler, num_draws=num_draws) is None


@pytest.mark.parametrize(("roll", "place"), [(1, "before"), (-1, "after")])
@pytest.mark.parametrize(("sampler", "num_draws"), SAMPLERS)
def test_targets_one_position_off_are_refused(sampler, num_draws, roll, place):
    with pytest.raises(CacheMismatch, match=f"one position {place} theirs"):
        check(sampler=sampler, num_draws=num_draws, roll=roll)


@pytest.mark.parametrize("logits", [FROZEN, UNIFORM], ids=["frozen", "uniform"])
@pytest.mark.parametrize(("sampler", "num_draws"), SAMPLERS)
def test_a_teacher_that_ignores_the_text_is_refused(sampler, num_draws, logits):
    with pytest.raises(TeacherError, match="do not depend on the text"):
        check(num_sequences=200, sampler=sampler, num_draws=num_draws, logits=logits)


@pytest.mark.parametrize(
    ("sampler", "num_draws", "logits"),
    [("systematic", 20, FROZEN), ("systematic", 20, UNIFORM), ("topk", 1, FROZEN)],
)
def test_less_is_enough_to_tell_that_there_is_no_lead(sampler, num_draws, logits):
    with pytest.raises(TeacherError):
        check(num_sequences=25, sampler=sampler, num_draws=num_draws, logits=logits)
    assert "too few positions" in check(num_sequences=25, num_draws=1, logits=UNIFORM)


def made(columns, num_sequences=1) -> Canary:
    """A sample of which only hits, equal to the mass, are known."""
    hits = np.asarray(columns, float)
    return Canary(
        hits=hits,
        mass=hits,
        positions=np.full(num_sequences, len(hits) // num_sequences),
        entropy=1.0,
        uniform_share=0.0,
        same_top_share=0.1,
    )


@pytest.mark.parametrize("num_positions", [1000, 4000, 7999, 20000])
def test_a_weak_teacher_is_not_refused(num_positions):
    """Right at 6 % of positions, and at 3 % by chance: 3 standard errors at 1,000 positions."""
    rng = np.random.default_rng(num_positions)
    for _ in range(40):
        hits = rng.random((num_positions, 3)) < [0.06, 0.03, 0.03]
        doubt = check_canary(made(hits), where="cache", captured_rate=None)
        assert doubt is None or (num_positions < 8000 and "too few positions" in doubt)


def of_sequences(rates) -> Canary:
    """Sequences of 1,000 positions with these hit rates, a neighbour's token always missing."""
    hits = np.zeros((len(rates), 1000, 3))
    for sequence, rate in zip(hits, rates, strict=True):
        sequence[: round(1000 * rate), 0] = 1
    return made(np.random.default_rng(0).permuted(hits, axis=1).reshape(-1, 3), len(rates))


def test_texts_differ_in_how_often_they_are_hit():
    unlike = np.linspace(0.51, 0.93, 32)
    assert check_canary(of_sequences(unlike), where="cache", captured_rate=0.8) is None
    assert check_canary(of_sequences([0.6] * 31), where="cache", captured_rate=0.8) is None
    with pytest.raises(CacheMismatch, match=r"less often.*data\.canary=warn"):
        check_canary(of_sequences([0.6] * 32), where="cache", captured_rate=0.8)


class Long:
    """Long sequences, and targets that name the next token."""

    seq_len = 1 << 15

    def __init__(self, roll=0):
        self.roll, self.parts = roll, []

    def labels(self, sequence):
        return np.random.default_rng(sequence).integers(0, VOCAB, self.seq_len, np.int32)

    def read(self, sequence, tokens=None, start=0, stop=None):
        if tokens is None:
            return np.zeros((1, self.seq_len), np.int32), self.labels(sequence[0])[None]
        self.parts.append((start, stop))
        return RaggedTargets(
            kind="counts",
            num_draws=1,
            entries_per_token=np.ones(stop - start, np.int32),
            ids=np.roll(self.labels(sequence), self.roll)[start:stop],
            values=np.ones(stop - start, np.int32),
        )


def test_parts_of_many_sequences_are_read_where_they_are_long():
    source = Long()
    canary = measure_canary(source, source, num_sequences=100)
    starts = [start for start, _ in source.parts]
    assert {stop - start for start, stop in source.parts} == {2048}
    assert len(starts) == 64 and sorted(starts) == starts
    assert (starts[0], source.parts[-1][1]) == (0, source.seq_len)
    assert canary.positions.tolist() == [2046] * 64 and canary.hits[:, 0].all()
    shifted = measure_canary(source, Long(roll=1), num_sequences=100)
    with pytest.raises(CacheMismatch, match="one position before"):
        check_canary(shifted, where="cache", captured_rate=None)


def test_a_small_sample_is_refused_only_for_a_clear_shift():
    assert check(num_sequences=8) is None
    assert "too few positions" in check(num_sequences=8, logits=UNIFORM)
    assert "too few positions" in check(num_sequences=1, roll=1)
    with pytest.raises(CacheMismatch):
        check(num_sequences=12, roll=1)


def test_a_hit_rate_far_below_the_captures_is_refused():
    text = Text()
    rate = float(measure_canary(text, Sampled(text), num_sequences=80).hits[:, 0].mean())
    assert check(captured_rate=rate + 0.02) is None
    with pytest.raises(CacheMismatch, match=r"manifest\.json"):
        check(captured_rate=rate + 0.2)


def test_the_figures_are_those_of_a_sum_over_positions():
    text = Text(3)
    cache = Sampled(text)
    canary = measure_canary(text, cache, num_sequences=3)
    hits, mass = [], []
    for sequence in range(3):
        tokens, labels = (rows[0] for rows in text.read(np.array([sequence])))
        targets = cache.read(sequence, tokens)
        ends = np.cumsum(targets.entries_per_token)
        for t in range(1, SEQ_LEN - 1):
            if IGNORED_LABEL in labels[t - 1 : t + 2] or targets.entries_per_token[t] == 0:
                continue
            row = slice(ends[t - 1], ends[t])
            stored = dict(zip(targets.ids[row], targets.probs()[row], strict=True))
            near = [int(labels[t + d]) for d in (0, -1, 1)]
            hits.append([label in stored for label in near])
            mass.append([stored.get(label, 0.0) for label in near])
    assert np.array_equal(canary.hits, np.array(hits, float))
    assert np.allclose(canary.mass, mass)


def test_the_sanity_figures_name_the_fault():
    text = Text()
    sound = measure_canary(text, Sampled(text), num_sequences=80)
    uniform = measure_canary(text, Sampled(text, logits=UNIFORM), num_sequences=80)
    frozen = measure_canary(text, Sampled(text, "topk", 5, logits=FROZEN), num_sequences=80)
    assert sound.uniform_share < 0.05 and uniform.uniform_share > 0.95
    assert sound.same_top_share < 0.8 and frozen.same_top_share == 1.0
    assert uniform.entropy == pytest.approx(np.log(20), abs=0.01)


@pytest.mark.parametrize("refuse", [True, False])
def test_the_recipe_may_turn_a_refusal_into_a_warning(refuse):
    text = Text()
    arguments = {
        "num_sequences": 80,
        "where": "cache",
        "captured_rate": None,
        "captured_sequences": 80,
        "refuse": refuse,
    }
    with noted() as lines:
        run_canary(text, Sampled(text), **arguments)
        assert len(lines) == 1 and "next token among the stored ids at" in lines[0]
        if refuse:
            with pytest.raises(CacheMismatch):
                run_canary(text, Sampled(text, roll=1), **arguments)
        else:
            run_canary(text, Sampled(text, roll=1), **arguments)
            assert len(lines) == 2 and lines[1].startswith("WARNING: ")


@pytest.mark.parametrize(("captured_sequences", "refused"), [(80, True), (160, True), (161, False)])
def test_the_rate_of_a_capture_is_not_asked_of_a_small_part_of_it(captured_sequences, refused):
    text = Text()
    arguments = {
        "num_sequences": 80,
        "where": "cache",
        "captured_rate": 1.0,
        "captured_sequences": captured_sequences,
        "refuse": True,
    }
    if refused:
        with pytest.raises(CacheMismatch, match="less often than when they were captured"):
            run_canary(text, Sampled(text), **arguments)
    else:
        with noted() as lines:
            run_canary(text, Sampled(text), **arguments)
        assert len(lines) == 1


def test_positions_without_targets_do_not_count():
    class Empty:
        def read(self, sequence, tokens, start=0, stop=None):
            return RaggedTargets(
                kind="counts",
                num_draws=1,
                entries_per_token=np.zeros(SEQ_LEN, np.int32),
                ids=np.zeros(0, np.int32),
                values=np.zeros(0, np.int32),
            )

    with warnings.catch_warnings(), noted() as lines:
        warnings.simplefilter("error")
        run_canary(
            Text(),
            Empty(),
            num_sequences=80,
            where="cache",
            captured_rate=0.5,
            captured_sequences=80,
            refuse=True,
        )
    assert "too few positions" in lines[0] and "nan" not in lines[0]


def test_a_position_without_neighbours_does_not_count():
    class Two(Long):
        seq_len = 2

    canary = measure_canary(Two(), Two(), num_sequences=5)
    assert canary.num_positions == 0 and canary.positions.tolist() == [0] * 5
    assert str(canary).startswith("no position")
    assert "too few positions" in check_canary(canary, where="cache", captured_rate=0.5)
