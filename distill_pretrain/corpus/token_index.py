"""Reading tokenised corpora in Megatron's .bin/.idx format, checked before anything trusts them.

Legend: D documents, S stored sequences (a document is one or more of them, contiguous in the .bin).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.index_tables import IndexTables, damaged
from distill_pretrain.corpus.loss_weights import SUFFIX as LOSS
from distill_pretrain.corpus.loss_weights import LossWeights
from distill_pretrain.errors import TokenDataError, TokenizerMismatch
from distill_pretrain.files.atomic import canonical_json, publish_bytes, sha256_file

_SCAN_BYTES = 1 << 22


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
        loss: what of it the loss counts, PREFIX.loss; None where that is all.
    """

    def __init__(self, prefix: Path, tables: IndexTables) -> None:
        """Use `TokenIndex.open`."""
        self.prefix = prefix
        self.dtype = tables.dtype
        self.num_documents = tables.num_documents
        self.num_tokens = tables.num_tokens
        # Mapped, not read, as the tables are: the ranks of a node share the pages.
        self._tables = tables
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
        """Open a corpus, checking its structure: its tables whole, unless its fingerprint says that they were.

        Args:
            prefix: path without suffix.
            vocab_size: V; when given, every id is checked against it (one pass over the .bin, whose
                result is kept in PREFIX.fingerprint.json).

        Raises:
            TokenDataError: a file is missing, empty, truncated, too long or inconsistent.
            TokenizerMismatch: an id is at or above `vocab_size`.
        """
        prefix = Path(prefix)
        index = cls(prefix, _checked_tables(prefix))
        if vocab_size is not None:
            index.check_vocabulary(vocab_size)
        return index

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every document, int64[D]: memory of this process alone, which `document_length` needs none of."""
        return self._tables.lengths_between(0, self.num_documents)

    def document_length(self, document: int) -> int:
        """Return how many tokens a document has."""
        return self._tables.start_of(document + 1) - self._tables.start_of(document)

    def lengths_between(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens of the documents from `first` up to `stop`, int64[stop - first]."""
        return self._tables.lengths_between(first, stop)

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
        return self.loss.read(document, self._tables.start_of(document) + offset, length)

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
        start, stop = self._tables.start_of(document), self._tables.start_of(document + 1)
        if offset < 0 or length < 0 or start + offset + length > stop:
            raise TokenDataError(
                "no such tokens in the document",
                where=f"{self.prefix}, document {document}",
                found=f"{length} tokens from {offset}",
                expected=f"within its {stop - start} tokens",
            )
        start += offset
        return np.array(self._tokens[start : start + length], dtype=np.int32)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return PREFIX + suffix; unlike Path.with_suffix it keeps dots in the prefix."""
    return prefix.with_name(prefix.name + suffix)


def _checked_tables(prefix: Path) -> IndexTables:
    """The .idx, checked against itself and against the size of the .bin."""
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
    tables = IndexTables(idx_path)
    # Who left a fingerprint had checked the tables: one process does for all.
    known = _load_sidecar(with_suffix(prefix, ".fingerprint.json"), _stamp(prefix))
    counts = (tables.num_documents, tables.num_tokens)
    if known is None or (known.num_documents, known.num_tokens) != counts:
        tables.check()
    found_bytes, implied = bin_path.stat().st_size, tables.num_tokens * tables.dtype.itemsize
    if found_bytes != implied:
        what = "truncated .bin" if found_bytes < implied else "the .bin is longer than its index"
        raise damaged(bin_path, what, f"{found_bytes} bytes", f"{implied} bytes")
    if implied == 0:
        raise damaged(bin_path, "the corpus is empty", "no tokens", "at least one document")
    return tables


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
                raise damaged(path, what, int(ids[bad]), "0 to 2147483647")
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
