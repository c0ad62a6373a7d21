from __future__ import annotations

import copy
import hashlib
import pickle
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from functools import cache
from heapq import heapify, heappop, heappush
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.cache.codec.hc import native as hc_native
from distill_pretrain.cache.codec.hc import oracle as hc_oracle
from distill_pretrain.cache.codec.hc.build import block_symbols, build_tables, limited_code_lengths
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.hc.model import MAX_CODE_LENGTH, NUM_SYMBOLS, raw_bits
from distill_pretrain.cache.codec.hc.native import NativeCoder
from distill_pretrain.cache.codec.hc.oracle import Oracle
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.errors import CacheCorrupt, CacheError, TeacherError

modest = settings(max_examples=60, deadline=None)
SOURCE = Path(hc_native.__file__).with_name("_hc.c")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeCoder:
    """Built from the source as it is now."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("hc") / "_hc.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return NativeCoder(library)


def make(kind: TargetKind, num_draws: int, rows: list[dict[int, float]]) -> RaggedTargets:
    return RaggedTargets(
        kind=kind,
        num_draws=num_draws,
        entries_per_token=np.array([len(row) for row in rows], np.int32),
        ids=np.array([i for row in rows for i in row], np.int32),
        values=np.array(
            [v for row in rows for v in row.values()],
            np.int32 if kind == "counts" else np.float32,
        ),
    )


def sample(
    kind: TargetKind,
    num_draws: int,
    vocab_size: int,
    num_tokens: int,
    seed: int,
) -> RaggedTargets:
    """Rows drawn from Zipf's law over permuted ids, every seventh empty."""
    rng = np.random.default_rng(seed)
    rows: list[dict[int, float]] = []
    for place in range(num_tokens):
        drawn = (vocab_size ** rng.random(num_draws)).astype(np.int64) * 5 % vocab_size
        ids, counts = np.unique(drawn, return_counts=True)
        if place % 7 == 6:
            rows.append({})
        elif kind == "counts":
            rows.append(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        else:
            rows.append(
                {i: -float(np.log(num_draws / c)) for i, c in zip(ids, counts, strict=True)}
            )
    return make(kind, num_draws, rows)


@cache
def tables_for(kind: TargetKind, num_draws: int, vocab_size: int) -> HcTables:
    pilot = [sample(kind, num_draws, vocab_size, 30, seed) for seed in range(2)]
    return build_tables(pilot, kind=kind, num_draws=num_draws, vocab_size=vocab_size)


def rows_of(targets: RaggedTargets) -> list[dict[int, float]]:
    ends = np.cumsum(targets.entries_per_token)
    starts = ends - targets.entries_per_token
    return [
        dict(zip(targets.ids[a:b].tolist(), targets.values[a:b].tolist(), strict=True))
        for a, b in zip(starts, ends, strict=True)
    ]


@st.composite
def block(draw) -> tuple[HcTables, RaggedTargets]:
    kind = draw(st.sampled_from(["counts", "logprobs"]))
    shapes = [
        (2, 1),
        (2, 1024),
        (3, 2),
        (64, 3),
        (65, 129),
        (2048, 64),
        (128256, 50),
        (1 << 20, 1024),
    ]
    vocab_size, num_draws = draw(st.sampled_from(shapes))
    rows: list[dict[int, float]] = []
    for _ in range(draw(st.integers(0, 5))):
        most = min(num_draws, vocab_size)
        size = draw(st.sampled_from([0, 1, 2, most // 2, most - 1, most]) | st.integers(0, most))
        size = min(size, most)
        rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
        ids = rng.choice(vocab_size, size, replace=False).tolist()
        if kind == "logprobs":
            codes = rng.integers(0, 1 << rng.integers(1, 17, size), size)
            values = -(codes + 2048 * np.log(max(size, 1)).clip(1)).clip(max=65535).round() / 2048
            rows.append(dict(zip(ids, values.tolist(), strict=True)))
        elif size:
            cuts = np.sort(rng.choice(num_draws - 1, size - 1, replace=False)) + 1
            counts = np.diff(np.concatenate([[0], cuts, [num_draws]]))
            rows.append(dict(zip(ids, counts.tolist(), strict=True)))
        else:
            rows.append({})
    return tables_for(kind, num_draws, vocab_size), make(kind, num_draws, rows)


@modest
@given(case=block())
def test_targets_come_back_by_rank_and_both_coders_write_the_same_bytes(native, case):
    tables, targets = case
    slow, fast = HcCodec(tables, Oracle()), HcCodec(tables, native)
    payload = slow.encode(targets)
    assert fast.encode(targets) == payload
    tokens, entries = len(targets.entries_per_token), len(targets.ids)
    smallest, largest = fast.payload_bounds(tokens, entries)
    assert smallest <= len(payload) <= largest
    ranks = tables.ranks_by_id
    wanted = [dict(sorted(row.items(), key=lambda e: ranks[e[0]])) for row in rows_of(targets)]
    for codec in (slow, fast):
        found = codec.decode(memoryview(payload), tokens, entries)
        assert np.array_equal(found.entries_per_token, targets.entries_per_token)
        assert [list(row.items()) for row in rows_of(found)] == [list(r.items()) for r in wanted]
        assert (found.entries_per_token.dtype, found.ids.dtype) == (np.int32, np.int32)
        assert found.values.dtype == targets.values.dtype


def test_the_order_of_ids_is_of_no_consequence(native):
    targets = sample("counts", 50, 2048, 20, 3)
    turned = make("counts", 50, [dict(reversed(row.items())) for row in rows_of(targets)])
    codec = HcCodec(tables_for("counts", 50, 2048), native)
    assert codec.encode(turned) == codec.encode(targets)


@pytest.mark.parametrize("slow", [True, False])
def test_an_id_that_comes_twice_is_our_bug(native, slow):
    targets = make("counts", 7, [{3: 3, 4: 4}])
    twice = RaggedTargets(**{**vars(targets), "ids": np.array([3, 3], np.int32)})
    codec = HcCodec(tables_for("counts", 7, 300), Oracle() if slow else native)
    with pytest.raises(AssertionError, match="twice"):
        codec.encode(twice)


@pytest.mark.parametrize("rows", [[{3: 6}], [{300: 7}], [{3: 0, 4: 7}], [{3: -1, 4: 8}]])
def test_counts_that_break_the_rules_are_our_bug(rows):
    with pytest.raises(AssertionError):
        HcCodec(tables_for("counts", 7, 300), Oracle()).encode(make("counts", 7, rows))


@pytest.mark.parametrize("values", [(np.nan, -1.0), (0.5, -1.0), (-0.1, -0.1)])
def test_logprobs_that_are_no_distribution_are_the_teacher_s_fault(values):
    targets = make("logprobs", 2, [dict(zip((1, 3), values, strict=True))])
    with pytest.raises(TeacherError):
        HcCodec(tables_for("logprobs", 2, 10), Oracle()).encode(targets)


@pytest.mark.parametrize(
    ("kind", "tables_digest", "payload_digest"),
    [
        ("counts", "18307dbbaafbf62f", "b8d1f9cf8cd33c50"),
        ("logprobs", "29396bca79884681", "27f5c3b30c402af3"),
    ],
)
def test_the_bytes_are_those_of_the_specification(native, kind, tables_digest, payload_digest):
    # Written out, so that no library's random numbers move the digests.
    def rows(first: int, number: int) -> list[dict[int, float]]:
        made: list[dict[int, float]] = []
        for place in range(first, first + number):
            size = place * 5 % 12
            ids = [(place * k * k + 13 * k) % 25 + 25 * k for k in range(size)]
            if kind == "counts":
                made.append({i: 1 + (90 - size if k == 1 else 0) for k, i in enumerate(ids)})
            else:
                made.append({i: -(3.0 + k * place / 2048) for k, i in enumerate(ids)})
            if kind == "counts" and made[-1]:
                made[-1][ids[0]] += 91 - sum(made[-1].values())
        return made

    pilot = [make(kind, 91, rows(first, 40)) for first in (0, 40)]
    tables = build_tables(iter(pilot), kind=kind, num_draws=91, vocab_size=300)
    payload = HcCodec(tables, native).encode(make(kind, 91, rows(17, 50)))
    assert hashlib.sha256(tables.to_bytes()).hexdigest()[:16] == tables_digest
    assert hashlib.sha256(payload).hexdigest()[:16] == payload_digest


@pytest.mark.parametrize("kind", ["counts", "logprobs"])
def test_every_flipped_bit_is_refused_or_means_something_valid(native, kind):
    tables = tables_for(kind, 9, 300)
    targets = sample(kind, 9, 300, 7, 5)
    slow, fast = HcCodec(tables, Oracle()), HcCodec(tables, native)
    payload = fast.encode(targets)
    refused = 0
    for bit in range(8 * len(payload)):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        outcomes = []
        for codec in (slow, fast):
            try:
                found = codec.decode(bytes(changed), 7, len(targets.ids))
                assert codec.encode(found) == changed
                outcomes.append("valid")
            except CacheCorrupt:  # of two broken rules each coder may name another
                outcomes.append("refused")
            except TeacherError:
                raise AssertionError("decoded what cannot be encoded") from None
        assert outcomes[0] == outcomes[1]
        refused += outcomes[0] != "valid"
    assert refused > len(payload)


SMALL = [("counts", 7, 300), ("counts", 3, 2), ("logprobs", 7, 300)]


@st.composite
def garbage(draw) -> tuple[HcTables, bytes, int, int]:
    """Bytes of a possible length and with a possible head, so that the streams behind it are decoded."""
    kind, num_draws, vocab_size = draw(st.sampled_from(SMALL))
    tables = tables_for(kind, num_draws, vocab_size)
    if draw(st.booleans()):  # a valid payload, then changed here and there
        tokens = draw(st.integers(1, 12))
        targets = sample(kind, num_draws, vocab_size, tokens, draw(st.integers(0, 99)))
        data = bytearray(HcCodec(tables, Oracle()).encode(targets))
        places = st.integers(8, max(8, len(data) - 1))
        for place, byte in draw(st.dictionaries(places, st.integers(0, 255), max_size=4)).items():
            data[place : place + 1] = bytes([byte])
        return tables, bytes(data), tokens, len(targets.ids)
    tokens = draw(st.integers(0, 12))
    entries = draw(st.integers(0, tokens * min(num_draws, vocab_size)))
    size = draw(st.integers(*tables.payload_bounds(tokens, entries))) - 8
    head = struct.pack("<II", draw(st.integers(0, size)), draw(st.integers(0, entries)))
    return tables, head + draw(st.binary(min_size=size, max_size=size)), tokens, entries


def test_garbage_is_refused_alike_or_means_something_valid(native):
    outcomes: Counter[str] = Counter()

    @settings(modest, max_examples=300, derandomize=True)
    @given(case=garbage())
    def decode_alike(case):
        tables, data, tokens, entries = case
        found = []
        for coder in (Oracle(), native):
            codec = HcCodec(tables, coder)
            try:
                targets = codec.decode(data, tokens, entries)
                assert codec.encode(targets) == data
                found.append("valid")
            except CacheCorrupt as error:  # of two broken rules each coder may name another
                found.append(str(error))
        assert (found[0] == "valid") == (found[1] == "valid")
        assert "wrong length" not in found[0], "refused before the streams"
        outcomes[found[0]] += 1

    decode_alike()
    assert outcomes["valid"] >= 30
    for rule in (hc_oracle.RANK_TOO_LARGE, hc_oracle.PADDING, "probabilities of a position"):
        assert sum(number for found, number in outcomes.items() if rule in found) >= 3, rule


@modest
@given(data=st.binary(max_size=60), tokens=st.integers(0, 40), entries=st.integers(0, 120))
def test_a_wrong_length_or_head_is_refused_alike(native, data, tokens, entries):
    for shape in SMALL:
        outcomes = []
        for coder in (Oracle(), native):
            try:
                HcCodec(tables_for(*shape), coder).decode(data, tokens, entries)
                outcomes.append("valid")
            except CacheCorrupt:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda p: p + b"\0", "longer or shorter"),
        (lambda p: p[:-1], "longer or shorter"),
        (lambda p: p[:-1] + bytes([p[-1] | 0x80]), "padding"),
    ],
)
def test_all_bytes_are_used_and_the_padding_is_zero(native, change, found):
    tables = tables_for("counts", 50, 2048)
    targets = next(
        targets
        for targets in (sample("counts", 50, 2048, 3, seed) for seed in range(50))
        if HcCodec(tables, native).encode(targets)[-1] < 0x10
    )
    payload = change(HcCodec(tables, native).encode(targets))
    for coder in (Oracle(), native):
        with pytest.raises(CacheCorrupt, match=found):
            HcCodec(tables, coder).decode(payload, 3, len(targets.ids))


def test_impossible_sizes_allocate_nothing(native):
    codec = HcCodec(tables_for("counts", 7, 300), native)
    for tokens, entries in ((1 << 40, 0), (1 << 40, 1 << 41), (1, 8), (-1, 0), (1, -1)):
        with pytest.raises(CacheCorrupt, match="wrong length"):
            codec.decode(b"1234", tokens, entries)


@modest
@given(st.lists(st.integers(1, 10**12) | st.just(1), min_size=1, max_size=NUM_SYMBOLS))
def test_codes_are_complete_and_no_worse_for_frequent_symbols(weights):
    lengths = limited_code_lengths(weights)
    if len(weights) == 1:
        assert lengths == [0]
        return
    assert sum(1 << (MAX_CODE_LENGTH - length) for length in lengths) == 1 << MAX_CODE_LENGTH
    assert all(1 <= length <= MAX_CODE_LENGTH for length in lengths)
    ordered = [
        n for _, n in sorted(zip(weights, lengths, strict=True), key=lambda e: (-e[0], e[1]))
    ]
    assert ordered == sorted(ordered)


def test_code_lengths_are_the_best_there_are():
    assert limited_code_lengths([1, 1, 2, 4]) == [3, 3, 2, 1]
    doubling = [1 << k for k in range(12)]  # without a limit: 11 bits for the rarest
    lengths = limited_code_lengths(doubling)
    assert max(lengths) == MAX_CODE_LENGTH

    @cache
    def least_cost(place: int, room: int) -> float:
        """Of the weights from `place` on, with so many of the longest words free."""
        if place == len(doubling):
            return 0.0 if room == 0 else float("inf")
        words = [(n, 1 << (MAX_CODE_LENGTH - n)) for n in range(1, MAX_CODE_LENGTH + 1)]
        costs = [
            doubling[place] * n + least_cost(place + 1, room - size)
            for n, size in words
            if size <= room
        ]
        return min(costs, default=float("inf"))

    cost = sum(w * n for w, n in zip(doubling, lengths, strict=True))
    assert cost == least_cost(0, 1 << MAX_CODE_LENGTH)


def test_tables_come_back(native):
    for shape in (("counts", 50, 2048), ("logprobs", 7, 300), ("counts", 1, 2)):
        tables = tables_for(*shape)
        again = HcTables.from_bytes(memoryview(tables.to_bytes()))
        assert again.to_bytes() == tables.to_bytes()
        assert again.sha256 == hashlib.sha256(tables.to_bytes()).hexdigest()
        assert (again.kind, again.num_draws, again.vocab_size) == shape


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_of_tables_decodes_without_the_original(native, copied):
    tables = copy.deepcopy(tables_for("counts", 7, 300))
    targets = sample("counts", 7, 300, 20, 1)
    codec = HcCodec(tables, native)
    payload = codec.encode(targets)
    expected = rows_of(codec.decode(payload, 20, len(targets.ids)))
    again = copied(tables)
    for array in (
        tables.ids_by_rank,
        tables.lookup,
    ):  # as if its memory were used for something else
        array[:] = 0
    assert rows_of(HcCodec(again, native).decode(payload, 20, len(targets.ids))) == expected


HEADER = 24
LENGTHS = HEADER + 4 * 300


def context(number: int, symbol: int) -> int:
    return LENGTHS + NUM_SYMBOLS * number + symbol


@pytest.mark.parametrize(
    ("offset", "change", "found"),
    [
        (0, 1, "89"),
        (8, 1, "version 0"),
        (10, 2, "kind 3"),
        (12, 1, "expected: 1.* bytes"),
        (14, 255, "V = "),
        (17, 255, "N = "),
        (18, 1, "9 bits"),
        (20, 1, "contexts"),
        (HEADER, 1, "permutation"),
        (HEADER + 3, 0x80, "permutation"),
        (context(0, 0), 9, "out of range|not complete"),
        (context(0, 8), 1, "cannot occur"),
        (context(1, 0), 1, "not complete|out of range"),
        (context(110, 0), 1, "only symbol"),
        (context(120, 0), 1, "cannot occur"),
    ],
)
def test_damaged_tables_are_refused_even_with_a_right_checksum(offset, change, found):
    data = bytearray(tables_for("counts", 7, 300).to_bytes())
    data[offset] ^= change
    data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    with pytest.raises(CacheCorrupt, match=found):
        HcTables.from_bytes(bytes(data))


@pytest.mark.parametrize("change", [-1, 1])
def test_codes_that_are_overfull_or_leave_gaps_are_refused(change):
    data = bytearray(tables_for("counts", 7, 300).to_bytes())
    place = next(place for place in range(context(1, 0), len(data)) if 1 < data[place] < 8)
    data[place] += change
    data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    with pytest.raises(CacheCorrupt, match="not complete"):
        HcTables.from_bytes(bytes(data))


def test_every_flipped_byte_of_tables_and_every_cut_is_refused():
    data = tables_for("counts", 7, 300).to_bytes()
    for offset in range(0, len(data), 7):
        with pytest.raises(CacheCorrupt):
            HcTables.from_bytes(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :])
        with pytest.raises(CacheCorrupt):
            HcTables.from_bytes(data[:offset])
    with pytest.raises(CacheCorrupt):
        HcTables.from_bytes(data + b"\0")


def huffman_bits(seen: list[int]) -> int:
    """Bits of the best prefix code without a limit on its words."""
    heap = [count for count in seen if count]
    heapify(heap)
    bits = 0
    while len(heap) > 1:
        heappush(heap, both := heappop(heap) + heappop(heap))
        bits += both
    return bits


def test_size_is_that_of_the_best_prefix_codes_and_near_the_conditional_entropy(native):
    blocks = [sample("counts", 50, 2048, 400, seed) for seed in range(8)]
    tables = build_tables(blocks, kind="counts", num_draws=50, vocab_size=2048)
    codec = HcCodec(tables, native)
    size = sum(len(codec.encode(targets)) for targets in blocks)
    raw = raw_bits("counts")
    seen = np.zeros(raw.shape, np.int64)
    for targets in blocks:
        for contexts, symbols in block_symbols(targets, tables.ranks_by_id.astype(np.int64)):
            np.add.at(seen, (contexts, symbols), 1)
    raw_bytes = (seen * raw).sum() / 8
    assert size <= 1.003 * (raw_bytes + sum(map(huffman_bits, seen.tolist())) / 8)
    shares = seen / np.maximum(seen.sum(1, keepdims=True), 1)
    bits = -np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    # Words of whole bits cost 3.7 % here, most of it in the counts, which are mostly 1.
    assert 1 <= size / (raw_bytes + (seen * bits).sum() / 8) <= 1.04


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch):
    """An installation without the fast coder."""
    monkeypatch.setattr(hc_native, "find_library", lambda: None)
    monkeypatch.delenv(hc_native.SLOW_VARIABLE, raising=False)
    hc_native.best_coder.cache_clear()
    yield monkeypatch
    hc_native.best_coder.cache_clear()


def test_without_the_library_a_codec_is_refused(no_library):
    tables = tables_for("counts", 7, 300)
    with pytest.raises(CacheError, match=r"not built.*remedy.*C compiler.*DISTILL_PRETRAIN_SLOW"):
        HcCodec(tables)


def test_the_slow_coder_serves_where_it_is_asked_for_after_a_warning(no_library):
    no_library.setenv(hc_native.SLOW_VARIABLE, "1")
    with pytest.warns(UserWarning, match="hundreds of times slower"):
        codec = HcCodec(tables_for("counts", 7, 300))
    assert isinstance(codec.coder, Oracle)


def test_the_library_is_found_by_its_plain_name_first_and_by_python_s(tmp_path, monkeypatch):
    monkeypatch.setattr(hc_native, "__file__", str(tmp_path / "native.py"))
    assert hc_native.find_library() is None
    earlier = tmp_path / f"_hc{EXTENSION_SUFFIXES[0]}"
    earlier.touch()
    assert hc_native.find_library() == earlier
    (tmp_path / "_hc.so").touch()
    assert hc_native.find_library() == tmp_path / "_hc.so"


def test_a_library_of_another_interface_is_refused(native, monkeypatch):
    monkeypatch.setattr(hc_native, "ABI", hc_native.ABI + 1)
    with pytest.raises(OSError, match="interface"):
        NativeCoder(Path(native._library._name))
