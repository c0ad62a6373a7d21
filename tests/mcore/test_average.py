"""The moving average of weights: right under every layout, saved with the student, exact after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from distill_pretrain.mcore.model.config import OptimizerConfig, ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import GPT2, LLAMA, make_job, take_step

DECAY, SAVED_AT, STEPS = 0.6, 2, 5
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CASES: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": {"tensor": 2}},
    "PP2 tied": {"parallel": {"pipeline": 2}, "model": GPT2},
    "DP2": {"parallel": {}},
    "DP2 distributed": {"parallel": {"distributed_optimizer": True}},
    "DP2 bf16": {"parallel": {}, "precision": "bf16"},
    "DP2 bf16 distributed": {
        "parallel": {"distributed_optimizer": True, **OVERLAPPED},
        "precision": "bf16",
    },
}


def averages(student: Any) -> list[torch.Tensor]:
    return [student.average.whole(p).clone() for p in student.weight_entries()]


def weights(student: Any) -> list[torch.Tensor]:
    """The weights that the average is taken of, whole, where this rank has them."""
    masters = (getattr(p, "main_param", None) for p in student.weight_entries())
    return [
        (p if master is None else master).detach().double().clone()
        for p, master in zip(student.weight_entries(), masters, strict=True)
    ]


def go_on(student: Any, batches: Any, steps: range, *, evaluating: bool) -> list[Any]:
    curve = []
    for step in steps:
        curve.append((*(r := take_step(student, batches, step)).terms.tolist(), r.grad_norm))
        student.average.update(step + 1)
        if evaluating:
            evaluate(student, batches)
    return curve


def evaluate(student: Any, batches: Any) -> list[float]:
    """The loss of the average."""
    with student.average.in_place():
        read = batches.step_batches(9, with_targets=student.is_last_stage)
        sums, _ = student.evaluate([iter(read) for _ in student.chunks])
    return sums.tolist()


def observe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    parallel = ParallelConfig(**case["parallel"])
    model, found = {**case.get("model", LLAMA), "num_layers": 2}, {}
    settings: dict[str, Any] = {"kd": True, "steps": STEPS, "optimizer": {"ema_decay": DECAY}}
    settings["precision"] = case.get("precision", "fp32")
    if dist.get_rank() == 0:
        folder.mkdir()
    with released_groups(), model_parallel(parallel, seed=1) as groups:
        student, batches = make_job(model, parallel, groups, **settings)
        whole = not (parallel.distributed_optimizer and settings["precision"] == "bf16")
        expected, errors = weights(student), [0.0]
        for step in range(SAVED_AT):
            go_on(student, batches, range(step, step + 1), evaluating=False)
            share = 1 - min(DECAY, (2 + step) / (11 + step))
            if whole:
                for mean, now in zip(expected, weights(student), strict=True):
                    mean.lerp_(now, share)
                pairs = zip(averages(student), expected, strict=True)
                errors += [(a.double() - e).abs().max().item() for a, e in pairs]
        found["error"] = max(errors)
        save_student(student, folder)
        found["curve"] = go_on(student, batches, range(SAVED_AT, STEPS), evaluating=False)
        kept, found["loss"] = averages(student), evaluate(student, batches)
        student, batches = make_job(model, parallel, groups, **settings)
        load_student(student, folder)
        # The average's own evaluations leave the run what it is.
        found["resumed"] = go_on(student, batches, range(SAVED_AT, STEPS), evaluating=True)
        found["same"] = all(map(torch.equal, averages(student), kept))
        found["moved"] = (
            max(
                (a.double() - w).abs().max().item()
                for a, w in zip(kept, weights(student), strict=True)
                if a.shape == w.shape
            )
            if whole
            else None
        )
        with torch.no_grad():
            for parameter, average in zip(student.weight_entries(), kept, strict=True):
                parameter.copy_(average)
        read = batches.step_batches(9, with_targets=student.is_last_stage)
        sums, _ = student.evaluate([iter(read) for _ in student.chunks])
        found["loss of its weights"] = sums.tolist()
    sharing = {"distributed_optimizer": parallel.distributed_optimizer}
    elsewhere = ParallelConfig(**{"pipeline" if parallel.tensor > 1 else "tensor": 2}, **sharing)
    with released_groups(), model_parallel(elsewhere, seed=1) as groups:
        student, batches = make_job(model, elsewhere, groups, **settings)
        load_student(student, folder)
        go_on(student, batches, range(SAVED_AT, STEPS), evaluating=False)
        found["loss elsewhere"] = evaluate(student, batches)
    return found


def observe_all(folder: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with process_group():
        found = {name: observe(case, Path(folder, name)) for name, case in CASES.items()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
    return ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(observe_all, 2, folder=str(tmp_path_factory.mktemp("average")))


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_the_weights_and_goes_on_where_it_was(ranks, case):
    for rank, found in enumerate(of[case] for of in ranks):
        assert found["error"] < 1e-6, rank
        assert found["moved"] is None or found["moved"] > 1e-4
        assert found["same"] and found["resumed"] == found["curve"], rank
        assert found["loss"] == found["loss of its weights"], rank
        tolerance = 2e-2 if "bf16" in case else 1e-5
        assert found["loss elsewhere"] == pytest.approx(found["loss"], rel=tolerance)


def test_shared_out_masters_are_averaged_as_whole_ones(ranks):
    plain, shared = ranks[0]["DP2 bf16"], ranks[0]["DP2 bf16 distributed"]
    assert shared["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_what_deepspeed_shards_is_not_averaged():
    with pytest.raises(ValidationError, match="ema_decay: only for backend: megatron"):
        OptimizerConfig(backend="deepspeed", ema_decay=0.9)
