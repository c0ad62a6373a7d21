"""The learning rate of every update, against the written formula; a student that ends."""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref

import pytest
import torch

from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.layouts import GPT2, LLAMA, make_job, take_step


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


@pytest.mark.parametrize(
    ("style", "shape"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: 0.5 * (1 + math.cos(math.pi * share))),
        ("minus_sqrt", lambda share: 1 - math.sqrt(share)),
    ],
)
def test_the_rate_of_wsd_rises_stays_and_falls_as_the_style_says(style, shape):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    steps, warmup, decay, peak, least = 10, 3, 4, 3e-3, 1e-4
    optimizer = {
        "min_lr": least,
        "decay_style": "wsd",
        "wsd_decay_steps": decay,
        "wsd_decay_style": style,
    }
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, _ = make_job(
            LLAMA, ParallelConfig(), groups, kd=False, steps=steps, optimizer=optimizer
        )
    found = []
    for _ in range(steps):
        student.scheduler.step(increment=1)
        found.append(student.optimizer.param_groups[0]["lr"])
    rising = [peak * n / warmup for n in range(1, warmup + 1)]
    falling = [least + (peak - least) * shape(n / decay) for n in range(1, decay + 1)]
    assert found == pytest.approx(rising + [peak] * (steps - warmup - decay) + falling, rel=1e-9)


@pytest.mark.parametrize("decays", [True, False])
def test_norms_and_biases_never_decay_and_embeddings_as_asked(decays):
    from distill_pretrain.mcore.init.groups import multipliers
    from distill_pretrain.mcore.model.chunks import parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    optimizer = {"weight_decay": 0.3, "decay_embeddings": decays}
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, _ = make_job(
            GPT2, ParallelConfig(), groups, kd=False, steps=2, optimizer=optimizer
        )
    names = {id(p): name for name, p in parameters_by_name(student.chunks).items()}
    found = {
        names[id(parameter)]: group["weight_decay"]
        for group in student.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, weight_decay in found.items():
        is_vector = name.endswith(".bias") or "layernorm" in name
        is_plain = is_vector or ("embeddings" in name and not decays)
        assert weight_decay == (0.0 if is_plain else 0.3), name
    assert len(found) == len(names) and sum("embeddings" in name for name in found) == 2
    # The last pipeline stage has a tied embedding as its head.
    for tied in (True, False):
        model = ModelConfig(**{**GPT2, "tie_embeddings": tied})
        head = multipliers(model, "output_layer.weight", 2, decay_embeddings=decays)
        assert head.weight_decay == float(decays or not tied)


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ({}, {}),
        ({"distributed_optimizer": True}, {}),
        ({}, {"backend": "deepspeed", "zero_stage": 2}),
    ],
    ids=["plain", "distributed", "zero2"],  # of ZeRO-3 DeepSpeed itself keeps the parameters
)
def test_a_student_that_ends_gives_its_process_groups_and_threads_back(layout, optimizer):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    if optimizer:
        pytest.importorskip("deepspeed")
    torch.set_num_threads(1)
    parallel = ParallelConfig(**layout)

    def train() -> None:
        with model_parallel(parallel, seed=1) as groups:
            student, batches = make_job(
                LLAMA, parallel, groups, kd=False, steps=2, optimizer=optimizer
            )
            take_step(student, batches, 0)

    with process_group():
        threads = []
        for _ in range(2):  # what a first job leaves is there once
            with released_groups():
                train()
            threads.append(len(os.listdir("/proc/self/task")))
        assert threads[1] <= threads[0], threads


def test_an_engine_that_is_collected_after_the_process_group_has_ended_says_nothing(monkeypatch):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    pytest.importorskip("deepspeed")
    torch.set_num_threads(1)
    optimizer = {"backend": "deepspeed", "zero_stage": 2}
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, batches = make_job(
            LLAMA, ParallelConfig(), groups, kd=False, steps=2, optimizer=optimizer
        )
        take_step(student, batches, 0)
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    ended = weakref.ref(student)
    del student, batches
    gc.collect()
    assert ended() is None and said == []
