"""PREFIX.loss beside PREFIX.bin and PREFIX.idx: which tokens the loss leaves out, and what documents weigh in it.

The format is in README.md. A corpus without the file has every token in the loss, with weight 1.

Legend: D documents, T tokens.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import TokenDataError
from distill_pretrain.files.atomic import fsync_path

SUFFIX = ".loss"
MAGIC, VERSION = b"DPLOSS\0\0", 1
HEADER = struct.Struct("<8sIIQQQ32s32s")
HEADER_BYTES = 128
_FLUSH_TOKENS = 1 << 20
_READ_BYTES = 1 << 22


class _Header(NamedTuple):
    """What a file says of itself; see README.md."""

    magic: bytes
    version: int
    reserved: int
    num_documents: int
    num_tokens: int
    num_weights: int
    bin_sha256: bytes
    sha256: bytes


class LossWeights:
    """What the loss counts of a corpus.

    Attributes:
        path: PREFIX.loss.
        sha256: hex digest of what it says, without the header.
        bin_sha256: hex digest of the PREFIX.bin that it belongs to.
        is_weighted: whether documents differ in weight.
    """

    def __init__(self, path: Path, *, num_documents: int, num_tokens: int) -> None:
        """Map the file of a corpus of D documents and T tokens; only the header is read.

        Raises:
            TokenDataError: it is damaged, or of another corpus or version.
        """
        self.path = path
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise self._damaged("not a file of loss weights", head[:8], MAGIC)
        header = _Header._make(HEADER.unpack_from(head))
        if header.version != VERSION:
            found = f"version {header.version}"
            raise self._damaged("loss weights of another version", found, f"version {VERSION}")
        if (header.num_documents, header.num_tokens) != (num_documents, num_tokens):
            raise self._damaged(
                "the loss weights belong to another corpus",
                f"{header.num_documents} documents, {header.num_tokens} tokens",
                f"{num_documents} documents, {num_tokens} tokens",
            )
        expected = _size(num_tokens, header.num_weights)
        if size != expected or header.num_weights not in (0, num_documents):
            raise self._damaged("the loss weights are cut off", f"{size} bytes", expected)
        self.sha256 = header.sha256.hex()
        self.bin_sha256 = header.bin_sha256.hex()
        self.is_weighted = header.num_weights > 0
        bits = _padded(num_tokens)
        self._bits = np.memmap(path, np.uint8, "r", offset=HEADER_BYTES, shape=(bits,))
        self._weights = None
        if self.is_weighted:
            shape = (num_documents,)
            self._weights = np.memmap(path, "<f4", "r", offset=HEADER_BYTES + bits, shape=shape)

    def read(self, document: int, start: int, length: int) -> npt.NDArray[np.float32]:
        """Read the weights of tokens of a document, float32[length], from number `start` of the .bin; 0 is left out."""
        first = start // 8
        part = self._bits[first : -(-(start + length) // 8)]
        masked = np.unpackbits(part, bitorder="little")[start - 8 * first :][:length]
        weight = np.float32(1) if self._weights is None else self._weights[document]
        result: npt.NDArray[np.float32] = (1 - masked).astype(np.float32) * weight
        return result

    def num_masked(self) -> int:
        """Count the tokens that are left out, of documents of weight 0 too; reads all of the mask."""
        ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)
        # The bits behind the last token are zero.
        return int(np.bincount(self._bits, minlength=256) @ ones)

    @property
    def described(self) -> str:
        """The weights in words."""
        if self._weights is None:
            return "1"
        return f"{self._weights.min():g} to {self._weights.max():g}"

    def check(self, bin_sha256: str) -> None:
        """Read all of it.

        Raises:
            TokenDataError: it is damaged, or belongs to another .bin than that of the digest.
        """
        if self.bin_sha256 != bin_sha256:
            raise self._damaged(
                "the loss weights belong to another corpus",
                f"made for a .bin of sha256 {self.bin_sha256[:12]}",
                bin_sha256[:12],
            )
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != self.sha256:
            what = "the loss weights are damaged"
            raise self._damaged(
                what, f"sha256 {digest.hexdigest()[:12]}", f"{self.sha256[:12]}, of the header"
            )

    def _damaged(self, what: str, found: object, expected: object) -> TokenDataError:
        return TokenDataError(
            what,
            where=self.path,
            found=found,
            expected=expected,
            remedy="tokenise the corpus again, or copy .bin, .idx and .loss again",
        )


class LossWeightsWriter:
    """Builds the file of a corpus under a temporary name, document by document."""

    def __init__(self, path: Path, *, num_documents: int, num_tokens: int) -> None:
        """Begin behind documents that are whole in the loss."""
        self._path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._file.write(bytes(HEADER_BYTES))
        self._digest = hashlib.sha256()
        self._weights = np.ones(num_documents, np.float32).tolist()
        self._num_tokens = self._waiting = 0
        self._parts: list[npt.NDArray[np.bool_]] = []
        for start in range(0, num_tokens, _FLUSH_TOKENS):
            self._add(np.zeros(min(_FLUSH_TOKENS, num_tokens - start), np.bool_))

    def add_document(self, masked: npt.NDArray[np.bool_], weight: float) -> None:
        """Say which tokens of a document, bool[n], are left out, and what it weighs.

        A weight of 0 leaves all of them out.
        """
        self._add(masked if weight else np.ones(len(masked), np.bool_))
        self._weights.append(weight or 1.0)

    def _add(self, masked: npt.NDArray[np.bool_]) -> None:
        self._parts.append(masked)
        self._waiting += len(masked)
        self._num_tokens += len(masked)
        if self._waiting >= _FLUSH_TOKENS:
            self._flush(whole_bytes=True)

    def _flush(self, *, whole_bytes: bool) -> None:
        bits = np.concatenate([np.zeros(0, np.bool_), *self._parts])
        cut = len(bits) // 8 * 8 if whole_bytes else len(bits)
        self._write(np.packbits(bits[:cut], bitorder="little").tobytes())
        self._parts = [bits[cut:]]
        self._waiting = len(bits) - cut

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def finish(self, bin_sha256: str) -> None:
        """Complete the file; it belongs to the .bin of this digest."""
        self._flush(whole_bytes=False)
        self._write(bytes(_padded(self._num_tokens) - -(-self._num_tokens // 8)))
        weights = np.asarray(self._weights, "<f4")
        is_weighted = bool((weights != 1).any())
        if is_weighted:
            self._write(weights.tobytes())
        header = _Header(
            magic=MAGIC,
            version=VERSION,
            reserved=0,
            num_documents=len(weights),
            num_tokens=self._num_tokens,
            num_weights=len(weights) if is_weighted else 0,
            bin_sha256=bytes.fromhex(bin_sha256),
            sha256=self._digest.digest(),
        )
        self._file.seek(0)
        self._file.write(HEADER.pack(*header))
        self._file.close()
        fsync_path(self._path)

    def abort(self) -> None:
        """Drop it."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _padded(num_tokens: int) -> int:
    """Count the bytes of one bit for each token, up to a multiple of 8."""
    return -(-num_tokens // 64) * 8


def _size(num_tokens: int, num_weights: int) -> int:
    return HEADER_BYTES + _padded(num_tokens) + 4 * num_weights
