"""What docs/guides/teachers_only.md says is missing in megatron-core for a student is missing in the one installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group

ATTENTION: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "use_cpu_initialization": True,
    "activation_func": torch.nn.functional.silu,
    "attention_dropout": 0.0,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
DELTA = {f"linear_num_{name}_heads": heads for name, heads in (("key", 2), ("value", 4))}
DELTA |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
DELTA |= {"linear_conv_kernel_dim": 4, "linear_attention_freq": 4}
LATENT = {"multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8}
# Values as wide as queries: this project's core attention has one width.
LATENT |= {"qk_pos_emb_head_dim": 8, "v_head_dim": 16, "rope_type": "rope"}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    if any(importlib.util.find_spec(name) for name in ("fla", "transformer_engine")):
        pytest.skip("this environment has more than CPUs use")
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        yield


def attend(config: Any, *, latent: bool = False, core: Any = None) -> torch.Tensor:
    from megatron.core.transformer.spec_utils import build_module

    from distill_pretrain.mcore.runtime.core import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=latent)
    attention = layer.submodules.self_attention
    if core is not None:
        attention.submodules.core_attention = core
    output: torch.Tensor = build_module(attention, config=config, layer_number=1)(
        torch.randn(6, 2, 32), None
    )[0]
    return output


def test_a_gated_delta_net_needs_kernels_of_gpus():
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from distill_pretrain.mcore.model.norms import RMSNorm
    from distill_pretrain.mcore.runtime.core import TransformerConfig

    config = TransformerConfig(
        **ATTENTION, **DELTA, experimental_attention_variant="gated_delta_net"
    )
    parts = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with pytest.raises(ImportError, match="FLA is not installed"):
        GatedDeltaNet(config, parts, layer_number=1, pg_collection=groups)
    with pytest.raises(NameError, match="TESpecProvider"):
        specs.get_transformer_block_with_experimental_attention_variant_spec(config)


def test_gated_attention_is_not_what_is_missing():
    from distill_pretrain.mcore.model.modules import SDPAttention
    from distill_pretrain.mcore.runtime.core import TransformerConfig

    config = TransformerConfig(**ATTENTION, attention_output_gate=True)
    assert attend(config, core=SDPAttention).shape == (6, 2, 32)


def test_latent_attention_has_no_core_without_transformer_engine():
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(**{**ATTENTION, **LATENT})
    with pytest.raises(TypeError, match="unexpected keyword argument 'k_channels'"):
        attend(config, latent=True)


def test_latent_attention_with_a_core_of_its_own_runs_under_0_19_and_not_under_0_16():
    import megatron.core
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from distill_pretrain.mcore.model.modules import SDPAttention

    class Core(SDPAttention):
        def __init__(self, *args: Any, **settings: Any) -> None:
            widths = ("k_channels", "v_channels")
            super().__init__(*args, **{k: v for k, v in settings.items() if k not in widths})

    version = megatron.core.__version__
    if not version.startswith(("0.16.", "0.19.")):
        pytest.skip("not tried")
    config = MLATransformerConfig(**{**ATTENTION, **LATENT})
    if version.startswith("0.16."):
        with pytest.raises(TypeError, match=r"isinstance\(\) arg 2 must be a type"):
            attend(config, latent=True, core=Core)
        return
    assert attend(config, latent=True, core=Core).shape == (6, 2, 32)
