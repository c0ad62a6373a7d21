"""Layouts that do not fit are refused, all misfits in one message."""

from __future__ import annotations

import importlib.util

import pytest
from pydantic import ValidationError

from distill_pretrain.errors import ConfigError, LayoutError, MissingDependency
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import (
    check_layout,
    require_fusion,
    require_spec,
    stage_layers,
)
from tests.support.layouts import LLAMA


def check(world_size=1, micro=2, batch=8, seq_len=32, model=None, online_teacher=False, **parallel):
    return check_layout(
        ModelConfig(**{**LLAMA, **(model or {})}),
        ParallelConfig(**parallel),
        world_size=world_size,
        micro_batch_size=micro,
        global_batch_size=batch,
        seq_len=seq_len,
        online_teacher=online_teacher,
    )


def test_a_fitting_layout_gives_its_data_parallel_size():
    assert check(8, tensor=2, pipeline=2) == 2
    # Learned positions rotate no pairs.
    assert check(model={"arch": "gpt2", "kv_channels": 5}) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"world_size": 3, "tensor": 3, "model": {"num_query_groups": 4, "ffn_hidden_size": 66}},
            "model.num_attention_heads = 4 is not divisible by parallel.tensor = 3",
        ),
        ({"world_size": 4, "tensor": 4}, "model.num_query_groups = 2 is not divisible by"),
        ({"model": {"kv_channels": 5}}, "model.kv_channels = 5 is odd"),
        ({"model": {"kv_channels": 1}}, "model.kv_channels = 1 is odd"),
        (
            {"model": {"hidden_size": 20}},
            "model.hidden_size / model.num_attention_heads = 5 is odd",
        ),
        ({"world_size": 3, "pipeline": 3}, "model.num_layers = 4 is not divisible by"),
        ({"world_size": 3, "tensor": 2}, "3 processes, tensor 2 x pipeline 1"),
        ({"world_size": 1, "tensor": 2}, "expected: a multiple of 2 processes"),
        ({"world_size": 1, "micro": 3}, "train.global_batch_size = 8 is not divisible by"),
        ({"virtual_pipeline": 2}, "virtual_pipeline > 1 needs parallel.pipeline > 1"),
        ({"world_size": 2, "pipeline": 2, "virtual_pipeline": 2, "micro": 8}, "interleaved"),
        ({"world_size": 2, "tensor": 2, "sequence_parallel": True, "seq_len": 33}, "seq_len"),
        ({"world_size": 2, "context": 2, "seq_len": 34}, "divisible by 2 x parallel.context = 4"),
        ({"world_size": 3, "context": 2}, "tensor 1 x pipeline 1 x context 2"),
        (
            {
                "world_size": 4,
                "context": 2,
                "tensor": 2,
                "sequence_parallel": True,
                "seq_len": 36,
            },
            "2 x parallel.context x parallel.tensor (sequence_parallel) = 8",
        ),
        ({"first_stage_layers": 1}, "needs parallel.pipeline > 1"),
        (
            {"world_size": 2, "pipeline": 2, "first_stage_layers": 4},
            "leaves 0 layers besides parallel.first_stage_layers = 4",
        ),
        (
            {"world_size": 3, "pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 3},
            "leaves 0 layers",
        ),
        (
            {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 1},
            "parallel.last_stage_layers = 1 is not divisible by parallel.virtual_pipeline = 2",
        ),
        (
            {"recompute": "full", "recompute_num_layers": 3},
            "a chunk of 4 layers is not divisible by parallel.recompute_num_layers = 3",
        ),
        (
            {"model": {"spec": "te", "fp8": "hybrid", "hidden_size": 36}},
            "model.hidden_size = 36 is not divisible by 16 (model.fp8)",
        ),
    ],
)
def test_a_misfit_is_named(arguments, expected):
    with pytest.raises(LayoutError) as error:
        check(**arguments)
    assert expected in str(error.value)


def test_stages_have_the_layers_that_megatron_core_builds():
    uneven = ParallelConfig(pipeline=4, first_stage_layers=1, last_stage_layers=3)
    assert stage_layers(14, uneven) == [1, 5, 5, 3]
    assert stage_layers(12, ParallelConfig(pipeline=4)) == [3, 3, 3, 3]
    assert stage_layers(5, ParallelConfig(pipeline=2, last_stage_layers=2)) == [3, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"overlap_param_gather": True}, "needs distributed_optimizer: true and overlap_grad"),
        ({"recompute_num_layers": 2}, "recompute_num_layers: only for recompute: full, not none"),
        ({"recompute": "selective", "recompute_method": "block"}, "only for recompute: full"),
        ({"recompute": "selective", "recompute_modules": []}, "name at least one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spec": "te", "norm_placement": "post"}, "set spec: local"),
        ({"fp8": "hybrid"}, "set spec: te"),
    ],
)
def test_a_model_that_transformer_engine_does_not_compute_is_refused(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        ModelConfig(**LLAMA, **settings)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_a_package_that_is_missing_is_named_with_its_remedy():
    with pytest.raises(MissingDependency, match=r"pip install 'transformer_engine\[pytorch\]'"):
        require_spec(ModelConfig(**LLAMA, spec="te"))
    with pytest.raises(ConfigError, match="build apex from its repository"):
        require_fusion(ParallelConfig(fuse_gradient_accumulation=True))


def test_an_online_teacher_needs_whole_sequences():
    with pytest.raises(LayoutError, match=r"objective\.target = teacher"):
        check(2, context=2, online_teacher=True)


def test_all_misfits_come_at_once():
    with pytest.raises(LayoutError) as error:
        check(world_size=9, tensor=3, pipeline=3, micro=3)
    message = str(error.value)
    assert "num_attention_heads" in message and "num_layers" in message and "batch" in message
