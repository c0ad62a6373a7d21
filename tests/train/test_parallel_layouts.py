"""Every parallel layout trains the same curves as one process, from the same initial weights."""

from __future__ import annotations

import pytest

from tests.support.distributed import run_distributed
from tests.support.layouts import GPT2, LLAMA, run_cases

STEPS, FEW = 20, 4
TOLERANCE = 1e-5  # asked for: 1e-4; measured: 3e-7
ONE_PROCESS = {"one": {}}
TWO_PROCESSES = {
    "tp2": {"tensor": 2},
    "tp2+sequence": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "interleaved pp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2+distributed optimizer": {"distributed_optimizer": True},
}
FOUR_PROCESSES = {"tp2 x pp2": {"tensor": 2, "pipeline": 2}}
# A wrong layout shows in the first updates; these differ in what the layouts above do not have.
FEW_STEPS = {
    2: {
        "cp2": {"context": 2},
        "cp2+distributed optimizer+overlap+recompute": {
            "context": 2,
            "distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "recompute": "selective",
            "recompute_modules": ["core_attn", "mlp"],
        },
        "uneven pp2+recompute": {"pipeline": 2, "first_stage_layers": 1, "recompute": "full"},
    },
    4: {
        "cp2 x tp2+recompute": {
            "context": 2,
            "tensor": 2,
            "sequence_parallel": True,
            "recompute": "full",
            "recompute_method": "block",
        },
        "cp2 x pp2": {"context": 2, "pipeline": 2, "last_stage_layers": 1},
        "cp4": {"context": 4},
    },
}
SIX_LAYERS = {**LLAMA, "num_layers": 6}
UNEVEN_CHUNKS = {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}
# The loss with targets holds the plain one; each architecture has features the other lacks.
TRAINED = {"llama/kd": (LLAMA, True), "gpt2/ce": (GPT2, False)}


def cases(layouts, steps=STEPS):
    return {
        f"{layout}/{name}": {
            "model": model,
            "parallel": parallel,
            "kd": kd,
            "steps": steps,
            "optimizer": {"decay_steps": STEPS},
        }
        for layout, parallel in layouts.items()
        for name, (model, kd) in TRAINED.items()
    }


def six_layers(name, parallel):
    return {f"{name}/six": {"model": SIX_LAYERS, "parallel": parallel, "kd": True, "steps": FEW}}


def chunked_heads():
    """LM heads that make the logits of 24 of a micro-batch's 64 tokens at a time."""
    names = ("tp2", "tp2+sequence", "pp2")
    layouts = {f"{name}+chunked head": TWO_PROCESSES[name] for name in names}
    return {name: {**case, "chunk_tokens": 24} for name, case in cases(layouts, FEW).items()}


@pytest.fixture(scope="module")
def one_process():
    return run_cases({**cases(ONE_PROCESS), **six_layers("one", {})})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "layouts"),
    [(2, TWO_PROCESSES), (4, FOUR_PROCESSES)],
    ids=["2", "4"],
)
def test_curves_equal_one_process(one_process, num_processes, layouts):
    asked = {**cases(layouts), **cases(FEW_STEPS[num_processes], FEW)}
    if num_processes == 2:
        asked |= six_layers("uneven interleaved pp2", UNEVEN_CHUNKS)
        asked |= chunked_heads()
    found = run_distributed(run_cases, num_processes, cases=asked)
    worst = {}
    for name, curves in found.items():
        reference = one_process["one" + name[name.index("/") :]]
        fall = 0.3 if len(reference["loss"]) == STEPS else 0.05
        assert reference["loss"][-1] < reference["loss"][0] - fall, "the reference does not learn"
        worst[name] = max(
            abs(a - b)
            for term in ("loss", "ce", "kl", "grad_norm")
            for a, b in zip(curves[term], reference[term], strict=False)
        )
    assert max(worst.values()) < TOLERANCE, worst


def test_recomputed_layers_drop_what_they_dropped_before():
    layouts = {
        "none": {},
        "full": {"recompute": "full", "recompute_num_layers": 2},
        "selective": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    }
    model = {**GPT2, "dropout": 0.2}
    found = run_cases(
        {
            name: {"model": model, "parallel": parallel, "kd": False, "steps": 2}
            for name, parallel in layouts.items()
        }
    )
    for kind in ("full", "selective"):
        for term in ("loss", "grad_norm"):
            assert found[kind][term] == pytest.approx(found["none"][term], abs=1e-6)
    without = {"model": GPT2, "parallel": {}, "kd": False, "steps": 2}
    assert run_cases({"dry": without})["dry"]["loss"] != found["none"]["loss"]


@pytest.mark.slow
def test_bf16_learns_like_fp32(one_process):
    arguments = {"model": LLAMA, "parallel": {}, "kd": True, "steps": STEPS}
    curves = run_cases({"bf16": {**arguments, "precision": "bf16"}})["bf16"]
    reference = one_process["one/llama/kd"]
    errors = [abs(a - b) for a, b in zip(curves["loss"], reference["loss"], strict=True)]
    assert 0 < max(errors) < 0.03
