"""A student's state to and from a folder, through megatron-core's dist_checkpointing: any layout reads any other.

megatron-core unpickles parts of a checkpoint, so a folder must have passed `checkpoint`'s hash check first.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.mcore.core import dist_checkpointing, megatron_random, parallel_state
from distill_pretrain.mcore.model import unwrap
from distill_pretrain.mcore.schedule import Student


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(chunks: list[torch.nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


def _load_model(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    names = [name for name in loaded if name.startswith("model")]
    for name, chunk in zip(sorted(names), chunks, strict=True):
        unwrap(chunk).load_state_dict(loaded[name], strict=True)


def _student_state(student: Student, *, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state = _model_state(student.chunks, metadata)
    state["optimizer"] = student.optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=metadata
    )
    state["scheduler"] = student.scheduler.state_dict()
    return state


def _rng_file(folder: Path) -> Path:
    return folder / f"rng-{dist.get_rank():05d}.pt"


def save_student(student: Student, folder: Path) -> None:
    """Write weights, optimizer, schedule and this rank's random streams into an existing empty folder.

    Every rank calls it; the folder is complete when the last rank returns.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(_student_state(student, is_loading=False), str(folder))
    torch.save(
        {
            "default": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(),
            **megatron_random.get_cuda_rng_tracker().get_states(),
        },
        _rng_file(folder),
    )


def load_student(student: Student, folder: Path) -> bool:
    """Restore what `save_student` wrote, under any layout.

    Returns:
        Whether this rank's random streams were restored: not when the number of ranks has changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(_student_state(student, is_loading=True), str(folder))
    _load_model(student.chunks, loaded)
    student.optimizer.load_state_dict(loaded["optimizer"])
    student.scheduler.load_state_dict(loaded["scheduler"])
    saved_ranks = len(list(folder.glob("rng-*.pt")))
    if saved_ranks != dist.get_world_size():
        return False
    streams = torch.load(_rng_file(folder), weights_only=True)
    torch.set_rng_state(streams.pop("default"))
    torch.cuda.set_rng_state(streams.pop("device"))
    megatron_random.get_cuda_rng_tracker().set_states(streams)
    return True


def load_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    """Restore the weights alone, under any layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(_model_state(chunks, _metadata()), str(folder))
    _load_model(chunks, loaded)
