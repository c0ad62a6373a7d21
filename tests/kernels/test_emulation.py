"""What the emulation of CUDA must not let pass."""

from __future__ import annotations

import ctypes

import pytest
import torch

from distill_pretrain.kernels.cuda.launcher import KernelSource
from tests.support.emulation import EmulationError, emulated

SOURCE = """
#include "emulate.h"
namespace trial {
struct Arguments { float* values; int size; };
// Each thread takes its neighbour's value.
template <bool SYNCHRONISES>
__global__ void rotate(const Arguments a) {
    SHARED_MEMORY(raw);
    float* shared = (float*)raw;
    const int thread = threadIdx.x;
    shared[thread] = a.values[thread];
    if (SYNCHRONISES) __syncthreads();
    a.values[thread] = shared[(thread + 1) % a.size];
}
__global__ void hang(const Arguments a) {
    if (threadIdx.x < 32) cluster_arrive(), cluster_wait();
    __syncthreads();
    if (threadIdx.x == 0) cluster_arrive(), cluster_wait();
}
__global__ void overrun(const Arguments a) {
    SHARED_MEMORY(raw);
    ((float*)raw)[threadIdx.x] = 0.0f;
}
__global__ void leave_early(const Arguments a) {
    if (threadIdx.x == 3) return;
    a.values[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}
// The last block of the cluster writes into the first one's memory.
template <bool WAITS>
__global__ void tell(const Arguments a) {
    SHARED_MEMORY(raw);
    float* told = (float*)raw;
    if (WAITS) { cluster_arrive(); cluster_wait(); }
    *map_shared(told, 1 - cluster_rank()) = float(cluster_rank());
    cluster_arrive();
    cluster_wait();
    a.values[blockIdx.x] = *told;
}
__global__ void round(const Arguments a) {
    const float value = a.values[threadIdx.x];
    a.values[threadIdx.x] = fp16_value(fp16_bits(value));
}
}
"""


class Arguments(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("size", ctypes.c_int))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "trial").mkdir()
    (folder / "trial/trial.cuh").write_text(SOURCE)
    return folder


def launch(folder, kernel, values, *, schedule=0, arguments=None, **shape):
    kernels = ("rotate<true>", "rotate<false>", "hang", "overrun", "leave_early", "tell<true>")
    kernels = (*kernels, "tell<false>", "round")
    source = KernelSource(
        folder="trial", entry="trial.cuh", kernels=tuple(f"trial::{name}" for name in kernels)
    )
    launcher = emulated(source, schedule=schedule, folder=folder)
    arguments = arguments or Arguments(values.data_ptr(), len(values))
    launcher.launch(f"trial::{kernel}", arguments, **{"grid": (1, 1), "block": 64, **shape})
    return values


@pytest.mark.parametrize("schedule", range(4))
def test_a_missing_barrier_shows_and_a_right_one_does_not(folder, schedule):
    values = torch.arange(64.0)
    right = launch(folder, "rotate<true>", values.clone(), schedule=schedule, shared_bytes=256)
    assert torch.equal(right, values.roll(-1))
    wrong = launch(folder, "rotate<false>", values.clone(), schedule=schedule, shared_bytes=256)
    assert not torch.equal(wrong, values.roll(-1))


def test_a_block_that_has_not_started_forgets_what_it_was_told(folder):
    values = torch.zeros(2)
    for schedule in range(6):
        launch(
            folder, "tell<true>", values, schedule=schedule, grid=(2, 1), cluster=2, shared_bytes=4
        )
        assert values.tolist() == [1.0, 0.0]
    launch(folder, "tell<false>", values, schedule=1, grid=(2, 1), cluster=2, shared_bytes=4)
    assert values.isnan().any()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("hang", "deadlock: 64 threads"),
        ("overrun", "past the end of shared memory"),
        ("leave_early", "lanes of the warp returned"),
    ],
)
def test_what_a_gpu_would_not_survive_is_an_error_and_the_next_launch_is_well(
    folder, kernel, reason
):
    with pytest.raises(EmulationError, match=reason):
        launch(folder, kernel, torch.zeros(64))
    values = torch.arange(64.0)
    assert torch.equal(
        launch(folder, "rotate<true>", values.clone(), shared_bytes=256), values.roll(-1)
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"block": 1025},
        {"grid": (3, 1), "cluster": 2},
        {"grid": (1, 70_000)},
        {"shared_bytes": 1 << 20},
    ],
)
def test_launches_that_no_gpu_makes_are_refused(folder, shape):
    with pytest.raises(EmulationError, match="no GPU launches"):
        launch(folder, "round", torch.zeros(64), **shape)


def test_arguments_of_another_size_are_refused(folder):
    class Short(ctypes.Structure):
        _fields_ = (("values", ctypes.c_void_p),)

    with pytest.raises(EmulationError, match="takes 16 bytes of arguments, given 8"):
        launch(folder, "round", torch.zeros(64), arguments=Short())


def test_half_precision_rounds_as_torch_does(folder):
    g = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (1024,), generator=g).float()
    values = torch.randn(1024, generator=g) * exponents.exp2()
    values[:8] = torch.tensor([0.0, 65504.0, 65519.9, 65520.0, -1e9, 2**-24, 2**-25, 3 * 2**-26])
    rounded = launch(folder, "round", values.clone(), block=1024)
    assert torch.equal(rounded, values.half().float())
