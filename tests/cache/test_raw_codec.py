from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.cache.codec.raw import RawCodec
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, TeacherError

modest = settings(max_examples=80, deadline=None)


def counts(num_draws: int, rows: list[dict[int, int]]) -> RaggedTargets:
    rows = [dict(sorted(row.items())) for row in rows]
    return RaggedTargets(
        kind="counts",
        num_draws=num_draws,
        entries_per_token=np.array([len(row) for row in rows], np.int32),
        ids=np.array([i for row in rows for i in row], np.int32),
        values=np.array([c for row in rows for c in row.values()], np.int32),
    )


@st.composite
def count_targets(draw) -> tuple[RawCodec, RaggedTargets]:
    vocab_size = draw(st.sampled_from([2, 3, 256, 257, 65537, 128256, 1 << 20]))
    num_draws = draw(st.sampled_from([1, 2, 7, 50, 64, 65, 255, 256, 1024]))
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            ids = draw(
                st.lists(st.integers(0, vocab_size - 1), min_size=num_draws, max_size=num_draws)
            )
            rows.append({i: ids.count(i) for i in ids})
        else:
            rows.append(
                {draw(st.sampled_from([0, vocab_size - 1])): num_draws}
                if draw(st.booleans())
                else {}
            )
    codec = RawCodec(kind="counts", num_draws=num_draws, vocab_size=vocab_size)
    return codec, counts(num_draws, rows)


def same(a: RaggedTargets, b: RaggedTargets) -> bool:
    return (
        a.kind == b.kind
        and np.array_equal(a.entries_per_token, b.entries_per_token)
        and np.array_equal(a.ids, b.ids)
        and np.array_equal(a.values, b.values)
        and (a.entries_per_token.dtype, a.ids.dtype, a.values.dtype)
        == (b.entries_per_token.dtype, b.ids.dtype, b.values.dtype)
    )


@modest
@given(count_targets())
def test_counts_come_back_as_stored(case):
    codec, targets = case
    payload = codec.encode(targets)
    tokens, entries = len(targets.entries_per_token), len(targets.ids)
    assert len(payload) == codec.payload_bytes(tokens, entries)
    assert same(codec.decode(payload, tokens, entries), targets)


def test_widths_are_the_paper_s_24_bits_and_the_smallest_that_fit():
    def width(vocab_size: int, num_draws: int) -> int:
        return RawCodec(kind="counts", num_draws=num_draws, vocab_size=vocab_size).entry_bytes

    assert width(128256, 50) == 3  # 17 + 6 bits
    assert width(256, 1) == 1
    assert width(256, 2) == 2
    assert width(1 << 20, 16) == 3
    assert width(1 << 20, 17) == 4


def test_logprobs_come_back_to_half_a_step():
    rng = np.random.default_rng(0)
    codec = RawCodec(kind="logprobs", num_draws=20, vocab_size=70000)
    logits = rng.normal(0, 3, (30, 20))
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    ids = np.sort(np.stack([rng.choice(70000, 20, replace=False) for _ in range(30)]))
    targets = RaggedTargets(
        kind="logprobs",
        num_draws=20,
        entries_per_token=np.full(30, 20, np.int32),
        ids=ids.reshape(-1).astype(np.int32),
        values=logprobs.reshape(-1),
    )
    decoded = codec.decode(codec.encode(targets), 30, 600)
    assert np.array_equal(decoded.ids, targets.ids)
    assert np.abs(decoded.values - targets.values).max() <= 0.5 / 2048 + 1e-6
    assert same(codec.decode(codec.encode(decoded), 30, 600), decoded)


def test_a_tiny_logprob_saturates():
    codec = RawCodec(kind="logprobs", num_draws=2, vocab_size=10)
    targets = RaggedTargets(
        kind="logprobs",
        num_draws=2,
        entries_per_token=np.array([2], np.int32),
        ids=np.array([1, 3], np.int32),
        values=np.array([0.0, -80.0], np.float32),
    )
    assert codec.decode(codec.encode(targets), 1, 2).values.tolist() == [0.0, -65535 / 2048]


@pytest.mark.parametrize("values", [[np.nan, -1.0], [0.5, -1.0], [-0.1, -0.1]])
def test_logprobs_that_are_no_distribution_are_the_teacher_s_fault(values):
    codec = RawCodec(kind="logprobs", num_draws=2, vocab_size=10)
    targets = RaggedTargets(
        kind="logprobs",
        num_draws=2,
        entries_per_token=np.array([2], np.int32),
        ids=np.array([1, 3], np.int32),
        values=np.array(values, np.float32),
    )
    with pytest.raises(TeacherError):
        codec.encode(targets)


@pytest.mark.parametrize("rows", [[{3: 6}], [{3: 8}], [{300: 7}], [{3: 0, 4: 7}], [{3: -1, 4: 8}]])
def test_counts_that_break_the_rules_are_our_bug(rows):
    with pytest.raises(AssertionError):
        RawCodec(kind="counts", num_draws=7, vocab_size=300).encode(counts(7, rows))


@modest
@given(st.data(), st.sampled_from(["counts", "logprobs"]), st.integers(0, 5), st.integers(0, 20))
def test_hostile_payloads_only_raise_cache_corrupt(data, kind, tokens, entries):
    codec = RawCodec(kind=kind, num_draws=7, vocab_size=300)
    size = codec.payload_bytes(tokens, entries)
    payload = data.draw(st.binary(min_size=size, max_size=size) | st.binary(max_size=80))
    try:
        targets = codec.decode(payload, tokens, entries)
    except CacheCorrupt:
        return
    if kind == "counts":
        assert codec.encode(targets) == payload


@modest
@given(count_targets(), st.data())
def test_a_changed_payload_is_refused_or_means_something_valid(case, data):
    codec, targets = case
    payload = bytearray(codec.encode(targets))
    if not payload:
        return
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    try:
        found = codec.decode(bytes(payload), len(targets.entries_per_token), len(targets.ids))
    except CacheCorrupt:
        return
    assert codec.encode(found) == bytes(payload)


def test_a_wrong_length_allocates_nothing():
    codec = RawCodec(kind="counts", num_draws=7, vocab_size=300)
    with pytest.raises(CacheCorrupt, match="wrong length"):
        codec.decode(b"1234", 1 << 40, 1 << 40)
