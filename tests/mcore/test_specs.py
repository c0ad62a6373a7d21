"""Layers of Transformer Engine go through the same hooks as the local ones; a stand-in takes its modules' place."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes.process import process_group
from tests.support.layouts import LLAMA, VOCAB_SIZE


def local_layers_in_its_place(monkeypatch):
    """Layers that Transformer Engine would compute, as local ones with their norms."""
    from distill_pretrain.mcore.model import modules

    def spec(qk_layernorm):
        layer = modules.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=False)
        layer.submodules.input_layernorm = modules.RMSNorm
        layer.submodules.pre_mlp_layernorm = modules.RMSNorm
        layer.submodules.self_attention.submodules.core_attention = modules.SDPAttention
        return layer

    monkeypatch.setattr(modules, "get_gpt_layer_with_transformer_engine_spec", spec)
    monkeypatch.setattr(modules, "transformer_engine_norm", lambda: modules.RMSNorm)
    monkeypatch.setattr(
        "distill_pretrain.mcore.model.chunks.uses_transformer_engine", lambda model: True
    )


def test_its_layers_have_the_scaled_branches_and_initial_weights_of_local_ones(monkeypatch):
    from distill_pretrain.mcore.init.layers import DeepLayer
    from distill_pretrain.mcore.model.chunks import build_model_chunks, parameters_by_name, unwrap
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    model = ModelConfig(**LLAMA, init="deepscale")

    def built():
        return build_model_chunks(
            model,
            ParallelConfig(),
            vocab_size=VOCAB_SIZE,
            seq_len=8,
            precision="fp32",
            seed=5,
        )

    with process_group(), model_parallel(ParallelConfig(), seed=1):
        local = built()
        local_layers_in_its_place(monkeypatch)
        other = built()
        assert all(isinstance(layer, DeepLayer) for layer in unwrap(other[0]).decoder.layers)
        expected, found = parameters_by_name(local), parameters_by_name(other)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_joined_norm_is_named_as_one_apart():
    from distill_pretrain.mcore.init.methods import global_name

    gpt = SimpleNamespace(
        share_embeddings_and_output_weights=False,
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=4)]),
    )
    prefix = "decoder.layers.0."
    assert (
        global_name(gpt, f"{prefix}self_attention.linear_qkv.layer_norm_weight")
        == "decoder.layers.3.input_layernorm.weight"
    )
    assert (
        global_name(gpt, f"{prefix}mlp.linear_fc1.layer_norm_bias")
        == "decoder.layers.3.pre_mlp_layernorm.bias"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_layers_are_refused_and_auto_means_local(monkeypatch):
    from distill_pretrain.mcore.model.modules import uses_transformer_engine

    stand_in = SimpleNamespace(__spec__=SimpleNamespace(name="transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine", stand_in)
    assert uses_transformer_engine(ModelConfig(**LLAMA, spec="auto")) is False
    with pytest.raises(ConfigError, match=r"model\.spec"):
        uses_transformer_engine(ModelConfig(**LLAMA, spec="te"))
