"""From the recipe's `data` section to sequence plans, a vocabulary and caches that fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill_pretrain.cache.reader import CacheHead, CacheReader
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.tokens_record import TokensRecord, document_end_of
from distill_pretrain.data.batches import BatchSource
from distill_pretrain.data.config import DataConfig
from distill_pretrain.errors import CacheMismatch, ConfigError, TokenDataError, TokenizerMismatch
from distill_pretrain.processes.process import on_first_rank


@dataclass(frozen=True, kw_only=True)
class SequenceData:
    """A tokenised corpus cut into sequences.

    Attributes:
        index: the corpus.
        plan: its sequences.
        vocab_size: V, real vocabulary.
        tokenizer_digests: what the tokenizer that made it is known by, see `TokensRecord`; empty for a corpus
            from elsewhere.
        num_sequences: how many of the plan's sequences the recipe uses.
    """

    index: TokenIndex
    plan: SequencePlan
    vocab_size: int
    tokenizer_digests: tuple[str, ...]
    num_sequences: int

    @property
    def tokenizer_sha256(self) -> str | None:
        """What caches and checkpoints write down of the tokenizer."""
        return self.tokenizer_digests[0] if self.tokenizer_digests else None


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """One corpus of the run.

    Attributes:
        config: its recipe section.
        sequences: the corpus.
        cache: its targets, or None where the loss needs none.
    """

    config: DataConfig
    sequences: SequenceData
    cache: CacheReader | None

    @property
    def for_batches(self) -> BatchSource:
        """What the batches need of it."""
        return BatchSource(
            plan=self.sequences.plan,
            cache=self.cache,
            num_sequences=self.sequences.num_sequences,
            weight=self.config.weight,
            document_end=self.sequences.plan.document_end,
            label_weights=self.sequences.plan.loss_weights
            if self.sequences.plan.is_weighted
            else None,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Which sequences and targets these are."""
        loss = self.sequences.index.loss
        return {
            "sequence_plan_id": self.sequences.plan.plan_id,
            "num_sequences": self.sequences.num_sequences,
            # Not the manifest's digest: a cache may have grown since.
            "cache_plan_id": self.cache.plan.plan_id if self.cache else None,
            # Not part of the plan, and so of no cache.
            **({"loss_sha256": loss.sha256} if loss is not None else {}),
        }


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
    # Fewer ids than the tokenizer has are right where the corpus holds none of the others: a padding token, say, that
    # the model never knew. The ids are checked below.
    if record and data.vocab_size and data.vocab_size > record.vocab_size:
        raise TokenizerMismatch(
            "data.vocab_size is more than the tokenizer has",
            where="data.vocab_size",
            found=data.vocab_size,
            expected=f"at most {record.vocab_size} (tokens.json beside {tokens})",
            remedy="leave data.vocab_size out",
        )
    # Rank 0 reads a corpus without fingerprint whole and leaves the result beside it for the others.
    on_first_rank(lambda: TokenIndex.open(tokens, vocab_size=vocab_size).check_loss())
    index = TokenIndex.open(tokens, vocab_size=vocab_size)
    if record is not None:
        record.check_loss(index)
    plan = SequencePlan(
        index,
        seq_len=data.seq_len,
        seed=data.seed,
        document_end=document_end_of(data.documents, tokens),
        packing=data.packing,
    )
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
        tokenizer_digests=record.tokenizer_digests if record else (),
        num_sequences=wanted or plan.num_sequences,
    )


def require_one_tokenizer(
    first: SequenceData, tokens: Path, other: SequenceData, *, what: str, where: str
) -> None:
    """Raise TokenizerMismatch where a corpus differs in vocabulary or tokenizer from a first one.

    Args:
        first: the one that decides.
        tokens: its prefix, for the message.
        other: the one that must fit.
        what: both of them, for the message.
        where: which of the recipe's keys names the other one.
    """
    if other.vocab_size != first.vocab_size:
        raise TokenizerMismatch(
            f"{what} differ in vocabulary",
            where=where,
            found=other.vocab_size,
            expected=f"{first.vocab_size}, that of {tokens}",
            remedy="tokenise both with the same tokenizer, or set data.vocab_size to the smaller number "
            "where no corpus holds an id at or above it",
        )
    digests = (first.tokenizer_digests, other.tokenizer_digests)
    if all(digests) and not set(digests[0]) & set(digests[1]):
        raise TokenizerMismatch(
            f"{what} were made with different tokenizers",
            where=where,
            found=f"tokenizer {digests[1][0][:12]}",
            expected=f"{digests[0][0][:12]}, that of {tokens}",
            remedy="tokenise both with the same tokenizer",
        )


def open_blend(data: DataConfig) -> list[SequenceData]:
    """Open data.tokens and every corpus of data.blend, as `open_sequences` does, and check that they fit together.

    Raises:
        TokenizerMismatch: they differ in vocabulary or tokenizer.
    """
    opened = [open_sequences(source) for source in data.sources]
    for config, other in zip(data.sources, opened, strict=True):
        require_one_tokenizer(
            opened[0],
            data.tokens,
            other,
            what="the corpora of the blend",
            where=f"data.blend, {config.tokens}",
        )
    return opened


@contextmanager
def open_sources(data: DataConfig, *, kd_weight: float) -> Iterator[list[TrainingSource]]:
    """Open every corpus of the recipe, and its cache where the loss needs one, for as long as the block lasts.

    In a job every rank calls it. Rank 0 reads what decides whether a cache fits, and tells the others.
    """
    with ExitStack() as caches:

        def cache_of(config: DataConfig, sequences: SequenceData) -> CacheReader | None:
            if kd_weight == 0 or config.cache is None:
                return None
            return caches.enter_context(open_together(partial(open_cache, config.cache, sequences)))

        yield [
            TrainingSource(config=config, sequences=sequences, cache=cache_of(config, sequences))
            for config, sequences in zip(data.sources, open_blend(data), strict=True)
        ]


def require_caches(data: DataConfig, kd_weight: float) -> None:
    """Raise ConfigError where the loss needs caches and not every corpus names one."""
    missing = [source.tokens for source in data.sources if source.cache is None]
    if kd_weight > 0 and missing:
        raise ConfigError(
            "the objective needs a cache for every corpus",
            where="data.cache" if data.cache is None else "data.blend",
            found=f"objective.kd_weight = {kd_weight}, no cache for {', '.join(map(str, missing))}",
            expected="the folder of a finished capture",
            remedy="run `distill-pretrain capture` and set `cache` beside `tokens`, or set objective.kd_weight=0",
        )


def require_one_source(data: DataConfig, verb: str, output_key: str) -> None:
    """Raise ConfigError, saying what to run instead, where a verb that works on one corpus is given a blend."""
    if not data.blend:
        return
    runs = [
        f"{verb} RECIPE.yaml data.blend=[] data.tokens={source.tokens} data.seed={source.seed} "
        f"data.num_sequences={source.num_sequences or 'null'} {output_key}={source.cache or 'FOLDER'}"
        for source in data.sources
    ]
    raise ConfigError(
        f"`{verb}` works on one corpus, and the recipe names a blend",
        where="data.blend",
        found=f"{len(runs)} corpora",
        remedy="run it once for each:\n" + "\n".join(f"  distill-pretrain {run}" for run in runs),
    )


def open_cache(location: str | Path, data: SequenceData) -> CacheReader:
    """Open a finished cache and check that it was made from these sequences and covers them.

    Args:
        location: a folder, or a URL.
        data: the sequences.
    """
    cache = CacheReader.open(location)
    require_made_from(cache, data, num_sequences=data.num_sequences)
    return cache


def open_cache_of(
    location: str, data: SequenceData, *, num_sequences: int, key: str, corpus_key: str
) -> CacheReader:
    """Open a finished cache that was captured on these sequences and covers the first so many.

    Args:
        location: folder or URL.
        data: the sequences, of another corpus than data.tokens.
        num_sequences: how many will be read.
        key: of the recipe, that names the cache.
        corpus_key: of the recipe, that names the corpus.

    Raises:
        CacheMismatch: it is of another corpus, tokenizer, sequence length or order, or too short.
    """
    cache = CacheReader.open(location)
    try:
        require_made_from(cache, data)
    except CacheMismatch as error:
        raise CacheMismatch(
            f"the cache was not captured on {corpus_key}",
            where=f"{key}: {location}",
            found=error,
            remedy=f"capture one with data.tokens set to the corpus of {corpus_key}, or leave {key} out",
        ) from None
    if cache.plan.num_sequences < num_sequences:
        raise CacheMismatch(
            "the cache covers too few sequences",
            where=f"{key}: {location}",
            found=cache.plan.num_sequences,
            expected=f"at least {num_sequences}",
            remedy="capture more, or score fewer (eval.num_sequences, eval.gradients.num_batches, "
            "train.eval_sequences)",
        )
    return cache


def open_together(open_first: Callable[[], CacheReader]) -> CacheReader:
    """Open a cache with all ranks of a job: rank 0 reads and checks, another rank reads only the shards it needs."""
    opened: list[CacheReader] = []

    def head_of_first() -> CacheHead:
        opened.append(open_first())
        return opened[0].head

    head = on_first_rank(head_of_first)
    return opened[0] if opened else CacheReader.of(head)


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
