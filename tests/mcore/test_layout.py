"""Layouts that do not fit are refused, all misfits in one message."""

from __future__ import annotations

import pytest

from distill_pretrain.errors import LayoutError
from distill_pretrain.mcore.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.layout import check_layout
from tests.support.layouts import LLAMA


def check(world_size=1, micro=2, batch=8, seq_len=32, model=None, **parallel):
    return check_layout(
        ModelConfig(**{**LLAMA, **(model or {})}),
        ParallelConfig(**parallel),
        world_size=world_size,
        micro_batch_size=micro,
        global_batch_size=batch,
        seq_len=seq_len,
    )


def test_a_fitting_layout_gives_its_data_parallel_size():
    assert check(8, tensor=2, pipeline=2) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"world_size": 3, "tensor": 3, "model": {"num_query_groups": 4, "ffn_hidden_size": 66}},
            "model.num_attention_heads = 4 is not divisible by parallel.tensor = 3",
        ),
        ({"world_size": 4, "tensor": 4}, "model.num_query_groups = 2 is not divisible by"),
        ({"world_size": 3, "pipeline": 3}, "model.num_layers = 4 is not divisible by"),
        ({"world_size": 3, "tensor": 2}, "3 processes, tensor 2 x pipeline 1"),
        ({"world_size": 1, "tensor": 2}, "expected: a multiple of 2 processes"),
        ({"world_size": 1, "micro": 3}, "train.global_batch_size = 8 is not divisible by"),
        ({"virtual_pipeline": 2}, "virtual_pipeline > 1 needs parallel.pipeline > 1"),
        ({"world_size": 2, "pipeline": 2, "virtual_pipeline": 2, "micro": 8}, "interleaved"),
        ({"world_size": 2, "tensor": 2, "sequence_parallel": True, "seq_len": 33}, "seq_len"),
    ],
)
def test_a_misfit_is_named(arguments, expected):
    with pytest.raises(LayoutError) as error:
        check(**arguments)
    assert expected in str(error.value)


def test_all_misfits_come_at_once():
    with pytest.raises(LayoutError) as error:
        check(world_size=9, tensor=3, pipeline=3, micro=3)
    message = str(error.value)
    assert "num_attention_heads" in message and "num_layers" in message and "batch" in message
