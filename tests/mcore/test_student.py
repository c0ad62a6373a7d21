"""The learning rate of every update, against the written formula."""

from __future__ import annotations

import math

import pytest
import torch

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group
from tests.support.layouts import LLAMA, make_job, take_step


def test_update_n_runs_at_the_rate_of_n_finished_steps():
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    steps, warmup, peak = 8, 3, 3e-3
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, batches = make_job(LLAMA, ParallelConfig(), groups, kd=False, steps=steps)
        found = [take_step(student, batches, step).learning_rate for step in range(steps)]
    rising = [peak * n / warmup for n in range(1, warmup + 1)]
    falling = [
        peak * 0.5 * (1 + math.cos(math.pi * n / (steps - warmup)))
        for n in range(1, steps - warmup + 1)
    ]
    assert found == pytest.approx(rising + falling, rel=1e-6, abs=1e-12)
