"""The packed training sequences: the one unit that teacher, cache and student share.

Legend: D documents, L positions per sequence (seq_len), B sequences read at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.corpus.packing import Packing
from distill_pretrain.corpus.plan_tables import Int64s, plan_tables
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.errors import ConfigError, TokenDataError, require_whole
from distill_pretrain.files.atomic import canonical_json

PLAN_VERSION = 1
PADDING_TOKEN = 0
_CHUNK = 1 << 20


class SequenceOutOfRange(TokenDataError, IndexError):
    """A sequence number beyond the plan."""


Part = tuple[int, int, int]
"""A document, the first of its tokens, and how many."""

PackingMode = Literal["cut", "best_fit"]


class PlanShares(NamedTuple):
    """What a plan costs.

    Attributes:
        padding: share of positions that are padding.
        cut: share of documents that are in more than one sequence.
        longer: share of documents that have to be: they are longer than one.
    """

    padding: float
    cut: float
    longer: float

    def __str__(self) -> str:
        return (
            f"{self.padding:.2%} of positions are padding; {self.cut:.1%} of documents are cut "
            f"({self.longer:.1%} are longer than a sequence)"
        )


class SequencePlan:
    """Documents in a seeded order, joined into one stream, cut into sequences of `seq_len` tokens.

    A pure function of (corpus bytes, seq_len, seed, packing). Every token of the corpus is an input exactly
    once; the label of a position is the next token of the stream. The last sequence is padded with
    token 0; padding and the very last token have no label (-100).

    With best-fit packing documents of up to `seq_len` tokens are never cut, and longer ones only where they fill a
    sequence; any sequence may end with padding, and its last token has a label only where its document goes on.

    Where documents are separate, the token that ends one has no label either: the next token belongs to another. Nor
    has a position whose next token the corpus leaves out of the loss (PREFIX.loss), but in what a teacher is asked for:
    the plan, and so a cache, is the same whatever is left out.

    Attributes:
        index: the corpus.
        seq_len: L.
        seed: seed of the document order, in [0, 2**64).
        num_tokens: length of the stream.
        num_sequences: S; ceil(num_tokens / seq_len) where the stream is cut.
        document_end: where documents are separate the token that ends every one; None where they are joined.
        packing: "cut" or "best_fit".
    """

    def __init__(
        self,
        index: TokenIndex,
        *,
        seq_len: int,
        seed: int,
        document_end: int | None = None,
        packing: PackingMode = "cut",
    ) -> None:
        """Order the documents, or map the order that another process has stored; no token is read.

        That takes O(D log D) time and O(D) memory, which from a million documents on is a file that the processes of a
        node share (corpus/plan_tables.py).

        Raises:
            TokenDataError: the corpus is shorter than one sequence and its last label.
            ConfigError: `seq_len` or `seed` is none, or there is no such packing.
        """
        require_whole("seq_len", seq_len, least=1)
        require_whole("seed", seed, least=0, most=(1 << 64) - 1)
        if packing not in ("cut", "best_fit"):
            raise ConfigError(
                "there is no such packing", where="packing", found=packing, expected="cut, best_fit"
            )
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
        self.packing = packing
        self._leaves_out = True
        self._tables = plan_tables(index, seq_len=seq_len, seed=seed, packing=packing)
        if self._packed is not None:
            self.num_sequences = len(self._packed.starts) - 1

    @property
    def _order(self) -> Int64s:
        return self._tables.order

    @property
    def _ends(self) -> Int64s:
        return self._tables.ends

    @property
    def _packed(self) -> Packing | None:
        return self._tables.packed

    @property
    def plan_id(self) -> str:
        """The hex sha256 over the inputs of the plan (not over paths, times or software)."""
        fingerprint = self.index.fingerprint
        identity: dict[str, Any] = {
            "version": PLAN_VERSION,
            "bin_sha256": fingerprint.bin_sha256,
            "idx_sha256": fingerprint.idx_sha256,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }
        if self.document_end is not None:
            identity |= {"documents": "separate", "document_end": self.document_end}
        if self.packing != "cut":
            identity["packing"] = self.packing
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    @property
    def shares(self) -> PlanShares:
        """How much of the plan is padding, and of the documents cut."""
        num_cut = num_longer = 0
        for first in range(0, len(self._ends), _CHUNK):
            ends = self._ends[first : first + _CHUNK]
            starts = np.concatenate([self._ends[first - 1 : first] if first else [0], ends[:-1]])
            longer = ends - starts > self.seq_len
            cut = longer
            if self._packed is None:
                cut = (ends > starts) & (starts // self.seq_len != (ends - 1) // self.seq_len)
            num_longer += int(longer.sum())
            num_cut += int(cut.sum())
        return PlanShares(
            padding=1 - self.num_tokens / (self.num_sequences * self.seq_len),
            cut=num_cut / len(self._ends),
            longer=num_longer / len(self._ends),
        )

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
        tokens, labels = self._read(sequences)
        if self._leaves_out and self.index.loss is not None:
            labels[self.loss_weights(sequences) == 0] = IGNORED_LABEL
        return tokens, labels

    @property
    def unmasked(self) -> SequencePlan:
        """The same with the labels that the loss leaves out: what a teacher is asked for."""
        plan = copy(self)
        plan._leaves_out = False
        return plan

    @property
    def is_weighted(self) -> bool:
        """Whether labels that are not left out of the loss differ in weight."""
        return self.index.loss is not None and self.index.loss.is_weighted

    def loss_weights(self, sequences: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return float32[B, L]: what the labels of some sequences weigh in the loss; 0 where one is left out.

        Raises:
            SequenceOutOfRange: a number lies outside the plan.
        """
        numbers = _whole_numbers(sequences)
        weights = np.ones((len(numbers), self.seq_len), np.float32)
        if self.index.loss is not None:
            for row, number in enumerate(numbers.tolist()):
                parts = [self.index.loss_weights(*part) for part in self._parts(number)]
                of_labels = np.concatenate(parts)[1:]
                weights[row, : len(of_labels)] = of_labels
        return weights

    def _read(
        self, sequences: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Read tokens and labels of some sequences, whatever the loss leaves out."""
        numbers = _whole_numbers(sequences)
        tokens = np.full((len(numbers), self.seq_len), PADDING_TOKEN, np.int32)
        labels = np.full((len(numbers), self.seq_len), IGNORED_LABEL, np.int32)
        for row, number in enumerate(numbers.tolist()):
            parts = self._parts(number)
            stream = np.concatenate([self.index.read(*part) for part in parts])
            inputs = stream[: self.seq_len]
            tokens[row, : len(inputs)] = inputs
            labels[row, : len(stream) - 1] = stream[1:]
            if self.document_end is not None:
                labels[row, self._last_of_documents(number, parts, inputs)] = IGNORED_LABEL
        return tokens, labels

    def valid(self, sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return bool[B, L]: False where a position is padding."""
        numbers = _whole_numbers(sequences)
        if self._packed is None:
            stops = self.num_tokens - numbers * self.seq_len
        else:
            lengths, starts = self._packed.lengths, self._packed.starts
            of_parts = [lengths[starts[n] : starts[n + 1]] for n in numbers.tolist()]
            stops = np.array([part.sum() for part in of_parts], np.int64)
        result: npt.NDArray[np.bool_] = np.arange(self.seq_len) < stops[:, None]
        return result

    def _last_of_documents(
        self, sequence: int, parts: list[Part], inputs: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """int64[.]: places of a sequence where a document ends; what reads the tokens alone must find the same."""
        lasts, place = [], 0
        for document, offset, length in parts:
            place += length
            if offset + length == self.index.document_length(document) and place <= len(inputs):
                lasts.append(place - 1)
        places = np.array(lasts, np.int64)
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

    def _parts(self, sequence: int) -> list[Part]:
        """Find what makes up the tokens of a sequence and, where its last position has a label, the token behind them.

        Raises:
            SequenceOutOfRange: there is no such sequence.
        """
        if not 0 <= sequence < self.num_sequences:
            raise SequenceOutOfRange(
                "no such sequence in the plan",
                where=self.index.prefix,
                found=sequence,
                expected=f"0 to {self.num_sequences - 1}",
                remedy="check data.num_sequences",
            )
        if self._packed is None:
            return list(self._parts_of_stream(sequence * self.seq_len, self.seq_len + 1))
        packed, (first, stop) = self._packed, self._packed.starts[sequence : sequence + 2]
        columns = (packed.documents, packed.offsets, packed.lengths)
        parts = list(zip(*(column[first:stop].tolist() for column in columns), strict=True))
        document, offset, length = parts[-1]
        if offset + length < self.index.document_length(document):
            parts[-1] = (document, offset, length + 1)
        return parts

    def _parts_of_stream(self, start: int, length: int) -> Iterator[Part]:
        """Yield what makes up the tokens of the stream from `start`, fewer at its end."""
        stop = min(start + length, self.num_tokens)
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = int(self._order[place])
            end = int(self._ends[place])
            offset = start - (int(self._ends[place - 1]) if place else 0)
            take = min(end, stop) - start
            if take > 0:
                yield document, offset, take
            start += take
            place += 1


def pieces_of(tokens: npt.NDArray[np.integer[Any]], document_end: int) -> npt.NDArray[np.int64]:
    """Find the documents, whole or cut at a border, in sequences [B, L].

    They come in order, as int64[N, 3] of (row, start, stop). Behind the last document of a row its padding is one more,
    even where the token that ends documents pads.
    """
    rows, length = tokens.shape
    ends = tokens == document_end
    # Of a run of ends up to the end of a row the first may end a document; the others have no label.
    trailing = np.logical_and.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    ends[:, 1:] &= ~(trailing[:, 1:] & trailing[:, :-1])
    places = np.flatnonzero(ends.reshape(-1)) + 1
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
