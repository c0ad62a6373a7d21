"""One GPU trains the curves of the CPU: the compatibility layer does not change what is computed."""

from __future__ import annotations

import pytest

from tests.support.distributed import run_distributed
from tests.support.layouts import GPT2, LLAMA, run_cases

CASES = {
    f"{name}/{'kd' if kd else 'ce'}": {"model": model, "parallel": {}, "kd": kd, "steps": 20}
    for name, model in (("llama", LLAMA), ("gpt2", GPT2))
    for kd in (False, True)
}


@pytest.mark.gpu
def test_curves_on_a_gpu_equal_those_on_the_cpu():
    on_cpu = run_distributed(run_cases, 1, environment={"CUDA_VISIBLE_DEVICES": ""}, cases=CASES)
    on_gpu = run_distributed(run_cases, 1, cases=CASES)
    for name, curves in on_gpu.items():
        for term in ("loss", "ce", "kl", "grad_norm"):
            assert curves[term] == pytest.approx(on_cpu[name][term], abs=1e-3), (name, term)
