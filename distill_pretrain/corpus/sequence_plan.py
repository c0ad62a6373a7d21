"""The packed training sequences: the one unit that teacher, cache and student share.

Legend: D documents, L positions per sequence (seq_len), B sequences read at once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.errors import TokenDataError, require_whole
from distill_pretrain.files.atomic import canonical_json

PLAN_VERSION = 1
PADDING_TOKEN = 0


class SequenceOutOfRange(TokenDataError, IndexError):
    """A sequence number beyond the plan."""


class SequencePlan:
    """Documents in a seeded order, joined into one stream, cut into sequences of `seq_len` tokens.

    A pure function of (corpus bytes, seq_len, seed). Every token of the corpus is an input exactly
    once; the label of a position is the next token of the stream. The last sequence is padded with
    token 0; padding and the very last token have no label (-100).

    Where documents are separate, the token that ends one has no label either: the next token belongs to another.

    Attributes:
        index: the corpus.
        seq_len: L.
        seed: seed of the document order, in [0, 2**64).
        num_tokens: length of the stream.
        num_sequences: ceil(num_tokens / seq_len).
        document_end: where documents are separate the token that ends every one; None where they are joined.
    """

    def __init__(
        self, index: TokenIndex, *, seq_len: int, seed: int, document_end: int | None = None
    ) -> None:
        """Order the documents; O(D) memory, no token is read.

        Raises:
            TokenDataError: the corpus is shorter than one sequence and its last label.
            ConfigError: `seq_len` or `seed` is none.
        """
        require_whole("seq_len", seq_len, least=1)
        require_whole("seed", seed, least=0, most=(1 << 64) - 1)
        if index.num_tokens < seq_len + 1:
            raise TokenDataError(
                "seq_len is longer than the corpus",
                where=index.prefix,
                found=f"{index.num_tokens} tokens",
                expected=f"at least seq_len + 1 = {seq_len + 1}",
                remedy="lower data.seq_len or use a larger corpus",
            )
        self.seq_len = seq_len
        self.seed = seed
        self.num_tokens = index.num_tokens
        self.num_sequences = -(-index.num_tokens // seq_len)
        self.index = index
        self.document_end = document_end
        self._order = document_order(index.num_documents, seed)
        self._ends = np.cumsum(index.document_lengths[self._order])

    @property
    def plan_id(self) -> str:
        """Hex sha256 over the inputs of the plan (not over paths, times or software)."""
        fingerprint = self.index.fingerprint
        identity = {
            "version": PLAN_VERSION,
            "bin_sha256": fingerprint.bin_sha256,
            "idx_sha256": fingerprint.idx_sha256,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }
        if self.document_end is not None:
            identity |= {"documents": "separate", "document_end": self.document_end}
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    def read(self, sequences: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Read tokens and labels of some sequences.

        Args:
            sequences: int64[B] numbers in [0, num_sequences), any order, repeats allowed.

        Returns:
            tokens int32[B, L] and labels int32[B, L].

        Raises:
            SequenceOutOfRange: a number lies outside the plan.
            TokenDataError: the numbers are not integers; or documents are separate, and one does not end with
                `document_end` or has it in its middle.
        """
        numbers = _whole_numbers(sequences)
        tokens = np.full((len(numbers), self.seq_len), PADDING_TOKEN, np.int32)
        labels = np.full((len(numbers), self.seq_len), IGNORED_LABEL, np.int32)
        for row, number in enumerate(numbers.tolist()):
            if not 0 <= number < self.num_sequences:
                raise SequenceOutOfRange(
                    "no such sequence in the plan",
                    where=self.index.prefix,
                    found=number,
                    expected=f"0 to {self.num_sequences - 1}",
                    remedy="check data.num_sequences",
                )
            stream = self._stream(number * self.seq_len, self.seq_len + 1)
            inputs = stream[: self.seq_len]
            tokens[row, : len(inputs)] = inputs
            labels[row, : len(stream) - 1] = stream[1:]
            if self.document_end is not None:
                labels[row, self._last_of_documents(number, inputs)] = IGNORED_LABEL
        return tokens, labels

    def valid(self, sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return bool[B, L]: False where a position is padding behind the end of the stream."""
        numbers = _whole_numbers(sequences).reshape(-1, 1)
        result: npt.NDArray[np.bool_] = (
            numbers * self.seq_len + np.arange(self.seq_len) < self.num_tokens
        )
        return result

    def _last_of_documents(
        self, sequence: int, inputs: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """int64[.]: places of a sequence where a document ends; what reads the tokens alone must find the same."""
        start = sequence * self.seq_len
        first, stop = np.searchsorted(self._ends, (start, start + len(inputs)), side="right")
        places: npt.NDArray[np.int64] = self._ends[first:stop] - 1 - start
        found = np.flatnonzero(inputs == self.document_end)
        if not np.array_equal(places, found):
            odd = int(np.setxor1d(places, found)[0])
            raise TokenDataError(
                "documents cannot be kept apart: the token that ends them is not where they end",
                where=f"{self.index.prefix}, sequence {sequence}, position {odd}",
                found=f"token {int(inputs[odd])}",
                expected=f"token {self.document_end} at the end of every document and nowhere else",
                remedy="set data.documents=joined, or tokenize again with tokenizer.end_of_document set to a token "
                "that no text has",
            )
        return places

    def _stream(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """int32[<= length]: tokens of the stream from `start`, fewer at its end."""
        stop = min(start + length, self.num_tokens)
        pieces = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = int(self._order[place])
            end = int(self._ends[place])
            offset = start - (end - int(self.index.document_lengths[document]))
            take = min(end, stop) - start
            if take > 0:
                pieces.append(self.index.read(document, offset, take))
            start += take
            place += 1
        return np.concatenate(pieces)


def pieces_of(tokens: npt.NDArray[np.integer[Any]], document_end: int) -> npt.NDArray[np.int64]:
    """Find the documents, whole or cut at a border, in sequences [B, L].

    They come in order, as int64[N, 3] of (row, start, stop).
    """
    rows, length = tokens.shape
    places = np.flatnonzero(tokens.reshape(-1) == document_end) + 1
    borders = np.union1d(np.arange(rows + 1) * length, places)
    starts = borders[:-1]
    return np.stack((starts // length, starts % length, starts % length + np.diff(borders)), axis=1)


def _whole_numbers(sequences: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """int64[B]: numbers of sequences, which numpy would otherwise cut to integers."""
    numbers = np.asarray(sequences)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise TokenDataError(
            "a sequence is named by a whole number",
            where="sequences",
            found=f"{numbers.dtype} {numbers.tolist()}"[:80],
            expected="integers",
        )
    return numbers.astype(np.int64).reshape(-1)


def document_order(num_documents: int, seed: int) -> npt.NDArray[np.int64]:
    """Order documents by a 64-bit hash of (seed, document number), ties by number; int64[D].

    The hash is splitmix64 (Steele, Lea, Flood 2014) started at mix(seed); it is written out here
    so that the order never depends on a library's generator.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mix64(np.array([seed], np.uint64) + golden)
    steps = np.arange(1, num_documents + 1, dtype=np.uint64)
    return np.argsort(mix64(start + steps * golden), kind="stable")


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Compute the output function of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
