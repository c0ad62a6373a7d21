from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import TokenDataError, TokenizerMismatch
from tests.support.cache_samples import write_corpus

DOCUMENTS = [[5, 6, 7, 1], [1], [9, 99, 1], [4, 1]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "train.v1", DOCUMENTS)
    return tmp_path / "train.v1"


def test_documents_come_back_as_written(prefix: Path):
    index = TokenIndex.open(prefix, vocab_size=100)
    assert index.num_documents == 4
    assert index.num_tokens == 10
    assert index.document_lengths.tolist() == [4, 1, 3, 2]
    assert [index.read(d, 0, len(doc)).tolist() for d, doc in enumerate(DOCUMENTS)] == DOCUMENTS
    assert index.read(2, 1, 2).tolist() == [99, 1]
    assert index.read(2, 1, 2).dtype == np.int32
    assert index.fingerprint.max_token_id == 99


def test_a_document_of_several_stored_sequences_is_one_document(tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(np.arange(7), [3, 4])
    builder.add_document(np.arange(2), [2])
    builder.finalize(str(tmp_path / "c.idx"))
    index = TokenIndex.open(tmp_path / "c")
    assert index.document_lengths.tolist() == [7, 2]
    assert index.read(0, 2, 4).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 200_000])
def test_the_files_are_those_of_megatron_cores_builder(tmp_path: Path, vocab_size: int):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_corpus(tmp_path / "ours", DOCUMENTS, vocab_size)
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_an_aborted_writer_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with TokenIndexWriter(tmp_path / "c", 100) as writer:
            writer.add_document([1, 2])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_without_documents_is_an_error(tmp_path: Path):
    with pytest.raises(TokenDataError, match="empty"), TokenIndexWriter(tmp_path / "c", 100):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [100, -1])
def test_a_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, token: int):
    with pytest.raises(TokenizerMismatch, match=str(token)):
        TokenIndexWriter(tmp_path / "c", 100).add_document([3, token])


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str):
    os.remove(f"{prefix}.{suffix}")
    with pytest.raises(TokenDataError, match=rf"train\.v1\.{suffix}; found: no such file"):
        TokenIndex.open(prefix)


def test_a_truncated_bin_states_both_sizes(prefix: Path):
    os.truncate(f"{prefix}.bin", 13)
    with pytest.raises(TokenDataError, match=r"truncated \.bin.*13 bytes.*20 bytes"):
        TokenIndex.open(prefix)


def test_a_bin_longer_than_its_index_is_an_error(prefix: Path):
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(TokenDataError, match="longer"):
        TokenIndex.open(prefix)


def test_every_truncation_of_the_index_is_an_error(prefix: Path):
    whole = Path(f"{prefix}.idx").read_bytes()
    for length in range(len(whole)):
        Path(f"{prefix}.idx").write_bytes(whole[:length])
        with pytest.raises(TokenDataError):
            TokenIndex.open(prefix)


def test_every_changed_byte_of_the_index_is_an_error_or_harmless(prefix: Path):
    whole = Path(f"{prefix}.idx").read_bytes()
    expected = TokenIndex.open(prefix).document_lengths.tolist()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        Path(f"{prefix}.idx").write_bytes(damaged)
        try:
            found = TokenIndex.open(prefix).document_lengths
        except TokenDataError:
            continue
        # Only an inner document boundary can move and still describe the same tokens.
        assert len(found) == len(expected) and found.sum() == sum(expected)


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "c.bin").write_bytes(b"")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 0, 1)
    (tmp_path / "c.idx").write_bytes(header + struct.pack("<q", 0))
    with pytest.raises(TokenDataError):
        TokenIndex.open(tmp_path / "c")


def test_ids_outside_the_vocabulary_name_both_numbers(prefix: Path):
    TokenIndex.open(prefix, vocab_size=100)
    for _ in range(2):  # the second time from the sidecar
        with pytest.raises(TokenizerMismatch, match=r"token id 99.*size 99"):
            TokenIndex.open(prefix, vocab_size=99)


def test_negative_ids_are_an_error(tmp_path: Path):
    write_corpus(tmp_path / "c", [[1, 2, 3]], vocab_size=1 << 17)
    np.array([1, -2, 3], np.int32).tofile(tmp_path / "c.bin")
    with pytest.raises(TokenDataError, match=r"token 1 .*found: -2"):
        TokenIndex.open(tmp_path / "c", vocab_size=1 << 17)


def test_the_stored_fingerprint_is_used_only_for_the_same_files(prefix: Path):
    first = TokenIndex.open(prefix).fingerprint
    sidecar = Path(f"{prefix}.fingerprint.json")
    stored = json.loads(sidecar.read_bytes())
    stored["fingerprint"]["max_token_id"] = 42
    sidecar.write_text(json.dumps(stored))
    assert TokenIndex.open(prefix).fingerprint.max_token_id == 42
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert TokenIndex.open(prefix).fingerprint == first
    sidecar.write_text("{")
    assert TokenIndex.open(prefix).fingerprint == first


def make_record() -> TokensRecord:
    return TokensRecord(
        tokenizer={"kind": "hf", "sha256": "a", "vocab_size": 100, "file": "tokenizer"},
        vocab_size=100,
        eod_id=1,
        corpora={"train": {"num_tokens": 3}},
        software={"numpy": "2"},
    )


def test_the_tokens_record_comes_back_as_saved(tmp_path: Path):
    assert TokensRecord.beside(tmp_path / "train") is None
    make_record().save(tmp_path)
    assert TokensRecord.beside(tmp_path / "train") == make_record()


@pytest.mark.parametrize(
    "damage", ["{", "[]", "{}", '{"version":1}', '"vocab_size":', '"kind":"hf",', '"eod_id":1,']
)
def test_a_damaged_tokens_record_is_an_error(tmp_path: Path, damage: str):
    make_record().save(tmp_path)
    path = tmp_path / "tokens.json"
    text = path.read_text()
    path.write_text(text.replace(damage, "") if damage in text and len(damage) > 2 else damage)
    with pytest.raises(TokenDataError, match=r"tokens\.json"):
        TokensRecord.load(tmp_path)
