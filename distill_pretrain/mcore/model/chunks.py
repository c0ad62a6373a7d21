"""From a model section to megatron-core model chunks, one per virtual pipeline stage of this rank.

Shapes: B sequences, L positions, V vocabulary; megatron-core's logits are sequence-first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.mcore.init.deep import activation_of, residual_scaling
from distill_pretrain.mcore.init.methods import global_name, initialize_weights
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.experts import experts_settings, mark_experts
from distill_pretrain.mcore.model.head import LossFunction, LossGivenIn
from distill_pretrain.mcore.model.layout import padded_vocab_size, require_implementation
from distill_pretrain.mcore.model.modules import (
    LayerSpec,
    local_layer,
    return_copied_bias,
    transformer_engine_layer,
    uses_transformer_engine,
)
from distill_pretrain.mcore.runtime import cpu_compat
from distill_pretrain.mcore.runtime.core import (
    Float16Module,
    GPTModel,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_num_layers_to_build,
    parallel_state,
    tensor_parallel,
)

EXTRA_STATE = "_extra_state"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class DistillGPT(LossGivenIn, GPTModel):
    """GPTModel whose loss is handed in."""


def gpt_of_layers(
    config: TransformerConfig,
    layer: LayerSpec,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vp_stage: int | None,
    **settings: Any,
) -> DistillGPT:
    """Make a chunk of a GPTModel of such layers; `settings` are those that HybridModel takes, too."""
    spec, final_norm = layer
    return DistillGPT(
        config,
        TransformerBlockSubmodules(
            layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=final_norm
        ),
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
        **settings,
    )


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    fuse_gradient_accumulation: bool = False,
) -> TransformerConfig:
    """Make megatron-core's configuration of this model and layout."""
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
        "activation_func": ACTIVATIONS[activation_of(model)[1]],
        "normalization": "RMSNorm" if llama else "LayerNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "init_method_std": model.init_std,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor > 1,
        **_recomputation(model, parallel),
        **experts_settings(model, parallel),
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
        "gradient_accumulation_fusion": fuse_gradient_accumulation,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    if model.attention_scale_width is not None:
        settings["softmax_scale"] = model.attention_scale_width**-0.5
    if model.fp8 is not None:
        settings |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
    config = TransformerConfig(**{**settings, **cpu_compat.transformer_overrides()})
    if model.implementation == "hybrid":
        # Its pattern of layers says which a stage has, and nothing else may.
        config.num_layers_in_first_pipeline_stage = None
        config.num_layers_in_last_pipeline_stage = None
    return config


def _recomputation(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of TransformerConfig for what the backward pass recomputes."""
    if parallel.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_num_layers,
        }
    if parallel.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            # What takes the place of a feed-forward block has another name.
            "recompute_modules": [
                "moe" if name == "mlp" and model.experts is not None else name
                for name in parallel.recompute_modules
            ],
        }
    return {}


def build_model_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    precision: str,
    seed: int | None,
    loss_function: LossFunction | None = None,
    fuse_gradient_accumulation: bool = False,
) -> list[torch.nn.Module]:
    """Build the model chunks of this rank, with initial weights that depend on `seed` and not on the layout.

    Args:
        model: architecture.
        parallel: layout; the process groups of `parallel.model_parallel` must exist.
        vocab_size: V, real vocabulary.
        seq_len: L; the number of learned positions of a gpt2 model.
        precision: "fp32" or "bf16".
        seed: of the initial weights; None leaves them to be loaded.
        loss_function: what the last stage computes from its logits; None for scoring only.
        fuse_gradient_accumulation: for chunks that megatron-core's DDP will wrap, which has the buffers it adds to.
    """
    config = transformer_config(
        model,
        parallel,
        dtype=DTYPES[precision],
        fuse_gradient_accumulation=fuse_gradient_accumulation,
    )
    layer_of = transformer_engine_layer if uses_transformer_engine(model) else local_layer
    layer = layer_of(config, residual_scaling(model), model)
    of_layers = _of_layers(model)
    chunks: list[torch.nn.Module] = []
    for chunk in range(parallel.virtual_pipeline):
        vp_stage = chunk if parallel.virtual_pipeline > 1 else None
        gpt = of_layers(
            config,
            layer,
            model,
            parallel,
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
            rotary_percent=model.rotary_fraction,
            vp_stage=vp_stage,
        )
        gpt.loss_function, gpt.logit_cap = loss_function, model.logit_cap
        if model.embedding_scale is not None and gpt.pre_process:
            gpt.embedding.register_forward_hook(partial(_scaled_embedding, model.embedding_scale))
        if config.recompute_granularity == "selective" and "mlp" in config.recompute_modules:
            for layer in gpt.decoder.layers:
                layer.mlp.register_forward_hook(return_copied_bias)
        for parameter in gpt.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        mark_experts(gpt)
        # Megatron-core makes its own layers on the GPU; norms and learned positions start on the CPU.
        gpt.cuda(torch.cuda.current_device())
        if seed is not None:
            initialize_weights(gpt, model, vocab_size=vocab_size, seed=seed)
        chunks.append(Float16Module(config, gpt) if precision == "bf16" else gpt)
    return chunks


def _scaled_embedding(
    scale: float, module: torch.nn.Module, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    """Multiply the embedding's vectors by a factor of their own type, as transformers does: a hook."""
    return output * torch.tensor(scale, dtype=output.dtype, device=output.device)


def _of_layers(model: ModelConfig) -> Callable[..., Any]:
    """Find the function that makes a chunk of `model.implementation` of its layers."""
    require_implementation(model)
    if model.implementation == "gpt":
        return gpt_of_layers
    from distill_pretrain.mcore.model.hybrid import hybrid_of_layers

    return hybrid_of_layers


def unwrap(module: torch.nn.Module) -> GPTModel:
    """Find the GPTModel, or the HybridModel, inside DDP and Float16Module."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def parameters_by_name(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Return every parameter of this rank by its name in the whole model.

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
    """Return how optimizer state is saved; call it inside `mcore.parallel.model_parallel`."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # One rank at a time gathers a model shard's optimizer state, instead of all of them at once.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # Experts have an optimizer of their own: their state is named as all other, under any layout.
        "chained_optim_avoid_prefix": True,
    }


def sharded_chunks(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the weights as megatron-core's dist_checkpointing saves them, one entry per chunk."""
    return {
        name: _without_extra_state(unwrap(chunk).sharded_state_dict(metadata=sharding_metadata()))
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state without what Transformer Engine adds (FP8's scales): other layers can read it, and scales start anew."""
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


def load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Restore what dist_checkpointing loaded into `sharded_chunks`."""
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        wrong = [*unexpected, *(key for key in missing if not key.endswith(EXTRA_STATE))]
        assert not wrong, wrong
