"""Every name taken from megatron-core, imported once and quietly.

Importing megatron-core prints half a dozen warnings about optional packages and a flood of deprecations; they
are silenced here and nowhere else. Import this module only inside functions or modules that are themselves
imported lazily: it takes seconds.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from distill_pretrain.mcore.runtime.importing import importing_megatron

with importing_megatron():
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedStateDict,
        ShardedTensor,
        ShardedTensorFactory,
        StateDict,
        is_main_replica,
    )
    from megatron.core.dist_checkpointing.optimizer import (
        make_sharded_optimizer_tensor,
        optim_state_to_sharding_state,
    )
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import (
        MegatronOptimizer,
        OptimizerConfig,
        ParamKey,
        _get_param_groups,
        distrib_optimizer,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.core.transformer.utils import (
        make_sharded_tensors_for_checkpoint,
        sharded_state_dict_default,
    )


def forget_rotary_embeddings() -> None:
    """Empty megatron-core's cache of rotary embeddings: it keeps a process group of every model, at three threads."""
    RotaryEmbedding.forward.cache_clear()


def transformer_engine_norm() -> Any:
    """Return megatron-core's norm on Transformer Engine, which must be installed."""
    with importing_megatron():
        from megatron.core.extensions.transformer_engine import TENorm
    return TENorm


_CHATTER = (
    "RNG state changed",
    "Rerun State Machine",
    "RerunStateMachine",
    # Only rank 0 of the data-parallel ranks holds the gathered optimizer state while it is saved.
    "'param_state')], Mismatched keys: []",
    # megatron-core 0.17 and later, of choices made on purpose (student/state.py, model/chunks.py).
    "MCore's async save is deprecated",
    "GPTModel IS DEPRECATED",
    "load_common is deprecated",
    "full_param_layout not provided",
)
_HARMLESS_WARNINGS = (
    r"`torch\.distributed\..*` is deprecated",
    r"full scope is deprecated",
    # Imported by megatron-core 0.19 as it makes an optimizer, and not used.
    r"MimoModelConfig is experimental",
    # Under recompute: selective, whatever computes the layers.
    r"If you are using transformer_engine as the transformer implementation",
    r"The \.grad attribute of a Tensor that is not a leaf",
    # Of torch, of how megatron-core calls it to save and to load.
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"`load_state_dict` is deprecated and will be removed in future versions",
    r"The argument order of load has been changed",
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CHATTER)


def silence_chatter() -> None:
    """Drop the messages megatron-core repeats on every run and that ask nothing of the user."""
    for name in (
        "tensor_parallel.random",
        "rerun_state_machine",
        "dist_checkpointing.validation",
        "dist_checkpointing.strategies.common",
        "dist_checkpointing.strategies.torch",
        "distributed.distributed_data_parallel",
        "models.gpt.gpt_model",
    ):
        logging.getLogger(f"megatron.core.{name}").addFilter(_is_news)
    for message in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


__all__ = [
    "AsyncRequest",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "FileSystemWriterAsync",
    "Float16Module",
    "GPTModel",
    "MLPSubmodules",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "ParamKey",
    "ParamWithNamePredicate",
    "RotaryEmbedding",
    "SelfAttention",
    "SequentialMLP",
    "ShardedObject",
    "ShardedStateDict",
    "ShardedTensor",
    "ShardedTensorFactory",
    "StateDict",
    "TopKRouter",
    "TorchDistSaveShardedStrategy",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "_get_param_groups",
    "apply_rotary_pos_emb",
    "clip_grad_by_total_norm_fp32",
    "dist_checkpointing",
    "distrib_optimizer",
    "filesystem_async",
    "finalize_model_grads",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_standard_config_overrides",
    "is_main_replica",
    "make_sharded_optimizer_tensor",
    "make_sharded_tensors_for_checkpoint",
    "megatron_optimizer",
    "megatron_random",
    "optim_state_to_sharding_state",
    "parallel_state",
    "replace_prefix_for_sharding",
    "save_preprocess",
    "sharded_state_dict_default",
    "silence_chatter",
    "tensor_parallel",
    "token_dispatcher",
    "topk_routing_with_score_function",
    "transformer_engine_norm",
]
