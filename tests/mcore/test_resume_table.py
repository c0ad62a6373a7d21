"""A resumed run is the unbroken run, bit for bit, for every initialisation, layout and optimizer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, make_job, take_step

INITS: dict[str, dict[str, Any]] = {
    "megatron": {"init": "megatron"},
    "xavier": {"init": "xavier"},
    "fan_in": {"init": "fan_in"},
    "deepscale": {"init": "deepscale"},
    # Layers, head and final norm in groups of their own: the first stage has no parameter of two of them.
    "completep": {"init": "completep", "base_num_layers": 1, "base_hidden_size": 16},
    "deepnorm": {"init": "deepnorm", "norm_placement": "post"},
}
LAYOUTS = {"PP2": {"pipeline": 2}, "TP2": {"tensor": 2}, "DP2": {}}
OPTIMIZERS = {"plain": False, "distributed": True}
CASES = list(itertools.product(INITS, LAYOUTS, OPTIMIZERS))
SAVED_AT, STEPS = 1, 3


def groups_of(student: Any) -> list[tuple[float, ...]]:
    """Rate, decay and step count of every parameter group with a parameter on this rank."""
    keys = ("lr", "weight_decay", "eps", "step")
    return [tuple(g[k] for k in keys) for g in student.optimizer.param_groups if g["params"]]


def take_steps(student: Any, batches: Any, start: int) -> dict[str, Any]:
    results = [take_step(student, batches, step) for step in range(start, STEPS)]
    weights = torch.cat([p.detach().flatten() for p in student.chunks[0].parameters()])
    return {
        "curve": [(*r.terms.tolist(), r.grad_norm, r.learning_rate) for r in results],
        "groups": groups_of(student),
        "weights": weights.double().sum().item(),
    }


def resume(case: tuple[str, str, str], folder: Path) -> dict[str, Any]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    init, layout, optimizer = case
    model = {**LLAMA, "num_layers": 2, **INITS[init]}
    parallel = ParallelConfig(**LAYOUTS[layout], distributed_optimizer=OPTIMIZERS[optimizer])
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        folder.mkdir()
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = make_job(model, parallel, groups, kd=True, steps=STEPS)
        for step in range(SAVED_AT):
            take_step(student, batches, step)
        save_student(student, folder)
        found["unbroken"] = take_steps(student, batches, SAVED_AT)
        student, batches = make_job(model, parallel, groups, kd=True, steps=STEPS)
        load_student(student, folder)
        found["resumed"] = take_steps(student, batches, SAVED_AT)
    return found


def resume_all(folder: str) -> list[dict[str, dict[str, Any]]]:
    """What every rank found in every case."""
    torch.set_num_threads(1)
    with process_group():
        found = {"/".join(case): resume(case, Path(folder, "-".join(case))) for case in CASES}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
    return ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(resume_all, 2, folder=str(tmp_path_factory.mktemp("resume")))


@pytest.mark.parametrize("case", ["/".join(case) for case in CASES])
def test_a_resumed_run_is_the_unbroken_one(ranks: list[dict[str, Any]], case: str) -> None:
    for rank, found in enumerate(ranks):
        unbroken, resumed = found[case]["unbroken"], found[case]["resumed"]
        assert resumed == unbroken, f"rank {rank}"
        assert unbroken["groups"] and all(group[-1] == STEPS for group in unbroken["groups"])
