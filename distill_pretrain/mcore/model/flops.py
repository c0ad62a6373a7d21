"""Operations of a training step by formula: what TFLOP/s and model FLOPs utilisation are computed from.

Shapes: H hidden, F feed-forward, n heads and g key/value groups of width d, V vocabulary, L positions of a sequence.
"""

from __future__ import annotations

from distill_pretrain.mcore.model.config import ModelConfig

OPERATIONS_PER_WEIGHT = 6
"""Per token: a multiplication and an addition in the forward pass, twice as many in the backward pass."""


def matmul_weights(model: ModelConfig, *, vocab_size: int) -> int:
    """Count the weights that a token is multiplied with, N: every matrix of the layers, and the LM head.

    H (n + 2 g) d + n d H of attention, (3 or 2) H F of the feed-forward block with or without a gate, and H V. Of
    experts those that a token takes, and H for the router of each that there is. The input embedding is looked up;
    norms, biases and padding columns are left out.
    """
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    attention = model.hidden_size * width * (2 * heads + 2 * groups)
    matrices = 3 if model.arch == "llama" else 2
    feed_forward = matrices * model.hidden_size * model.ffn_hidden_size
    if model.experts is not None:
        router = model.hidden_size * model.experts.number
        feed_forward = feed_forward * model.experts.per_token + router
    return model.num_layers * (attention + feed_forward) + model.hidden_size * vocab_size


def training_flops_per_token(model: ModelConfig, *, vocab_size: int, seq_len: int) -> int:
    """Compute 6 N + 12 n d (sum of L over layers): model FLOPs of a token, both ways (arXiv 2204.02311, appendix B).

    A layer with a window has its length in place of L where that is less.

    As everywhere in the field, attention counts all L keys of a query though half of them are masked, and what is
    computed again (activation recomputation) or by a teacher in the same job does not count.
    """
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    keys = 0
    for layer in range(model.num_layers):
        window = model.sliding_window if model.attention_of(layer) == "w" else None
        keys += seq_len if window is None else min(window, seq_len)
    scores = 2 * model.num_attention_heads * width * keys
    return OPERATIONS_PER_WEIGHT * (matmul_weights(model, vocab_size=vocab_size) + scores)
