"""Writing tokenised corpora (.bin/.idx) through megatron-core's builder, published whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import TokenDataError, TokenizerMismatch
from distill_pretrain.formats.atomic import fsync_path
from distill_pretrain.formats.token_index import TokenIndex, import_indexed_dataset, with_suffix


class TokenIndexWriter:
    """Builds PREFIX.bin and PREFIX.idx under temporary names; `finalize` renames them into place.

    As a context manager it finalises on success and removes its temporary files on an exception.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Start a corpus whose ids lie in [0, vocab_size); the folder is created."""
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.num_documents = 0
        self.num_tokens = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        unique = f".{self.prefix.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._temporary = self.prefix.with_name(unique)
        module = import_indexed_dataset()
        self._dtype = module.DType.optimal_dtype(vocab_size)
        self._builder: Any = module.IndexedDatasetBuilder(
            str(with_suffix(self._temporary, ".bin")), dtype=self._dtype
        )

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document: integer ids [n], n >= 1, in [0, vocab_size).

        Raises:
            TokenizerMismatch: an id lies outside the vocabulary.
        """
        ids = np.asarray(tokens)
        assert ids.ndim == 1 and len(ids) > 0 and np.issubdtype(ids.dtype, np.integer), ids.dtype
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise TokenizerMismatch(
                "the tokenizer produced an id outside its vocabulary",
                where=f"document {self.num_documents} of {self.prefix}",
                found=low if low < 0 else high,
                expected=f"ids in [0, {self.vocab_size})",
                remedy="check the vocabulary size of the tokenizer",
            )
        self._builder.add_document(ids, [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)

    def merge(self, other_prefix: Path) -> None:
        """Append every document of another corpus, in order (parts written by worker processes).

        Raises:
            TokenDataError: the part is damaged or stores another integer type.
            TokenizerMismatch: the part holds an id outside the vocabulary.
        """
        part = TokenIndex.open(other_prefix, vocab_size=self.vocab_size)
        if part.dtype != np.dtype(self._dtype):
            raise TokenDataError(
                "a part of the corpus stores another integer type",
                where=other_prefix,
                found=part.dtype,
                expected=np.dtype(self._dtype),
                remedy="write all parts with one vocabulary size",
            )
        self._builder.add_index(str(other_prefix))
        self.num_documents += part.num_documents
        self.num_tokens += part.num_tokens

    def finalize(self) -> TokenIndex:
        """Write the index, make both files durable, rename .bin then .idx, and open the result.

        Raises:
            TokenDataError: no document was added.
        """
        if self.num_tokens == 0:
            self.abort()
            raise TokenDataError(
                "the corpus is empty",
                where=self.prefix,
                found="no documents",
                expected="at least one document",
                remedy="check corpus.paths, corpus.include and corpus.held_out_fraction",
            )
        try:
            self._builder.finalize(str(with_suffix(self._temporary, ".idx")))
            for suffix in (".bin", ".idx"):
                fd = os.open(with_suffix(self._temporary, suffix), os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            # An old index must never describe the new .bin, not even after a crash in between.
            with_suffix(self.prefix, ".idx").unlink(missing_ok=True)
            with_suffix(self.prefix, ".fingerprint.json").unlink(missing_ok=True)
            for suffix in (".bin", ".idx"):
                os.replace(with_suffix(self._temporary, suffix), with_suffix(self.prefix, suffix))
            fsync_path(self.prefix.parent)
        except BaseException:
            self.abort()
            raise
        self._builder = None
        return TokenIndex.open(self.prefix)

    def abort(self) -> None:
        """Drop everything written so far."""
        if self._builder is not None:
            self._builder.data_file.close()
            self._builder = None
        for suffix in (".bin", ".idx"):
            with_suffix(self._temporary, suffix).unlink(missing_ok=True)

    def __enter__(self) -> TokenIndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._builder is not None:
            self.finalize()
