"""A finite loss whose gradient is infinite is a bad step under every optimizer."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from distill_pretrain.train.config import BadStepsConfig
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA
from tests.support.training import Fault, run_trainer

BAD, STEPS = 3, 4
MODEL = {**LLAMA, "num_layers": 1}
ZERO = {"backend": "deepspeed", "zero_stage": 1}
CASES: dict[str, dict[str, Any]] = {
    "megatron": {},
    "megatron bf16": {"precision": "bf16"},
    "distributed": {"parallel": ParallelConfig(distributed_optimizer=True)},
    "zero1": {"optimizer": ZERO},
    "zero1 bf16": {"optimizer": ZERO, "precision": "bf16"},
    "zero3 bf16": {"optimizer": {**ZERO, "zero_stage": 3}, "precision": "bf16"},
}


def as_before_0_19_8(student: Any) -> None:
    """ZeRO of older versions leaves the norm of the step before where a gradient overflows."""
    step, zero = student._engine.step, student._zero

    def stale() -> None:
        before = getattr(zero, "_global_grad_norm", 0.0)
        step()
        if getattr(zero, "overflow", False):
            zero._global_grad_norm = before

    student._engine.step = stale


def train(folder: str, names: list[str]) -> dict[str, Any]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    found = {}
    with process_group():
        for name in names:
            case = {"parallel": ParallelConfig(), **CASES[name]}
            with released_groups(), model_parallel(case["parallel"], seed=1) as groups:
                run = run_trainer(
                    Path(folder, name),
                    groups,
                    model=MODEL,
                    fault=Fault(at=BAD, factor=float("inf"), gradient=True),
                    on_student=as_before_0_19_8 if "zero" in name else None,
                    steps=STEPS,
                    bad_steps=BadStepsConfig(window=3),
                    **case,
                )
            lines = Path(folder, name, "metrics.jsonl").read_text().splitlines()
            weights = [p.isfinite().all().item() for p in run.model.parameters()]
            found[name] = {"said": run.said, "records": [*map(json.loads, lines)], "sound": weights}
    return found


def check(found: dict[str, Any]) -> None:
    for name, run in found.items():
        assert [r["applied"] for r in run["records"]] == [True, True, False, True], name
        assert all(r["loss"] is not None for r in run["records"]), name
        assert [r["grad_norm"] is None for r in run["records"]] == [False, False, True, False], name
        (warning,) = (line for line in run["said"] if "WARNING" in line)
        assert f"bad step {BAD}: the gradient norm is " in warning, name
        assert all(run["sound"]), name


def test_under_megatron_core(tmp_path):
    check(run_distributed(train, 1, folder=str(tmp_path), names=[n for n in CASES if "z" not in n]))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_under_deepspeed_of_any_version(tmp_path):
    check(run_distributed(train, 1, folder=str(tmp_path), names=[n for n in CASES if "z" in n]))
