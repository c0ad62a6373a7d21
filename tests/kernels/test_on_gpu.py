"""The cases of the emulated kernels, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.cuda.backend import launcher_for
from distill_pretrain.kernels.sparse_kd import launch
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.stages import Loss
from distill_pretrain.kernels.teacher_sampling import SOURCE, DeviceColumns
from tests.kernels.sparse_kd_cases import (
    FORMS,
    LAYOUTS,
    SMALL,
    TEMPERATURES,
    Case,
    Result,
    check,
    expected_of,
    make_case,
    run,
)
from tests.kernels.test_chunked_head import case as head_case
from tests.kernels.test_sparse_kd_op import SETTINGS
from tests.kernels.test_sparse_kd_op import case as loss_case
from tests.kernels.test_teacher_sampling_cuda import SAMPLERS, hard_rows, require_same_samples

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GPU = torch.device("cuda", 0)


def to_gpu(parts):
    """A frozen dataclass with its tensors, and those of the dataclasses in it, on the GPU."""
    moved = {
        name: to_gpu(value) if hasattr(value, "__dataclass_fields__") else value.to(GPU)
        for name, value in vars(parts).items()
        if isinstance(value, torch.Tensor) or hasattr(value, "__dataclass_fields__")
    }
    return replace(parts, **moved)


def run_on_gpu(case: Case, layout: str, **options) -> Result:
    source = launch.CAPPED if case.logit_cap else launch.SOURCE
    result = run(launcher_for(source, GPU), to_gpu(case), layout, **options)
    return Result(**{name: value.cpu() for name, value in vars(result).items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_equals_the_dense_definition_in_every_layout(dtype, temperature, form):
    for seed, shape in enumerate(({}, {"vocab_size": 2603, "padded": 2608, "num_entries": 40})):
        case = make_case(form, temperature, dtype, seed=seed, **shape)
        expected = expected_of(case)
        for layout in LAYOUTS:
            if layout != "fused, a cluster" or shape:
                for blocks in (SMALL, launch.BLOCKS):
                    check(run_on_gpu(case, layout, blocks=blocks), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_logits_do_so_too(dtype, form):
    case = make_case(
        form, 2.5, dtype, seed=3, num_rows=4, vocab_size=2603, padded=2608, num_entries=40
    )
    case = replace(case, logit_cap=4.0)
    expected = expected_of(case)
    for layout in LAYOUTS:
        check(run_on_gpu(case, layout), expected)


@pytest.mark.parametrize("layout", ["one rank", "four ranks", "fused, a cluster"])
def test_rows_of_true_size(layout):
    case = make_case(
        "ghost",
        1.0,
        torch.bfloat16,
        num_rows=64,
        vocab_size=151_936,
        padded=152_064,
        num_entries=256,
    )
    result = run_on_gpu(case, layout, gap=0, start=0, blocks=launch.BLOCKS)
    check(result, expected_of(case), loss_error=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_operation_runs_the_kernels(name):
    logits, loss = loss_case(0, name)
    results = []
    for implementation in ("reference", "cuda"):
        z = logits.to(GPU).requires_grad_()
        chosen: Loss = replace(to_gpu(loss), backend=implementation)
        losses, terms = sparse_kd(z * 1, chosen)
        losses.sum().backward()
        results.append((losses.detach(), terms, z.grad))
    for some, others in zip(*results, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chunked_head_equals_the_one_on_the_cpu(dtype):
    hidden, weight, loss = head_case(0, dtype)
    results = []
    for device in ("cpu", GPU):
        inputs = [each.detach().to(device).requires_grad_() for each in (hidden, weight)]
        on_device = loss if device == "cpu" else replace(to_gpu(loss), backend="cuda")
        summed, terms = chunked_head(*inputs, on_device, chunk_tokens=6)
        summed.backward()
        results.append([each.float().cpu() for each in (summed, terms, *(i.grad for i in inputs))])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for some, others in zip(*results, strict=True):
        torch.testing.assert_close(some, others, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sampler_gives_the_bits_of_numpy(dtype):
    logits = hard_rows(11, 600, dtype)
    columns = DeviceColumns(logits.to(GPU), launcher_for(SOURCE, GPU))
    require_same_samples(columns, logits, SAMPLERS)
