"""HybridModel in the place of GPTModel: the same weights, the same curve to the last bit, the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import require_implementation
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import (
    GPT2,
    LLAMA,
    SEQ_LEN,
    VOCAB_SIZE,
    make_job,
    run_cases,
    take_step,
    train_curves,
)

SMALL = {**LLAMA, "num_layers": 2}
DROPOUT = {**SMALL, "dropout": 0.2}
CLASSES = ("gpt", "hybrid")
STEPS = 3
SCALED_ROPE = {
    **SMALL,
    "rotary_base": 1000000,
    "rope_scaling_factor": 8.0,
    "rotary_fraction": 0.5,
}

OLMO3 = {
    **SMALL,
    "norm_placement": "reordered",
    "qk_norm_whole": True,
    "attention_layers": "wf",
    "sliding_window": 7,
    "yarn": {"factor": 4.0, "original_positions": 8, "full_layers_only": True},
}
SMOLLM3 = {**SMALL, "attention_layers": "fn", "mlp_bias": True, "attention_output_bias": True}

ALONE: dict[str, dict[str, Any]] = {
    "llama": {"model": SMALL, "kd": True},
    "chunked head": {"model": SMALL, "kd": True, "chunk_tokens": 24},
    "llama 3's rope, tied": {"model": {**SCALED_ROPE, "tie_embeddings": True}},
    "qwen's biases and norms": {"model": {**SMALL, "qkv_bias": True, "qk_norm": True}},
    "gpt2": {"model": {**GPT2, "num_layers": 2}},
    "deepscale": {"model": {**SMALL, "init": "deepscale"}},
    "completep": {"model": {**SMALL, "init": "completep", "base_hidden_size": 16}},
    "deepnorm": {"model": {**SMALL, "init": "deepnorm", "norm_placement": "post"}},
    "bf16": {"model": SMALL, "precision": "bf16"},
    "olmo 3": {"model": OLMO3},
    "smollm3": {"model": SMOLLM3},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "tp2": {"model": DROPOUT, "parallel": {"tensor": 2}},
    "tp2+sequence": {"model": DROPOUT, "parallel": {"tensor": 2, "sequence_parallel": True}},
    "tp2+sequence+chunked head": {
        "model": SMALL,
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "kd": True,
        "chunk_tokens": 24,
    },
    "pp2, tied": {"model": {**DROPOUT, "tie_embeddings": True}, "parallel": {"pipeline": 2}},
    "uneven interleaved pp2": {
        "model": {**LLAMA, "num_layers": 6, "init": "deepscale"},
        "parallel": {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2},
        "kd": True,
    },
    "uneven pp2+recompute": {
        "model": {**DROPOUT, "num_layers": 3},
        "parallel": {"pipeline": 2, "first_stage_layers": 1, "recompute": "full"},
    },
    "cp2+recompute": {
        "model": SMALL,
        "parallel": {
            "context": 2,
            "recompute": "selective",
            "recompute_modules": ["core_attn", "mlp"],
        },
    },
    "dp2+distributed optimizer": {"model": DROPOUT, "parallel": {"distributed_optimizer": True}},
}
SAVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2": ({"init": "completep", "base_hidden_size": 16}, {"tensor": 2}),
    "pp2, tied": ({"tie_embeddings": True}, {"pipeline": 2}),
    "interleaved pp2": ({"num_layers": 4}, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2+distributed optimizer": ({}, {"distributed_optimizer": True}),
}


def both(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every case under either class, as `run_cases` takes them."""
    return {
        f"{name}/{which}": {
            "parallel": {},
            "kd": False,
            "steps": STEPS,
            **case,
            "model": {**case["model"], "implementation": which},
        }
        for name, case in cases.items()
        for which in CLASSES
    }


def has_hybrid() -> bool:
    """Whether this megatron-core is new enough."""
    try:
        require_implementation(ModelConfig(**LLAMA, implementation="hybrid"))
    except ConfigError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not has_hybrid(), reason="HybridModel needs megatron-core 0.19 or later, and so Python 3.12"
)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, list[float]]]:
    unscaled = {"unscaled": {"model": {**SCALED_ROPE, "rope_scaling_factor": None}}}
    scaled = {"scaled": {"model": SCALED_ROPE}}
    return run_cases(both({**ALONE, **unscaled, **scaled}))


@pytest.mark.parametrize("case", ALONE)
def test_one_process_trains_to_the_same_curve(alone: dict[str, Any], case: str) -> None:
    assert alone[f"{case}/hybrid"] == alone[f"{case}/gpt"]


def test_scaled_rope_is_another_model(alone: dict[str, Any]) -> None:
    assert alone["scaled/hybrid"] == alone["scaled/gpt"]
    assert alone["scaled/hybrid"] != alone["unscaled/hybrid"]


def test_the_class_is_the_one_asked_for_and_its_parameters_and_signal_are_the_same() -> None:
    from distill_pretrain.mcore.init.signal import measure
    from distill_pretrain.mcore.model.chunks import build_model_chunks, parameters_by_name, unwrap
    from distill_pretrain.mcore.runtime.core import GPTModel
    from distill_pretrain.mcore.runtime.hybrid_core import HybridModel, HybridStack
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        found = {}
        for which in CLASSES:
            model = ModelConfig(**LLAMA, init="deepscale", implementation=which)
            student, batches = make_job(
                model.model_dump(), ParallelConfig(), groups, kd=True, steps=1
            )
            chunks = build_model_chunks(
                model,
                ParallelConfig(),
                vocab_size=VOCAB_SIZE,
                seq_len=SEQ_LEN,
                precision="fp32",
                seed=5,
                loss_function=unwrap(student.chunks[0]).loss_function,
            )
            batch = batches.step_batches(0, with_targets=True)[0]
            found[which] = (unwrap(chunks[0]), parameters_by_name(chunks))
            signal = measure(chunks, model, batch)
            found[which] += (vars(signal),)
    gpt, hybrid = found["gpt"], found["hybrid"]
    assert isinstance(gpt[0], GPTModel) and not isinstance(gpt[0], HybridModel)
    assert isinstance(hybrid[0], HybridModel) and not isinstance(hybrid[0], GPTModel)
    assert isinstance(hybrid[0].decoder, HybridStack)
    assert list(gpt[1]) == list(hybrid[1])
    assert all(torch.equal(gpt[1][name], hybrid[1][name]) for name in gpt[1])
    assert all((gpt[2][name] == hybrid[2][name]).all() for name in gpt[2])


def go_on(student: Any, batches: Any) -> list[Any]:
    """The curve from the second step on, and the sums of the weights at its end."""
    results = [take_step(student, batches, step) for step in range(1, STEPS)]
    weights = [p.detach().double().sum().item() for c in student.chunks for p in c.parameters()]
    return [[[*r.terms.tolist(), r.grad_norm, r.learning_rate] for r in results], weights]


def interchanged(folder: Path, settings: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """A step under each class, saved; on from there under itself unbroken, and under the other."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    parallel = ParallelConfig(**layout)
    found: dict[str, Any] = {}
    for which, other in (CLASSES, CLASSES[::-1]):
        if dist.get_rank() == 0:
            (folder / which).mkdir(parents=True)
        with released_groups(), model_parallel(parallel, seed=1) as groups:
            jobs = [
                make_job(
                    {**DROPOUT, **settings, "implementation": implementation},
                    parallel,
                    groups,
                    kd=True,
                    steps=STEPS,
                )
                for implementation in (which, other)
            ]
            take_step(*jobs[0], 0)
            save_student(jobs[0][0], folder / which)
            unbroken = go_on(*jobs[0])
            streams_restored = load_student(jobs[1][0], folder / which)
            found[f"{which} to {other}"] = [streams_restored, unbroken, go_on(*jobs[1])]
    return found


def hidden_states() -> list[Any]:
    """What a teacher over two stages gives the head of, under either class."""
    from distill_pretrain.mcore.model.chunks import build_model_chunks
    from distill_pretrain.mcore.model.forward import ForwardOnly
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    parallel, found = ParallelConfig(pipeline=2), []
    for which in CLASSES:
        with released_groups(), model_parallel(parallel, seed=1):
            chunks = build_model_chunks(
                ModelConfig(**LLAMA, implementation=which),
                parallel,
                vocab_size=VOCAB_SIZE,
                seq_len=SEQ_LEN,
                precision="fp32",
                seed=5,
            )
            hidden = ForwardOnly(chunks[0]).hidden(torch.arange(4 * SEQ_LEN).view(4, -1) % 99)
            found.append(None if hidden is None else hidden.flatten().tolist())
    return found


def two_ranks(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """The curves of every case; what every rank found of checkpoints, and of hidden states."""
    torch.set_num_threads(1)
    with process_group():
        curves = {name: train_curves(**case) for name, case in cases.items()}
        own = {
            name: interchanged(Path(folder, f"{number}"), settings, layout)
            for number, (name, (settings, layout)) in enumerate(SAVED.items())
        }
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (own, hidden_states()))
    return {"curves": curves, "ranks": ranks}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("hybrid"))
    return run_distributed(two_ranks, 2, folder=folder, cases=both(TOGETHER))


@pytest.mark.parametrize("case", TOGETHER)
def test_two_processes_train_to_the_same_curve(together: dict[str, Any], case: str) -> None:
    curves = together["curves"]
    assert curves[f"{case}/hybrid"] == curves[f"{case}/gpt"]


@pytest.mark.parametrize("direction", ["gpt to hybrid", "hybrid to gpt"])
@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_of_either_goes_on_in_the_other(
    together: dict[str, Any], case: str, direction: str
) -> None:
    for rank, (found, _) in enumerate(together["ranks"]):
        streams_restored, unbroken, resumed = found[case][direction]
        assert streams_restored and resumed == unbroken, f"rank {rank}"


def test_a_model_over_two_stages_scores_the_same(together: dict[str, Any]) -> None:
    (first, last) = (hidden for _, hidden in together["ranks"])
    assert first == [None, None]
    assert last[0] == last[1] and any(last[0])
