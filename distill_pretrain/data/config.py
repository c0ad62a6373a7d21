"""Recipe section `data`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from distill_pretrain.config import Section


class DataConfig(Section):
    """A tokenised corpus, cut into fixed sequences; and the cache that belongs to it."""

    tokens: Path
    """Prefix of the training corpus: PREFIX.bin and PREFIX.idx (Megatron format)."""
    held_out_tokens: Path | None = None
    """Prefix of the held-out corpus; needed by `eval`."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 20)
    """Real vocabulary; null reads it from tokens.json beside the corpus (written by `tokenize`)."""
    seq_len: int = Field(ge=2)
    """Tokens per training sequence."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the document order in the sequence plan."""
    num_sequences: int | None = Field(default=None, ge=1)
    """Use only the first so many sequences of the plan; null uses all."""
    cache: Path | None = None
    """Sparse-logit cache to train from; null trains on the text alone."""
