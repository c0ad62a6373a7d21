"""From the recipe's `data` section to a sequence plan, a vocabulary and a cache that fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill_pretrain.data.config import DataConfig
from distill_pretrain.dist.process import on_first_rank
from distill_pretrain.errors import ConfigError, TokenDataError, TokenizerMismatch
from distill_pretrain.formats.cache_reader import CacheReader
from distill_pretrain.formats.sequence_plan import SequencePlan
from distill_pretrain.formats.token_index import TokenIndex
from distill_pretrain.formats.tokens_record import TokensRecord


@dataclass(frozen=True, kw_only=True)
class SequenceData:
    """A tokenised corpus cut into sequences.

    Attributes:
        index: the corpus.
        plan: its sequences.
        vocab_size: V, real vocabulary.
        tokenizer_sha256: of the tokenizer that made it; None for a corpus from elsewhere.
        num_sequences: how many of the plan's sequences the recipe uses.
    """

    index: TokenIndex
    plan: SequencePlan
    vocab_size: int
    tokenizer_sha256: str | None
    num_sequences: int


def open_sequences(data: DataConfig, prefix: Path | None = None) -> SequenceData:
    """Open `data.tokens`, or another corpus under the same settings, and check its ids against the vocabulary.

    In a job every rank calls it.

    Args:
        data: recipe section.
        prefix: corpus to open instead of `data.tokens` (whole: `num_sequences` is then not applied).
    """
    tokens = prefix or data.tokens
    record = TokensRecord.beside(tokens)
    vocab_size = data.vocab_size or (record.vocab_size if record else None)
    if vocab_size is None:
        raise ConfigError(
            "the vocabulary size is unknown",
            where="data.vocab_size",
            expected=f"a number, or tokens.json beside {tokens}",
            remedy="set data.vocab_size to the tokenizer's vocabulary size",
        )
    if record and data.vocab_size and data.vocab_size != record.vocab_size:
        raise TokenizerMismatch(
            "data.vocab_size is not the tokenizer's",
            where="data.vocab_size",
            found=data.vocab_size,
            expected=f"{record.vocab_size} (tokens.json beside {tokens})",
            remedy="leave data.vocab_size out",
        )
    # Rank 0 reads a corpus without fingerprint whole and leaves the result beside it for the others.
    on_first_rank(lambda: TokenIndex.open(tokens, vocab_size=vocab_size).fingerprint)
    index = TokenIndex.open(tokens, vocab_size=vocab_size)
    plan = SequencePlan(index, seq_len=data.seq_len, seed=data.seed)
    wanted = data.num_sequences if prefix is None else None
    if wanted is not None and wanted > plan.num_sequences:
        raise TokenDataError(
            "data.num_sequences is more than the corpus has",
            where=tokens,
            found=wanted,
            expected=f"at most {plan.num_sequences} sequences of {data.seq_len} tokens",
        )
    return SequenceData(
        index=index,
        plan=plan,
        vocab_size=vocab_size,
        tokenizer_sha256=record.tokenizer["sha256"] if record else None,
        num_sequences=wanted or plan.num_sequences,
    )


def open_cache(folder: Path, data: SequenceData) -> CacheReader:
    """Open a finished cache and check that it was made from these sequences and covers them."""
    cache = CacheReader.open(folder)
    require_made_from(cache, data, num_sequences=data.num_sequences)
    return cache


def require_made_from(
    cache: CacheReader, data: SequenceData, *, num_sequences: int | None = None
) -> None:
    """Raise CacheMismatch unless a cache was made from these sequences, and covers so many of them."""
    cache.check_matches(
        sequence_plan_id=data.plan.plan_id,
        vocab_size=data.vocab_size,
        seq_len=data.plan.seq_len,
        tokenizer_sha256=data.tokenizer_sha256,
        tokens=data.index.fingerprint.as_dict(),
        num_sequences=num_sequences,
    )
