"""From a model section to megatron-core model chunks, one per virtual pipeline stage of this rank.

Shapes: B sequences, L positions, V vocabulary; megatron-core's logits are sequence-first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore import cpu_compat
from distill_pretrain.mcore.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.core import (
    Float16Module,
    GPTModel,
    TransformerConfig,
    parallel_state,
    tensor_parallel,
)
from distill_pretrain.mcore.deep import residual_scaling
from distill_pretrain.mcore.init import global_name, initialize_weights
from distill_pretrain.mcore.layout import padded_vocab_size
from distill_pretrain.mcore.modules import block_submodules

LossFunction = Callable[[torch.Tensor, TokenBatch], torch.Tensor]
"""(vocab-parallel logits [L, B, V/tp], batch [B, L]) -> summed terms, float32[num_terms].

The first term is minimised; the others are reported."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DistillGPT(GPTModel):
    """GPTModel whose loss is handed in, so that sparse targets reach the last pipeline stage as `labels`."""

    loss_function: LossFunction | None = None

    def compute_language_model_loss(self, labels: TokenBatch, logits: torch.Tensor) -> torch.Tensor:
        """Loss terms of one micro-batch from logits [L, B, V/tp]."""
        assert self.loss_function is not None
        return self.loss_function(logits, labels)


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron-core's configuration of this model and layout."""
    llama = model.arch == "llama"
    interleaved = parallel.virtual_pipeline > 1
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "add_bias_linear": not llama,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "gated_linear_unit": llama,
        "activation_func": F.silu if llama else F.gelu,
        "normalization": "RMSNorm" if llama else "LayerNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "init_method_std": model.init_std,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,
        # The interleaved schedule is silently wrong with batched point-to-point communication at
        # pipeline size 2.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    return TransformerConfig(**{**settings, **cpu_compat.transformer_overrides()})


def build_model_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    precision: str,
    seed: int | None,
    loss_function: LossFunction | None = None,
) -> list[torch.nn.Module]:
    """Model chunks of this rank, with initial weights that depend on `seed` and not on the layout.

    Args:
        model: architecture.
        parallel: layout; the process groups of `parallel.model_parallel` must exist.
        vocab_size: V, real vocabulary.
        seq_len: L; the number of learned positions of a gpt2 model.
        precision: "fp32" or "bf16".
        seed: of the initial weights; None leaves them to be loaded.
        loss_function: what the last stage computes from its logits; None for scoring only.
    """
    config = transformer_config(model, parallel, dtype=DTYPES[precision])
    chunks: list[torch.nn.Module] = []
    for chunk in range(parallel.virtual_pipeline):
        vp_stage = chunk if parallel.virtual_pipeline > 1 else None
        gpt = DistillGPT(
            config,
            block_submodules(config, vp_stage, residual_scaling(model)),
            vocab_size=padded_vocab_size(vocab_size, model.vocab_divisor, parallel.tensor),
            max_sequence_length=seq_len,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope" if model.arch == "llama" else "learned_absolute",
            rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling_factor is not None,
            rope_scaling_factor=model.rope_scaling_factor or 1.0,
            vp_stage=vp_stage,
        )
        gpt.loss_function = loss_function
        for parameter in gpt.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        # Megatron-core makes its own layers on the GPU; norms and learned positions start on the CPU.
        gpt.cuda(torch.cuda.current_device())
        if seed is not None:
            initialize_weights(gpt, model, vocab_size=vocab_size, seed=seed)
        chunks.append(Float16Module(config, gpt) if precision == "bf16" else gpt)
    return chunks


def unwrap(module: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def parameters_by_name(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Every parameter of this rank by its name in the whole model.

    The head of a tied model that has a copy of the embedding (the last of several pipeline stages) is under the
    embedding's name.
    """
    return {
        global_name(gpt, name): parameter
        for gpt in map(unwrap, chunks)
        for name, parameter in gpt.named_parameters()
    }


def _chunk_names(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def sharding_metadata() -> dict[str, Any]:
    """How optimizer state is saved; inside `mcore.parallel.model_parallel`."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # One rank at a time gathers a model shard's optimizer state, instead of all of them at once.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_chunks(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The weights as megatron-core's dist_checkpointing saves them, one entry per chunk."""
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=sharding_metadata())
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Restore what dist_checkpointing loaded into `sharded_chunks`."""
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        unwrap(chunk).load_state_dict(loaded[name], strict=True)
