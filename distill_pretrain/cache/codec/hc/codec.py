"""The entropy codec: one block of targets as bytes. FORMAT.md is the specification.

Ids become frequency ranks; within a position ranks ascend, and gaps, row lengths and values get prefix codes that
depend on what came before. Legend: T positions of the block, E entries in all, V vocabulary, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distill_pretrain.cache.codec.hc.native import NativeCoder, best_coder
from distill_pretrain.cache.codec.hc.oracle import Oracle, broken
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.target_checks import (
    counts_problem,
    logprob_codes,
    logprobs_of_codes,
    logprobs_problem,
    structure_problem,
)
from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.errors import CacheCorrupt


@dataclass(frozen=True)
class HcCodec:
    """Encoder and decoder of blocks; safe to use from several threads.

    Attributes:
        tables: codes and ranks; they fix kind, N and V.
        coder: what does the work; by default the fast one, or the slow one with a warning.
    """

    tables: HcTables
    coder: NativeCoder | Oracle = field(default_factory=best_coder)

    @property
    def tables_sha256(self) -> str | None:
        """The hex digest of the tables."""
        return self.tables.sha256

    @property
    def kind(self) -> TargetKind:
        """The kind of the targets: "counts" or "logprobs"."""
        return self.tables.kind

    @property
    def num_draws(self) -> int:
        """N, the draws of a position."""
        return self.tables.num_draws

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary."""
        return self.tables.vocab_size

    @cached_property
    def max_entries_per_token(self) -> int:
        """The most entries of a position: min(N, V)."""
        return min(self.num_draws, self.vocab_size)

    def payload_bounds(self, num_tokens: int, num_entries: int) -> tuple[int, int]:
        """Return the least and the most bytes that the payload of a block has."""
        return self.tables.payload_bounds(num_tokens, num_entries)

    def encode(self, targets: RaggedTargets) -> bytes:
        """Encode one block; the distinct ids of a position may come in any order.

        Raises:
            TeacherError: log-probabilities are positive, NaN, or add up to more than 1.
        """
        assert targets.kind == self.kind and targets.num_draws == self.num_draws, targets.kind
        problem = structure_problem(
            targets.entries_per_token,
            targets.ids,
            max_entries_per_token=self.max_entries_per_token,
            vocab_size=self.vocab_size,
        )
        assert problem is None and len(targets.values) == len(targets.ids), problem
        if self.kind == "counts":
            problem = counts_problem(targets)
            assert problem is None, problem
            codes = targets.values
        else:
            codes = logprob_codes(targets)
        return self.coder.encode(
            self.tables,
            np.ascontiguousarray(targets.entries_per_token, np.int32),
            np.ascontiguousarray(targets.ids, np.int32),
            np.ascontiguousarray(codes, np.int32),
        )

    def decode(
        self, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> RaggedTargets:
        """Decode one block; within a position ids ascend by their frequency rank, not by themselves.

        Nothing is allocated before T and E are possible for a payload of this length.

        Args:
            payload: bytes of the block.
            num_tokens: T.
            num_entries: E.

        Raises:
            CacheCorrupt: any rule of FORMAT.md is broken.
        """
        possible = num_tokens >= 0 and 0 <= num_entries <= num_tokens * self.max_entries_per_token
        smallest, largest = self.payload_bounds(num_tokens, num_entries) if possible else (0, 0)
        if not (possible and smallest <= len(payload) <= largest):
            raise CacheCorrupt(
                "a block's payload has the wrong length",
                found=f"{len(payload)} bytes",
                expected=f"{smallest} to {largest} bytes for {num_tokens} positions, {num_entries} entries"
                if possible
                else f"at most {self.max_entries_per_token} entries at each of {num_tokens} positions",
            )
        lengths, ids, codes = self.coder.decode(self.tables, payload, num_tokens, num_entries)
        targets = RaggedTargets(
            kind=self.kind,
            num_draws=self.num_draws,
            entries_per_token=lengths,
            ids=ids,
            values=codes if self.kind == "counts" else logprobs_of_codes(codes),
        )
        if self.kind == "logprobs":
            problem = logprobs_problem(targets)
            if problem is not None:
                raise broken(problem)
        return targets
