"""Recipe sections `model`, `parallel` and `optimizer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill_pretrain.config import Section


class ModelConfig(Section):
    """A decoder-only transformer built by megatron-core."""

    arch: Literal["llama", "gpt2"] = "llama"
    """`llama`: RMSNorm, SwiGLU, RoPE, no biases; `gpt2`: LayerNorm, GELU, learned positions, biases."""
    num_layers: int = Field(ge=1)
    """Transformer layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Inner width of the feed-forward block."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads (GQA); null means one per query head."""
    kv_channels: int | None = Field(default=None, ge=1)
    """Width of a head; null means hidden_size / num_attention_heads."""
    rotary_base: int = Field(default=10000, ge=1)
    """RoPE base (llama)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms."""
    tie_embeddings: bool = False
    """Share the input embedding with the LM head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Hidden and attention dropout."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 num_layers)."""
    vocab_divisor: int = Field(default=128, ge=1)
    """The vocabulary is padded to a multiple of this (and of the tensor-parallel size)."""


class ParallelConfig(Section):
    """How one model is spread over processes; data parallelism takes what is left."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel size."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks per pipeline stage (interleaved schedule when > 1)."""
    sequence_parallel: bool = False
    """Split activations over the sequence between tensor-parallel regions."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up from zero."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps until min_lr is reached; null means train.steps."""
    decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay (matrices only)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Gradient-norm clip; 0 turns it off."""
