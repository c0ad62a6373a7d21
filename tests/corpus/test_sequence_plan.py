from __future__ import annotations

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.corpus.document_order import document_order, mix64
from distill_pretrain.corpus.sequence_plan import (
    SequenceOutOfRange,
    SequencePlan,
    pieces_of,
)
from distill_pretrain.errors import ConfigError, TokenDataError
from distill_pretrain.files.atomic import canonical_json
from tests.support.cache_samples import write_corpus

corpora = st.lists(st.integers(1, 9), min_size=1, max_size=12)
modest = settings(max_examples=40, deadline=None)


def numbered_corpus(folder: str, lengths: list[int]):
    """Documents whose tokens are 1, 2, 3, ... over the whole corpus."""
    total = np.arange(1, sum(lengths) + 1)
    documents = [part.tolist() for part in np.split(total, np.cumsum(lengths)[:-1])]
    return documents, write_corpus(Path(folder) / "c", documents, 1000)


@modest
@given(corpora, st.integers(1, 12), st.integers(0, (1 << 64) - 1))
def test_every_token_is_an_input_once_and_labels_are_the_next(lengths, seq_len, seed):
    with tempfile.TemporaryDirectory() as folder:
        documents, index = numbered_corpus(folder, lengths)
        if index.num_tokens < seq_len + 1:
            with pytest.raises(TokenDataError, match="seq_len is longer than the corpus"):
                SequencePlan(index, seq_len=seq_len, seed=seed)
            return
        plan = SequencePlan(index, seq_len=seq_len, seed=seed)
        numbers = np.arange(plan.num_sequences)
        tokens, labels = plan.read(numbers)
        valid = plan.valid(numbers)
    order = document_order(len(lengths), seed)
    stream = np.concatenate([documents[d] for d in order])
    assert sorted(order) == list(range(len(lengths)))
    assert plan.num_sequences == -(-len(stream) // seq_len)
    assert tokens.reshape(-1)[: len(stream)].tolist() == stream.tolist()
    assert labels.reshape(-1)[: len(stream) - 1].tolist() == stream[1:].tolist()
    assert np.all(tokens.reshape(-1)[len(stream) :] == 0)
    assert np.all(labels.reshape(-1)[len(stream) - 1 :] == IGNORED_LABEL)
    assert valid.sum() == len(stream) and valid.reshape(-1)[: len(stream)].all()


@modest
@given(corpora, st.integers(1, 5), st.data())
def test_reads_do_not_depend_on_how_they_are_batched(lengths, seq_len, data):
    lengths = [*lengths, 6]
    with tempfile.TemporaryDirectory() as folder:
        _, index = numbered_corpus(folder, lengths)
        plan = SequencePlan(index, seq_len=seq_len, seed=3)
        tokens, labels = plan.read(np.arange(plan.num_sequences))
        chosen = data.draw(st.lists(st.integers(0, plan.num_sequences - 1), max_size=6))
        some_tokens, some_labels = plan.read(chosen)
    assert np.array_equal(some_tokens, tokens[chosen])
    assert np.array_equal(some_labels, labels[chosen])


def test_the_id_belongs_to_content_seq_len_and_seed(tmp_path: Path):
    documents = [[1, 2, 3], [4, 5, 6, 7]]
    index = write_corpus(tmp_path / "a", documents)
    same = write_corpus(tmp_path / "elsewhere" / "b", documents)
    other_token = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5, 6, 8]])
    other_bounds = write_corpus(tmp_path / "d", [[1, 2, 3, 4], [5, 6, 7]])
    plans = [
        SequencePlan(index, seq_len=3, seed=1),
        SequencePlan(index, seq_len=2, seed=1),
        SequencePlan(index, seq_len=3, seed=2),
        SequencePlan(other_token, seq_len=3, seed=1),
        SequencePlan(other_bounds, seq_len=3, seed=1),
    ]
    assert SequencePlan(same, seq_len=3, seed=1).plan_id == plans[0].plan_id
    assert len({plan.plan_id for plan in plans}) == len(plans)


def test_order_and_id_of_a_fixed_corpus_never_change(tmp_path: Path):
    index = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10]])
    plan = SequencePlan(index, seq_len=4, seed=1234)
    assert document_order(8, 1234).tolist() == GOLDEN_ORDER
    assert plan.plan_id == GOLDEN_ID


GOLDEN_ORDER = [2, 5, 7, 6, 3, 0, 4, 1]
GOLDEN_ID = "2a692f63ef29d3163fb86fda86a33c8462ab225e4d20f4aac163b3a27ed47c3e"


def test_the_hash_is_splitmix64():
    # First outputs of the published generator with state 0: mix(golden), mix(2 * golden).
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, 2 * golden % (1 << 64)], np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_seeds_shuffle_uniformly():
    first_place = np.bincount([document_order(5, seed)[0] for seed in range(2000)], minlength=5)
    assert np.all(np.abs(first_place - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))


@pytest.mark.parametrize("number", [-1, 3])
def test_a_sequence_beyond_the_plan_is_an_error(tmp_path: Path, number: int):
    index = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(SequenceOutOfRange, match="expected: 0 to 2"):
        SequencePlan(index, seq_len=2, seed=0).read([number])


def test_a_million_documents_need_no_python_loop():
    class Lengths:
        num_documents = 1_000_000
        num_tokens = 10_000_000
        document_lengths = np.full(1_000_000, 10)
        loss = None

        def read(self, document: int, offset: int, length: int) -> np.ndarray:
            return np.full(length, document, np.int32)

    plan = SequencePlan(Lengths(), seq_len=100, seed=1)  # type: ignore[arg-type]
    tokens, _ = plan.read([99_999])
    assert np.array_equal(tokens[0, ::10], document_order(1_000_000, 1)[-10:])


END = 999


@modest
@given(corpora, st.integers(2, 12), st.integers(0, 99))
def test_separate_documents_have_the_tokens_of_joined_ones_and_no_label_at_their_end(
    lengths, seq_len, seed
):
    with tempfile.TemporaryDirectory() as folder:
        lengths = [*lengths, 12]
        documents, _ = numbered_corpus(folder, lengths)
        index = write_corpus(Path(folder) / "e", [[*part, END] for part in documents], 1000)
        joined = SequencePlan(index, seq_len=seq_len, seed=seed)
        separate = SequencePlan(index, seq_len=seq_len, seed=seed, document_end=END)
        numbers = np.arange(joined.num_sequences)
        (tokens, labels), (same, apart) = joined.read(numbers), separate.read(numbers)
        assert joined.plan_id != separate.plan_id
    assert np.array_equal(tokens, same)
    assert np.array_equal(apart, np.where(tokens == END, IGNORED_LABEL, labels))
    # Each piece is a part of one document, and the pieces are all of the stream.
    pieces = pieces_of(tokens, END).tolist()
    rows = [tokens[row, start:stop].tolist() for row, start, stop in pieces]
    assert [token for row in rows for token in row] == tokens.reshape(-1).tolist()
    for row in rows:
        assert END not in row[:-1]
        document = next((d for d in documents if row[0] in d), None)
        if document is not None:
            assert set(row) <= {*document, END, 0}


def test_documents_that_their_end_does_not_tell_apart_are_refused(tmp_path):
    for name, documents in {
        "middle": [[1, END, 2, END], [3, 4, END]],
        "end": [[1, 2, END], [3, 4]],
    }.items():
        index = write_corpus(tmp_path / name, documents, 1000)
        plan = SequencePlan(index, seq_len=4, seed=0, document_end=END)
        message = r"cannot be kept apart.*sequence \d, position \d.*expected: token 999 at the end"
        with pytest.raises(TokenDataError, match=message):
            plan.read(np.arange(plan.num_sequences))
        SequencePlan(index, seq_len=4, seed=0).read([0])


def test_the_plan_of_joined_documents_is_known_by_what_it_was_before_there_were_others(tmp_path):
    index = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5]], 100)
    plan = SequencePlan(index, seq_len=2, seed=5)
    fingerprint = index.fingerprint
    identity = {
        "version": 1,
        "bin_sha256": fingerprint.bin_sha256,
        "idx_sha256": fingerprint.idx_sha256,
        "seq_len": 2,
        "seed": 5,
    }
    assert plan.plan_id == hashlib.sha256(canonical_json(identity)).hexdigest()


def naive_rooms(sizes: list[int], capacity: int) -> list[int]:
    """What best-fit decreasing leaves free, by its definition: part by part, bin by bin."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        best = min(fitting, key=lambda place: rooms[place])
        rooms[best] -= size
    return sorted(rooms)


@modest
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 24), st.integers(0, 9))
def test_best_fit_packing_has_every_token_once_and_cuts_what_it_must(lengths, seq_len, seed):
    with tempfile.TemporaryDirectory() as folder:
        lengths = [*lengths, 25]
        documents, _ = numbered_corpus(folder, lengths)
        index = write_corpus(Path(folder) / "e", [[*part, END] for part in documents], 1000)
        plan = SequencePlan(index, seq_len=seq_len, seed=seed, packing="best_fit")
        separate = SequencePlan(
            index, seq_len=seq_len, seed=seed, packing="best_fit", document_end=END
        )
        numbers = np.arange(plan.num_sequences)
        tokens, labels = plan.read(numbers)
        same, apart = separate.read(numbers)
        valid = plan.valid(numbers)
        shares = plan.shares
        pieces = pieces_of(tokens, END)
    whole = [[*part, END] for part in documents]
    sizes = [len(part) for part in whole]
    parts = [part for size in sizes for part in [seq_len] * (size // seq_len)]
    rests = [size % seq_len for size in sizes if size % seq_len]
    # As few sequences, filled as far, as by the definition.
    assert sorted((~valid).sum(1).tolist()) == naive_rooms(parts + rests, seq_len)
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()
    assert shares.padding == pytest.approx((~valid).mean())
    # Documents as they come out of the rows, put together where they are cut.
    found: dict[int, list[int]] = {}
    expected = np.full(tokens.shape, IGNORED_LABEL)
    after = {token: following for part in whole for token, following in itertools.pairwise(part)}
    for row, start, stop in pieces.tolist():
        part = tokens[row, start:stop].tolist()
        if not valid[row, start]:
            assert set(part) == {0} and stop == seq_len
            continue
        if part != [END]:
            expected[row, start:stop] = [after.get(token, IGNORED_LABEL) for token in part]
        found[min(part)] = part
    assert sorted(token for part in found.values() for token in part if token != END) == sorted(
        token for part in documents for token in part
    )
    assert (tokens == END).sum() == len(whole)
    for part in whole:
        if len(part) <= seq_len:
            assert found[min(part)] == part
    assert np.array_equal(tokens, same) and np.array_equal(apart, expected)
    joined = np.where((tokens[:, :-1] == END) & valid[:, 1:], tokens[:, 1:], expected[:, :-1])
    assert np.array_equal(labels[:, :-1], joined)
    assert np.array_equal(labels[:, -1], expected[:, -1])
    assert shares.cut == shares.longer == np.mean([size > seq_len for size in sizes])


def test_shares_of_a_cut_stream(tmp_path: Path):
    index = write_corpus(tmp_path / "c", [[1] * 3, [2] * 5, [3], [4] * 4])
    plan = SequencePlan(index, seq_len=4, seed=1)
    tokens, _ = plan.read(np.arange(plan.num_sequences))
    rows = [np.flatnonzero((tokens == n).any(axis=1)) for n in range(1, 5)]
    shares = plan.shares
    assert shares.cut == np.mean([len(row) > 1 for row in rows])
    assert shares.longer == 0.25 and shares.padding == pytest.approx(3 / 16)
    assert "18.75% of positions are padding" in str(shares)


def test_packing_is_part_of_the_plan_and_of_its_seed(tmp_path: Path):
    draw = np.random.default_rng(0)
    index = write_corpus(tmp_path / "c", [[3] * n for n in draw.integers(1, 90, 200)])
    plans = [
        SequencePlan(index, seq_len=64, seed=seed, packing=packing)
        for seed in (1, 2)
        for packing in ("cut", "best_fit")
    ]
    assert len({plan.plan_id for plan in plans}) == 4
    again = SequencePlan(index, seq_len=64, seed=1, packing="best_fit")
    assert again.plan_id == plans[1].plan_id
    assert all(map(np.array_equal, again._packed, plans[1]._packed))
    # Any first part of the plan is a sample of the corpus: long documents do not come first.
    fullest = [
        int(np.max(plans[1]._packed.lengths[first:stop]))
        for first, stop in zip(plans[1]._packed.starts, plans[1]._packed.starts[1:], strict=False)
    ]
    half = len(fullest) // 2
    assert abs(np.mean(fullest[:half]) - np.mean(fullest[half:])) < 8
    with pytest.raises(ConfigError, match=r"no such packing; where: packing; found: best"):
        SequencePlan(index, seq_len=64, seed=1, packing="best")  # type: ignore[arg-type]


def test_padding_by_the_token_that_ends_documents_is_one_piece():
    tokens = np.array([[5, 0, 6, 0, 0, 0], [0, 0, 5, 6, 7, 0], [0, 0, 0, 0, 0, 0]])
    assert pieces_of(tokens, 0).tolist() == [
        *([0, 0, 2], [0, 2, 4], [0, 4, 6]),
        *([1, 0, 1], [1, 1, 2], [1, 2, 6]),
        *([2, 0, 1], [2, 1, 6]),
    ]
