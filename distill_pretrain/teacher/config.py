"""Recipe sections `teacher` and `capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from distill_pretrain.config import Section


class TeacherConfig(Section):
    """Whose next-token distribution is cached."""

    kind: Literal["megatron", "hf"] = "megatron"
    """`megatron`: a checkpoint trained by this project; `hf`: any causal LM in a local folder."""
    path: Path
    """Run folder or checkpoint folder (megatron), or model folder (hf)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; the softmax is always taken in fp32."""


class CaptureConfig(Section):
    """How the teacher's distribution is sampled and stored."""

    output_dir: Path
    """Folder of the cache."""
    sampler: Literal["systematic", "multinomial", "topk"] = "systematic"
    """`systematic` (unbiased, least variance), `multinomial` (the paper's), `topk` (biased)."""
    num_draws: int = Field(default=50, ge=1, le=1024)
    """N: draws per position; for `topk`, the k."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the draws."""
    num_sequences: int | None = Field(default=None, ge=1)
    """Capture only the first so many sequences of the plan; null captures all."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per teacher forward pass; part of the cache's identity (it moves float rounding)."""
    shard_sequences: int = Field(default=512, ge=1)
    """Sequences per shard file."""
    block_tokens: int = Field(default=1024, ge=16, le=65536)
    """Most positions per checksummed block; a block never crosses a sequence."""
    codec: Literal["hc", "raw"] = "hc"
    """Block codec: `hc` (entropy-coded, a third to half the bytes) or `raw` (fixed width)."""
    pilot_tokens: int = Field(default=65536, ge=1)
    """Positions scored first to make the tables of `hc` (at most an eighth of the capture, but one micro-batch)."""
    codec_tables: Path | None = None
    """Tables of another cache (its codec-*.bin) instead of a pilot; caches to be merged need the same tables."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per capture process (fixed, so that results do not depend on the machine)."""
