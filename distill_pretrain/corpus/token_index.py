"""Reading tokenised corpora in Megatron's .bin/.idx format, checked before anything trusts them.

Legend: D documents, S stored sequences (a document is one or more of them, contiguous in the .bin).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.loss_weights import SUFFIX as LOSS
from distill_pretrain.corpus.loss_weights import LossWeights
from distill_pretrain.errors import TokenDataError, TokenizerMismatch
from distill_pretrain.files.atomic import canonical_json, publish_bytes, sha256_file

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
INTEGER_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_SCAN_BYTES = 1 << 22
_REBUILD = "tokenise the corpus again, or copy both files again"


@dataclass(frozen=True, kw_only=True)
class TokenFingerprint:
    """What tells one tokenised corpus from another.

    Attributes:
        bin_sha256: hex digest of the .bin.
        idx_sha256: hex digest of the .idx.
        num_documents: D.
        num_tokens: tokens in all documents, end-of-document tokens included.
        max_token_id: the largest id in the .bin.
    """

    bin_sha256: str
    idx_sha256: str
    num_documents: int
    num_tokens: int
    max_token_id: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class TokenIndex:
    """A tokenised corpus: PREFIX.bin and PREFIX.idx.

    Attributes:
        prefix: path without the .bin / .idx suffix.
        dtype: stored integer type of a token.
        num_documents: D.
        num_tokens: tokens in all documents.
        document_lengths: int64[D], tokens per document.
        loss: what of it the loss counts, PREFIX.loss; None where that is all.
    """

    def __init__(self, prefix: Path, layout: _Layout) -> None:
        """Use `TokenIndex.open`."""
        self.prefix = prefix
        self.dtype = layout.dtype
        self.document_lengths = layout.document_lengths
        self.num_documents = len(layout.document_lengths)
        self.num_tokens = int(layout.document_lengths.sum())
        self._document_starts = np.cumsum(layout.document_lengths) - layout.document_lengths
        # Mapped, not read: the ranks of a node share its pages.
        self._tokens = np.memmap(with_suffix(prefix, ".bin"), dtype=self.dtype, mode="r")
        self.loss: LossWeights | None = None
        if with_suffix(prefix, LOSS).exists():
            self.loss = LossWeights(
                with_suffix(prefix, LOSS),
                num_documents=self.num_documents,
                num_tokens=self.num_tokens,
            )

    def __reduce__(self) -> tuple[Callable[[Path], TokenIndex], tuple[Path]]:
        """Pickle the path: another process, such as a worker of a DataLoader, maps the files itself."""
        return TokenIndex.open, (self.prefix,)

    @classmethod
    def open(cls, prefix: Path, *, vocab_size: int | None = None) -> TokenIndex:
        """Open a corpus, checking its structure before it is mapped into memory.

        Args:
            prefix: path without suffix.
            vocab_size: V; when given, every id is checked against it (one pass over the .bin, whose
                result is kept in PREFIX.fingerprint.json).

        Raises:
            TokenDataError: a file is missing, empty, truncated, too long or inconsistent.
            TokenizerMismatch: an id is at or above `vocab_size`.
        """
        prefix = Path(prefix)
        index = cls(prefix, _read_layout(prefix))
        if vocab_size is not None:
            index.check_vocabulary(vocab_size)
        return index

    @cached_property
    def fingerprint(self) -> TokenFingerprint:
        """The digests and the largest id; found in one pass over the .bin unless the sidecar file is current.

        Raises:
            TokenDataError: an id is negative or does not fit int32.
        """
        stamp = _stamp(self.prefix)
        sidecar = with_suffix(self.prefix, ".fingerprint.json")
        known = _load_sidecar(sidecar, stamp)
        if known is not None:
            return known
        bin_sha256, max_token_id = _scan_bin(with_suffix(self.prefix, ".bin"), self.dtype)
        found = TokenFingerprint(
            bin_sha256=bin_sha256,
            idx_sha256=sha256_file(with_suffix(self.prefix, ".idx")),
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            max_token_id=max_token_id,
        )
        # A read-only corpus folder costs a pass per start, nothing else.
        with contextlib.suppress(OSError):
            publish_bytes(sidecar, canonical_json({"stamp": stamp, "fingerprint": found.as_dict()}))
        return found

    @property
    def record(self) -> dict[str, Any]:
        """What tokens.json says of the corpus; of one without PREFIX.loss, what it said before these were."""
        loss = {} if self.loss is None else {"loss_sha256": self.loss.sha256}
        return {**self.fingerprint.as_dict(), **loss}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise TokenizerMismatch when the corpus holds an id at or above `vocab_size`."""
        largest = self.fingerprint.max_token_id
        if largest >= vocab_size:
            raise TokenizerMismatch(
                "the corpus holds token ids outside the vocabulary",
                where=f"{self.prefix}.bin",
                found=f"token id {largest}",
                expected=f"ids below the vocabulary size {vocab_size}",
                remedy=f"leave data.vocab_size out, or set it to {largest + 1} or more; where it is not set, use the "
                "tokenizer the corpus was made with, or tokenise it again",
            )

    def check_loss(self) -> None:
        """Read PREFIX.loss, where there is one, and raise TokenDataError unless it is sound and of this corpus."""
        bin_sha256 = self.fingerprint.bin_sha256
        if self.loss is not None:
            self.loss.check(bin_sha256)

    def loss_weights(self, document: int, offset: int, length: int) -> npt.NDArray[np.float32]:
        """Read float32[length]: what the tokens that `read` gives weigh as labels; 0 is left out of the loss."""
        if self.loss is None:
            return np.ones(length, np.float32)
        return self.loss.read(document, int(self._document_starts[document]) + offset, length)

    def read(self, document: int, offset: int, length: int) -> npt.NDArray[np.int32]:
        """Read tokens `offset` to `offset + length` of one document, int32[length].

        Raises:
            TokenDataError: the corpus has no such document, or the document no such tokens.
        """
        if not 0 <= document < self.num_documents:
            raise TokenDataError(
                "no such document in the corpus",
                where=self.prefix,
                found=document,
                expected=f"0 to {self.num_documents - 1}",
            )
        if offset < 0 or length < 0 or offset + length > self.document_lengths[document]:
            raise TokenDataError(
                "no such tokens in the document",
                where=f"{self.prefix}, document {document}",
                found=f"{length} tokens from {offset}",
                expected=f"within its {self.document_lengths[document]} tokens",
            )
        start = int(self._document_starts[document]) + offset
        return np.array(self._tokens[start : start + length], dtype=np.int32)


@dataclass(frozen=True)
class _Layout:
    dtype: np.dtype[Any]
    document_lengths: npt.NDArray[np.int64]


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return PREFIX + suffix; unlike Path.with_suffix it keeps dots in the prefix."""
    return prefix.with_name(prefix.name + suffix)


def _damaged(path: Path, what: str, found: object, expected: object) -> TokenDataError:
    return TokenDataError(what, where=path, found=found, expected=expected, remedy=_REBUILD)


def _read_layout(prefix: Path) -> _Layout:
    """Everything the .idx implies, checked against itself and against the size of the .bin."""
    bin_path, idx_path = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise TokenDataError(
                "the tokenised corpus is incomplete",
                where=path,
                found="no such file",
                expected=f"{bin_path.name} and {idx_path.name} in one folder",
                remedy="run `distill-pretrain tokenize`, or correct the prefix (without .bin/.idx)",
            )
    idx_bytes = idx_path.stat().st_size
    with open(idx_path, "rb") as file:
        head = file.read(IDX_HEADER.size)
        if len(head) < IDX_HEADER.size:
            expected = f"at least {IDX_HEADER.size} bytes"
            raise _damaged(idx_path, "the index is truncated", f"{len(head)} bytes", expected)
        magic, version, code, num_sequences, num_bounds = IDX_HEADER.unpack(head)
        if magic != IDX_MAGIC or version != 1:
            found = f"{magic!r} version {version}"
            raise _damaged(idx_path, "not a Megatron index", found, f"{IDX_MAGIC!r} version 1")
        if code not in INTEGER_DTYPES:
            what = "the index names no integer token type"
            raise _damaged(idx_path, what, f"code {code}", f"one of {sorted(INTEGER_DTYPES)}")
        table_bytes = num_sequences * (4 + 8) + num_bounds * 8
        expected_bytes = IDX_HEADER.size + table_bytes
        # A multimodal index adds one mode byte per sequence; the tokens are laid out the same.
        if idx_bytes not in (expected_bytes, expected_bytes + num_sequences):
            what = "the index has the wrong length"
            raise _damaged(idx_path, what, f"{idx_bytes} bytes", f"{expected_bytes} bytes")
        table = file.read(table_bytes)
    lengths = np.frombuffer(table, "<i4", num_sequences).astype(np.int64)
    pointers = np.frombuffer(table, "<i8", num_sequences, 4 * num_sequences)
    bounds = np.frombuffer(table, "<i8", num_bounds, 12 * num_sequences)
    dtype = np.dtype(INTEGER_DTYPES[code])
    _check_tables(idx_path, lengths, pointers, bounds, dtype.itemsize)
    found_bytes, implied = bin_path.stat().st_size, int(lengths.sum()) * dtype.itemsize
    if found_bytes != implied:
        what = "truncated .bin" if found_bytes < implied else "the .bin is longer than its index"
        raise _damaged(bin_path, what, f"{found_bytes} bytes", f"{implied} bytes")
    if implied == 0:
        raise _damaged(bin_path, "the corpus is empty", "no tokens", "at least one document")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return _Layout(dtype=dtype, document_lengths=np.diff(ends[bounds]))


def _check_tables(
    path: Path,
    lengths: npt.NDArray[np.int64],
    pointers: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    itemsize: int,
) -> None:
    if len(lengths) and int(lengths.min()) < 0:
        what = "the index holds a negative sequence length"
        raise _damaged(path, what, int(lengths.min()), "lengths >= 0")
    expected = (np.cumsum(lengths) - lengths) * itemsize
    if not np.array_equal(pointers, expected):
        at = int(np.flatnonzero(pointers != expected)[0])
        what = f"the byte offset of sequence {at} contradicts the lengths before it"
        raise _damaged(path, what, int(pointers[at]), int(expected[at]))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(lengths):
        found = "none" if len(bounds) == 0 else f"{int(bounds[0])} to {int(bounds[-1])}"
        raise _damaged(path, "document boundaries are wrong", found, f"0 to {len(lengths)}")
    if np.any(np.diff(bounds) < 0):
        raise _damaged(path, "document boundaries are wrong", "a decreasing pair", "ascending")


def _scan_bin(path: Path, dtype: np.dtype[Any]) -> tuple[str, int]:
    """(hex sha256, largest id) in one pass."""
    digest, largest, position = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_SCAN_BYTES):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= 1 << 31:
                bad = int(np.flatnonzero((ids < 0) | (ids >= 1 << 31))[0])
                what = f"token {position + bad} of the corpus is no token id"
                raise _damaged(path, what, int(ids[bad]), "0 to 2147483647")
            largest = max(largest, high)
            position += len(ids)
    return digest.hexdigest(), largest


def _stamp(prefix: Path) -> dict[str, int]:
    """What must be unchanged for a stored fingerprint to be believed."""
    stamp = {}
    for suffix in ("bin", "idx"):
        status = os.stat(with_suffix(prefix, f".{suffix}"))
        stamp[f"{suffix}_bytes"] = status.st_size
        stamp[f"{suffix}_mtime_ns"] = status.st_mtime_ns
    return stamp


def _load_sidecar(path: Path, stamp: dict[str, int]) -> TokenFingerprint | None:
    """The stored fingerprint, or None when it is absent, damaged or of other files."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["stamp"] != stamp:
            return None
        fields = stored["fingerprint"]
        found = TokenFingerprint(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = all(isinstance(v, str if k.endswith("sha256") else int) for k, v in fields.items())
    return found if whole else None
