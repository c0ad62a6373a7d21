"""The same model as megatron-core's HybridModel, which takes the place of GPTModel from megatron-core 0.19 on.

HybridModel knows a layer of attention and one of a feed-forward block. Here its attention layer is the whole layer that
GPTModel has, from the same spec: so numbers of layers, names of parameters and checkpoints are GPTModel's. Import this
module only where `layout.require_implementation` has found HybridModel.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.head import LossGivenIn
from distill_pretrain.mcore.model.layout import stage_layers
from distill_pretrain.mcore.model.modules import LayerSpec
from distill_pretrain.mcore.runtime.core import (
    ModuleSpec,
    RotaryEmbedding,
    TransformerConfig,
    replace_prefix_for_sharding,
    sharded_state_dict_default,
    tensor_parallel,
)
from distill_pretrain.mcore.runtime.hybrid_core import (
    HybridModel,
    HybridStack,
    HybridStackSubmodules,
)

_WHOLE_LAYER, _NEXT_STAGE = "*", "|"


class WholeLayerStack(HybridStack):
    """A stage of whole layers with the final norm, random streams and checkpoint of megatron-core's TransformerBlock.

    Args:
        settings: of HybridStack.
        final_layernorm: class of the final norm; None for a model without one. HybridStack knows only Transformer
            Engine's.
    """

    def __init__(self, *args: Any, final_layernorm: Any, **settings: Any) -> None:
        super().__init__(*args, **settings, post_layer_norm=False)
        self.post_layer_norm = final_layernorm is not None
        if self.post_process and self.post_layer_norm:
            self.final_layernorm = final_layernorm(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )

    @property
    def final_norm(self) -> Any:
        """The final norm as HybridStack calls it; its parameters keep GPTModel's name."""
        return self.final_layernorm

    def forward(self, *args: Any, **settings: Any) -> torch.Tensor:
        """Do what HybridStack does here; ranks that share a sequence drop different positions of it."""
        shares = self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if shares else nullcontext():
            output: torch.Tensor = super().forward(*args, **settings)
        return output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the weights as TransformerBlock does: a parameter of every layer is a slice of one tensor."""
        state: dict[str, Any] = {}
        layers = f"{prefix}layers."
        for place, layer in enumerate(self.layers):
            here = f"{layers}{place}."
            offset = (0, layer.layer_number - 1, self.config.num_layers)
            entries = layer.sharded_state_dict(here, [offset], metadata)
            replace_prefix_for_sharding(entries, here, layers)
            state.update(entries)
        if self.post_process and self.post_layer_norm:
            norm = f"{prefix}final_layernorm."
            state.update(
                sharded_state_dict_default(
                    self.final_layernorm, norm, (), metadata, tp_group=self.tp_group
                )
            )
        return state


class DistillHybrid(LossGivenIn, HybridModel):
    """HybridModel whose loss is handed in."""


def hybrid_of_layers(
    config: TransformerConfig,
    layer: LayerSpec,
    model: ModelConfig,
    parallel: ParallelConfig,
    **settings: Any,
) -> DistillHybrid:
    """Make a chunk of a HybridModel of such layers; `settings` are those that GPTModel takes, too."""
    spec, final_norm = layer
    stack = ModuleSpec(
        module=WholeLayerStack,
        params={"final_layernorm": final_norm},
        submodules=HybridStackSubmodules(attention_layer=spec),
    )
    hybrid = DistillHybrid(
        config, stack, hybrid_layer_pattern=layer_pattern(model, parallel), **settings
    )
    if model.rope_scaling_factor is not None:
        # HybridModel has no setting for it.
        hybrid.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=model.rotary_fraction,
            rotary_base=model.rotary_base,
            rope_scaling=True,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=hybrid.pg_collection.cp,
        )
    return hybrid


def layer_pattern(model: ModelConfig, parallel: ParallelConfig) -> str:
    """Write the layers of every stage's first chunk, then those of their second ones, and so on: `**|**`."""
    chunks = parallel.virtual_pipeline
    stages = [layers // chunks for layers in stage_layers(model.num_layers, parallel)]
    return _NEXT_STAGE.join(_WHOLE_LAYER * layers for layers in stages * chunks)
