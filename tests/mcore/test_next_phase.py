"""A student that continues another has its weights and moments, and settings and a schedule of its own."""

from __future__ import annotations

from importlib.util import find_spec
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

DISTRIBUTED = {"distributed_optimizer": True}
COMPLETEP = {"init": "completep", "base_num_layers": 1, "base_hidden_size": 16}
CASES: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": {"tensor": 2}, "other": {"pipeline": 2}},
    "PP2 completep": {
        "parallel": {"pipeline": 2, **DISTRIBUTED},
        "other": {"tensor": 2, **DISTRIBUTED},
        "model": COMPLETEP,
    },
    "DP2 bf16": {
        "parallel": DISTRIBUTED,
        "other": {"tensor": 2, **DISTRIBUTED},
        "precision": "bf16",
        "optimizer": {"decay_embeddings": False},
    },
}
if find_spec("deepspeed") is not None:
    CASES["ZeRO-1"] = {
        "parallel": {},
        "other": {"tensor": 2},
        "optimizer": {"backend": "deepspeed"},
        "other backend": "megatron",
    }
CONSTANT = {"lr": 3e-3, "warmup_steps": 0, "decay_style": "constant"}
CHANGED = {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.3, "epsilon": 1e-6, "beta2": 0.9}
BEFORE, AFTER = 2, 2


def settings_of(student: Any) -> list[dict[str, Any]]:
    keys = ("lr", "weight_decay", "eps", "betas", "max_lr", "min_lr", "wd_mult")
    return [
        {
            key: list(value) if isinstance(value := g[key], tuple) else value
            for key in keys
            if key in g
        }
        for g in student.optimizer.param_groups
    ]


def go_on(student: Any, batches: Any) -> list[Any]:
    results = [take_step(student, batches, BEFORE + step) for step in range(AFTER)]
    return [[*r.terms.tolist(), r.grad_norm] for r in results]


def observe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import continue_student

    model = {**LLAMA, "num_layers": 2, "dropout": 0.1, **case.get("model", {})}
    found: dict[str, Any] = {}

    def job(groups: Any, parallel: ParallelConfig, optimizer: dict[str, Any], **more: Any) -> Any:
        own = {**case.get("optimizer", {}), **optimizer, **more}
        settings = {"kd": True, "steps": 9, "precision": case.get("precision", "fp32")}
        return make_job(model, parallel, groups, optimizer=own, **settings)

    if dist.get_rank() == 0:
        folder.mkdir()
    parallel = ParallelConfig(**case["parallel"])
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = job(groups, parallel, CONSTANT)
        for step in range(BEFORE):
            take_step(student, batches, step)
        save_student(student, folder)
        found["unbroken"] = go_on(student, batches)
    with released_groups(), model_parallel(parallel, seed=7) as groups:
        student, batches = job(groups, parallel, CONSTANT)
        continue_student(student, folder)
        found["continued"] = go_on(student, batches)
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = job(groups, parallel, CHANGED)
        fresh = settings_of(student)
        continue_student(student, folder)
        found["settings"] = settings_of(student) == fresh
        found["rates"] = [take_step(student, batches, step).learning_rate for step in range(3)]
    parallel = ParallelConfig(**case["other"])
    elsewhere = {"backend": case.get("other backend", "megatron")}
    model["dropout"] = 0.0
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = job(groups, parallel, CONSTANT, **elsewhere)
        continue_student(student, folder)
        found["elsewhere"] = go_on(student, batches)
    parallel = ParallelConfig(**case["parallel"])
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = job(groups, parallel, CONSTANT)
        continue_student(student, folder)
        found["without dropout"] = go_on(student, batches)
    return found


def observe_all(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with process_group():
        return {name: observe(case, Path(folder, name)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(observe_all, 2, folder=str(tmp_path_factory.mktemp("phase")))


@pytest.mark.parametrize("case", CASES)
def test_a_student_goes_on_with_its_own_settings(observed: dict[str, Any], case: str) -> None:
    found = observed[case]
    # Nothing changed: as if there were no seam, dropout included.
    assert found["continued"] == found["unbroken"]
    assert found["settings"]
    assert (
        found["rates"] == pytest.approx([5e-4, 1e-3, found["rates"][2]])
        and found["rates"][2] < 1e-3
    )
    tolerance = 1e-2 if "bf16" in case else 1e-5
    for step, expected in zip(found["elsewhere"], found["without dropout"], strict=True):
        assert step == pytest.approx(expected, rel=tolerance)
