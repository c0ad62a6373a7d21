"""Saved state: random streams follow the layout, optimizer state survives any; ranks that must agree do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, make_job, take_step

# Its norms of queries and keys are shared out among tensor-parallel ranks.
OLMO = {**LLAMA, "qk_norm_whole": True, "norm_placement": "reordered"}
DROPOUT = {**LLAMA, "dropout": 0.2}


def change_layout(folder: str) -> dict[str, Any]:
    """Two steps under PP2, saved; on under PP2 again, and under TP2."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    pipeline, tensor = ParallelConfig(pipeline=2), ParallelConfig(tensor=2)
    with process_group():
        with released_groups(), model_parallel(pipeline, seed=1) as groups:
            student, batches = make_job(DROPOUT, pipeline, groups, kd=True, steps=8)
            take_step(student, batches, 0)
            save_student(student, Path(folder))
            found["unbroken"] = take_step(student, batches, 1).terms.tolist()
            helpers = psutil.Process().children(recursive=True)
            found["helpers"] = [h.name() for h in helpers if h.pid not in before]
        dist.barrier()
        with released_groups(), model_parallel(pipeline, seed=99) as groups:
            student, batches = make_job(DROPOUT, pipeline, groups, kd=True, steps=8)
            found["restored"] = load_student(student, Path(folder))
            found["resumed"] = take_step(student, batches, 1).terms.tolist()
        with released_groups(), model_parallel(tensor, seed=1) as groups:
            student, batches = make_job(DROPOUT, tensor, groups, kd=True, steps=8)
            found["restored elsewhere"] = load_student(student, Path(folder))
            for step in (1, 2):
                take_step(student, batches, step)
            norms = torch.cat(
                [p.flatten() for n, p in student.chunks[0].named_parameters() if "layernorm" in n]
            ).detach()
            others = [torch.empty_like(norms) for _ in range(2)]
            dist.all_gather(others, norms, group=groups.tensor)
            found["replicated weights differ by"] = (others[0] - others[1]).abs().max().item()
            found["norms moved by"] = (norms - 1).abs().max().item()
    return found


def test_streams_follow_the_layout(tmp_path):
    found = run_distributed(change_layout, 2, folder=str(tmp_path))
    # One would die of the signals that end a process group, before the job's last save, or outlive a killed job.
    assert found["helpers"] == []
    assert found["restored"] is True
    assert found["resumed"] == found["unbroken"]
    assert found["restored elsewhere"] is False
    assert found["norms moved by"] > 1e-4
    assert found["replicated weights differ by"] == 0.0


def resume_distributed_optimizer(folder: str) -> dict[str, Any]:
    """Two steps under DP2, saved; on from there under DP2, under CP2, and from what CP2 saves at once under TP2.

    All with the distributed optimizer.
    """
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    data = ParallelConfig(
        distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    context = ParallelConfig(distributed_optimizer=True, context=2)
    tensor = ParallelConfig(distributed_optimizer=True, tensor=2)
    with process_group():
        with released_groups(), model_parallel(data, seed=1) as groups:
            student, batches = make_job(OLMO, data, groups, kd=True, steps=8)
            for step in (0, 1):
                take_step(student, batches, step)
            save_student(student, Path(folder))
            found["unbroken"] = [take_step(student, batches, s).terms.tolist() for s in (2, 3, 4)]
        dist.barrier()
        of_context = Path(folder, "cp2")
        if dist.get_rank() == 0:
            of_context.mkdir()
        for name, layout, source in (
            ("same", data, Path(folder)),
            ("cp2", context, Path(folder)),
            ("tp2", tensor, of_context),
        ):
            with released_groups(), model_parallel(layout, seed=1) as groups:
                student, batches = make_job(OLMO, layout, groups, kd=True, steps=8)
                load_student(student, source)
                if name == "cp2":
                    save_student(student, of_context)
                found[name] = [take_step(student, batches, s).terms.tolist() for s in (2, 3, 4)]
    return found


def test_the_distributed_optimizers_state_is_restored_under_any_layout(tmp_path):
    found = run_distributed(resume_distributed_optimizer, 2, folder=str(tmp_path))
    assert found["same"] == found["unbroken"]
    for layout in ("cp2", "tp2"):
        for resumed, expected in zip(found[layout], found["unbroken"], strict=True):
            assert resumed == pytest.approx(expected, abs=2e-6)


def attention_outputs() -> list[list[float]]:
    """What attention with dropout makes of the same inputs, per tensor-parallel rank."""
    from distill_pretrain.mcore.model.modules import SDPAttention
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    layout = ParallelConfig(tensor=2)
    with process_group(), model_parallel(layout, seed=1) as groups:
        student, _ = make_job({**LLAMA, "dropout": 0.5}, layout, groups, kd=False, steps=1)
        attention = next(
            m for m in student.chunks[0].modules() if isinstance(m, SDPAttention)
        ).train()
        query = torch.zeros(16, 1, 2, 8)
        value = torch.ones(16, 1, 1, 8)
        out = attention(query, value, value, None)
        outs = [torch.empty_like(out) for _ in range(2)]
        dist.all_gather(outs, out, group=groups.tensor)
    return [o.flatten().tolist() for o in outs]


def test_heads_on_different_ranks_drop_different_positions():
    outputs = run_distributed(attention_outputs, 2)
    assert outputs[0] != outputs[1]
