"""Writing tokenised corpora (.bin/.idx) in Megatron's format, published whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.index_tables import IDX_HEADER, IDX_MAGIC, INTEGER_DTYPES
from distill_pretrain.corpus.loss_marks import MOST_WEIGHT
from distill_pretrain.corpus.loss_weights import SUFFIX as LOSS
from distill_pretrain.corpus.loss_weights import LossWeightsWriter
from distill_pretrain.corpus.token_index import TokenIndex, with_suffix
from distill_pretrain.errors import TokenDataError, TokenizerMismatch
from distill_pretrain.files.atomic import fsync_path, sha256_file


class TokenIndexWriter:
    """Builds PREFIX.bin and PREFIX.idx under temporary names; `finalize` renames them into place.

    PREFIX.loss goes with them where a document is not whole in the loss with weight 1.

    As a context manager it finalises on success and removes its temporary files on an exception.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Start a corpus whose ids lie in [0, vocab_size); the folder is created."""
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.num_documents = 0
        self.num_tokens = 0
        self.num_masked = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        unique = f".{self.prefix.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._temporary = self.prefix.with_name(unique)
        # As megatron-core chooses, so that its readers and ours find the same files.
        self._dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
        self._lengths: list[int] = []
        self._loss: LossWeightsWriter | None = None
        self._file: BinaryIO | None = open(with_suffix(self._temporary, ".bin"), "wb")  # noqa: SIM115

    def add_document(
        self, tokens: npt.ArrayLike, *, masked: npt.ArrayLike | None = None, weight: float = 1.0
    ) -> None:
        """Append one document.

        Args:
            tokens: integer ids [n], n >= 1, in [0, vocab_size).
            masked: bool[n], True for tokens that stay in the context of others and are no labels; None for none.
            weight: of its tokens in the loss, beside those of other documents; 0 masks all of them.

        Raises:
            TokenizerMismatch: an id lies outside the vocabulary.
            TokenDataError: the document is empty, or no row of integers; the mask is not of its length, or the weight
                none.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise TokenDataError(
                "a document is one row of token ids",
                where=f"document {self.num_documents} of {self.prefix}",
                found=f"{ids.dtype} {ids.shape}",
                expected="integers [n], n >= 1",
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise TokenizerMismatch(
                "the tokenizer produced an id outside its vocabulary",
                where=f"document {self.num_documents} of {self.prefix}",
                found=low if low < 0 else high,
                expected=f"ids in [0, {self.vocab_size})",
                remedy="check the vocabulary size of the tokenizer",
            )
        assert self._file is not None, "a finished corpus"
        if masked is not None or weight != 1.0 or self._loss is not None:
            self._add_loss(len(ids), masked, weight)
        self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(len(ids))
        self.num_documents += 1
        self.num_tokens += len(ids)

    def _add_loss(self, length: int, masked: npt.ArrayLike | None, weight: float) -> None:
        flags = np.zeros(length, np.bool_) if masked is None else np.asarray(masked)
        if flags.shape != (length,) or flags.dtype != np.bool_ or not 0 <= weight <= MOST_WEIGHT:
            raise TokenDataError(
                "a document's part in the loss is none",
                where=f"document {self.num_documents} of {self.prefix}",
                found=f"masked {flags.dtype} {flags.shape}, weight {weight}",
                expected=f"masked bool ({length},), one for each token; a weight from 0 to {MOST_WEIGHT:g}",
            )
        if self._loss is None and weight == 1.0 and not flags.any():
            return
        if self._loss is None:
            self._loss = LossWeightsWriter(
                with_suffix(self._temporary, LOSS),
                num_documents=self.num_documents,
                num_tokens=self.num_tokens,
            )
        self._loss.add_document(flags, weight)
        self.num_masked += int(flags.sum()) if weight else length

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
            assert self._file is not None, "a finished corpus"
            self._file.close()
            with_suffix(self._temporary, ".idx").write_bytes(self._index())
            for suffix in (".bin", ".idx"):
                fsync_path(with_suffix(self._temporary, suffix))
            suffixes = [".bin", ".idx"]
            if self._loss is not None:
                self._loss.finish(sha256_file(with_suffix(self._temporary, ".bin")))
                # Before the index: without it the corpus would be whole in the loss.
                suffixes.insert(1, LOSS)
            # An old index must never describe the new .bin, not even after a crash in between.
            with_suffix(self.prefix, ".idx").unlink(missing_ok=True)
            with_suffix(self.prefix, ".fingerprint.json").unlink(missing_ok=True)
            with_suffix(self.prefix, LOSS).unlink(missing_ok=True)
            for suffix in suffixes:
                os.replace(with_suffix(self._temporary, suffix), with_suffix(self.prefix, suffix))
            fsync_path(self.prefix.parent)
        except BaseException:
            self.abort()
            raise
        self._file = None
        return TokenIndex.open(self.prefix)

    def _index(self) -> bytes:
        """The .idx: every document is one stored sequence."""
        lengths = np.array(self._lengths, dtype=np.int64)
        starts = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        bounds = np.arange(len(lengths) + 1, dtype=np.int64)
        code = next(n for n, dtype in INTEGER_DTYPES.items() if self._dtype == dtype)
        header = IDX_HEADER.pack(IDX_MAGIC, 1, code, len(lengths), len(bounds))
        return b"".join(
            (header, lengths.astype(np.int32).tobytes(), starts.tobytes(), bounds.tobytes())
        )

    def abort(self) -> None:
        """Drop everything written so far."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._loss is not None:
            self._loss.abort()
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
        elif self._file is not None:
            self.finalize()
