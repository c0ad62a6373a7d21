"""Recipe section `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from distill_pretrain.config import Section, nameable
from distill_pretrain.files.storage import is_remote

REMOTE_THREADS = 8
"""Threads that read caches at URLs; the client of S3 has 10 connections."""


def _prefix(path: Path | None) -> Path | None:
    """Return the same prefix of a corpus; raise ValueError where it has no name for .bin and .idx to follow."""
    if path is not None and not path.name:
        raise ValueError(
            f"found: {str(path)!r}; expected: the prefix of a corpus, such as runs/tokens/train, without its ending"
        )
    return path


class BlendSource(Section):
    """One more corpus to train on, with the cache that belongs to it."""

    tokens: Path
    """Prefix of the corpus: PREFIX.bin and PREFIX.idx; same tokenizer as data.tokens."""
    cache: str | None = None
    """Its sparse-logit cache: a folder, or a URL; needed when objective.kd_weight > 0."""
    weight: float = Field(gt=0)
    """Its share of the sequences is weight / (data.weight + the weights of the blend)."""
    num_sequences: int | None = Field(default=None, ge=1, le=1 << 40)
    """Use only the first so many sequences of its plan; null uses all."""
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    """Seed of the document order in its sequence plan; null takes data.seed."""

    _cache_can_be_named = field_validator("cache")(nameable)
    _tokens_have_a_name = field_validator("tokens")(_prefix)


class DataConfig(Section):
    """A tokenised corpus, cut into fixed sequences; and the cache that belongs to it."""

    tokens: Path
    """Prefix of the training corpus: PREFIX.bin and PREFIX.idx (Megatron format)."""
    held_out_tokens: Path | None = None
    """Prefix of the held-out corpus; needed by `eval`."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 20)
    """Real vocabulary; null reads it from tokens.json beside the corpus (written by `tokenize`)."""
    seq_len: int = Field(ge=2, le=1 << 24)
    """Tokens per training sequence."""
    seed: int = Field(default=1234, ge=0, lt=1 << 64)
    """Seed of the document order in the sequence plan."""
    num_sequences: int | None = Field(default=None, ge=1, le=1 << 40)
    """Use only the first so many sequences of the plan; null uses all."""
    documents: Literal["joined", "separate"] = "joined"
    """Of the documents in a sequence: joined ones are one text to teacher and student. separate keeps attention within
    each, learned positions start anew, and the loss leaves out what would predict a token of the next one. Corpora of
    `tokenize` only; part of the plan, so a cache belongs to one of the two."""
    packing: Literal["cut", "best_fit"] = "cut"
    """How documents share sequences. cut: their stream is cut every data.seq_len tokens, whatever is there; best_fit:
    documents that fit into a sequence are never cut, longer ones where they fill it, and sequences end with padding.
    Part of the plan, too."""
    cache: str | None = None
    """Sparse-logit cache to train from, a folder or a URL such as s3://bucket/cache; null trains on the text alone."""
    held_out_cache: str | None = None
    """Cache of the held-out text (`capture` with data.tokens set to it), for `held_out_kl` while training
    (train.eval_interval); null leaves it out."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this corpus among those of data.blend (any unit; only the ratios count)."""
    blend: tuple[BlendSource, ...] = ()
    """More corpora to train on (train): a list of {tokens, cache, weight, num_sequences, seed}."""
    prefetch_steps: int = Field(default=2, ge=0, le=1 << 20)
    """Steps that a background thread reads and decodes ahead of training; 0 reads when they are needed."""
    read_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads of each process that read and decode the targets of a step at the same time, in any order and to the same
    batches; null takes 1 for caches in folders and 8 where one is at a URL."""
    read_retry_s: float = Field(default=60.0, ge=0)
    """Seconds for which a read of the cache that disk, network or store fails is tried again; 0 fails at once."""
    canary: Literal["refuse", "warn"] = "refuse"
    """What `train` does when a cache's targets do not fit the text (shifted, or from a teacher that ignores it)."""

    _cache_can_be_named = field_validator("cache", "held_out_cache")(nameable)
    _tokens_have_a_name = field_validator("tokens", "held_out_tokens")(_prefix)

    @property
    def threads_to_read(self) -> int:
        """`read_threads`, or the number that suits where the caches are."""
        if self.read_threads is not None:
            return self.read_threads
        caches = [*(source.cache for source in self.sources), self.held_out_cache]
        return REMOTE_THREADS if any(c is not None and is_remote(c) for c in caches) else 1

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """Every corpus of the blend as a section of its own, this one first."""
        alone = self.model_copy(update={"blend": ()})
        return (
            alone,
            *(
                alone.model_copy(
                    update={
                        **source.model_dump(),
                        "seed": self.seed if source.seed is None else source.seed,
                    }
                )
                for source in self.blend
            ),
        )
