"""Every parameter that a rank holds under a layout, by formula: what mcore builds, without building it.

Shapes: H hidden, F feed-forward, V_pad padded vocabulary, L positions; heads and columns are divided by the
tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import padded_vocab_size, stage_layers

Shape = tuple[int, ...]


def head_width(model: ModelConfig) -> int:
    """Return the number of channels of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def layer_shapes(model: ModelConfig, tensor: int) -> list[Shape]:
    """Return the shapes of the parameters of one transformer layer on a tensor-parallel rank, but for experts."""
    llama = model.arch == "llama"
    width, hidden = head_width(model), model.hidden_size
    groups = model.num_query_groups or model.num_attention_heads
    heads = model.num_attention_heads * width // tensor
    qkv = heads + 2 * groups * width // tensor
    ffn = model.ffn_hidden_size // tensor
    inner = 2 * ffn if llama else ffn
    norm: list[Shape] = [(hidden,)] if llama else [(hidden,), (hidden,)]
    shapes: list[Shape] = [
        *norm,
        *norm,
        (hidden, heads),
        (qkv, hidden),
        *([(inner, hidden), (hidden, ffn)] if model.experts is None else []),
    ]
    if model.experts is not None:
        shapes.append((model.experts.number, hidden))
        if model.experts.biases:
            shapes.append((model.experts.number,))
    if not llama:
        shapes += [(hidden,), (qkv,), (inner,), (hidden,)]
    if model.qkv_bias:
        shapes.append((qkv,))
    if model.norm_placement == "sandwich":
        shapes += [*norm, *norm]
    if model.qk_norm:
        shapes += [(width,), (width,)]
    if model.qk_norm_whole:
        shapes += [(heads,), (groups * width // tensor,)]
    if model.attention_sinks:
        shapes.append((model.num_attention_heads // tensor,))
    if model.attention_output_bias:
        shapes.append((hidden,))
    if model.mlp_bias and model.experts is None:
        shapes += [(inner,), (hidden,)]
    return shapes


def expert_shapes(model: ModelConfig) -> list[Shape]:
    """Return the shapes of the parameters of one expert, which one rank holds whole."""
    hidden, width = model.hidden_size, model.ffn_hidden_size
    biased = model.experts is not None and model.experts.biases
    return [
        (2 * width, hidden),
        (hidden, width),
        *([(2 * width,), (hidden,)] if biased else []),
    ]


def rank_expert_shapes(model: ModelConfig, parallel: ParallelConfig, *, stage: int) -> list[Shape]:
    """Return the shapes of all experts' parameters on a rank of a pipeline stage; none of a model without experts."""
    if model.experts is None:
        return []
    held = model.experts.number // parallel.expert
    return expert_shapes(model) * (held * stage_layers(model.num_layers, parallel)[stage])


def dense_shapes(
    model: ModelConfig, parallel: ParallelConfig, *, vocab_size: int, seq_len: int, stage: int
) -> list[Shape]:
    """Return the shapes of the parameters of a rank of a pipeline stage, over all its chunks, but for experts.

    Args:
        model: architecture.
        parallel: layout; must fit the model (`mcore.model.layout.check_layout`).
        vocab_size: V, real vocabulary.
        seq_len: L; the number of learned positions of a gpt2 model.
        stage: pipeline rank.
    """
    tensor = parallel.tensor
    rows = padded_vocab_size(vocab_size, model.vocab_divisor, tensor) // tensor
    vocabulary = (rows, model.hidden_size)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    shapes = layer_shapes(model, tensor) * stage_layers(model.num_layers, parallel)[stage]
    if is_first:
        shapes.append(vocabulary)
        if model.arch == "gpt2":
            shapes.append((seq_len, model.hidden_size))
    if is_last:
        if model.norm_placement != "post":
            shapes += [(model.hidden_size,)] * (1 if model.arch == "llama" else 2)
        # A tied head on a stage of its own has a copy of the embedding.
        if not (model.tie_embeddings and is_first):
            shapes.append(vocabulary)
    return shapes


def rank_shapes(
    model: ModelConfig, parallel: ParallelConfig, *, vocab_size: int, seq_len: int, stage: int
) -> list[Shape]:
    """Return the shapes of all parameters of a rank of a pipeline stage: see `dense_shapes`."""
    dense = dense_shapes(model, parallel, vocab_size=vocab_size, seq_len=seq_len, stage=stage)
    return dense + rank_expert_shapes(model, parallel, stage=stage)


def num_parameters(model: ModelConfig, *, vocab_size: int, seq_len: int, tensor: int = 1) -> int:
    """Count the parameters of the whole model, padding of the vocabulary and all experts included."""
    whole = rank_shapes(model, ParallelConfig(), vocab_size=vocab_size, seq_len=seq_len, stage=0)
    return sum(map(math.prod, whole))


def active_parameters(model: ModelConfig, *, vocab_size: int, seq_len: int) -> int:
    """Count the parameters that a token meets: of all but the experts that it does not take."""
    total = num_parameters(model, vocab_size=vocab_size, seq_len=seq_len)
    if model.experts is None:
        return total
    left_out = model.num_layers * (model.experts.number - model.experts.per_token)
    return total - left_out * sum(map(math.prod, expert_shapes(model)))


def stages(parallel: ParallelConfig) -> Iterator[int]:
    """Yield the pipeline stages that differ in memory: the first, one between, the last."""
    yield from sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})
