"""Every parallel layout trains the same curves as one process, from the same initial weights."""

from __future__ import annotations

import pytest

from tests.support.distributed import run_distributed
from tests.support.layouts import GPT2, LLAMA, run_cases

STEPS = 20
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
# The loss with targets holds the plain one; each architecture has features the other lacks.
TRAINED = {"llama/kd": (LLAMA, True), "gpt2/ce": (GPT2, False)}


def cases(layouts, **more):
    return {
        f"{layout}/{name}": {
            "model": model,
            "parallel": parallel,
            "kd": kd,
            "steps": STEPS,
            **more,
        }
        for layout, parallel in layouts.items()
        for name, (model, kd) in TRAINED.items()
    }


@pytest.fixture(scope="module")
def one_process():
    return run_cases(cases(ONE_PROCESS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "layouts"), [(2, TWO_PROCESSES), (4, FOUR_PROCESSES)], ids=["2", "4"]
)
def test_curves_equal_one_process(one_process, num_processes, layouts):
    found = run_distributed(run_cases, num_processes, cases=cases(layouts))
    worst = {}
    for name, curves in found.items():
        reference = one_process["one" + name[name.index("/") :]]
        assert reference["loss"][-1] < reference["loss"][0] - 0.3, "the reference does not learn"
        worst[name] = max(
            abs(a - b)
            for term in ("loss", "ce", "kl", "grad_norm")
            for a, b in zip(curves[term], reference[term], strict=True)
        )
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
def test_bf16_learns_like_fp32(one_process):
    arguments = {"model": LLAMA, "parallel": {}, "kd": True, "steps": STEPS}
    curves = run_cases({"bf16": {**arguments, "precision": "bf16"}})["bf16"]
    reference = one_process["one/llama/kd"]
    errors = [abs(a - b) for a, b in zip(curves["loss"], reference["loss"], strict=True)]
    assert 0 < max(errors) < 0.03
