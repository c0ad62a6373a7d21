"""A student's state to and from a folder, through megatron-core's dist_checkpointing: any layout reads any other.

megatron-core unpickles parts of a checkpoint: `unpickling` reads them first, so that a foreign folder runs no code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue

import torch
import torch.distributed as dist

from distill_pretrain.mcore.model.chunks import load_chunks, sharded_chunks
from distill_pretrain.mcore.model.config import checkpoint_bytes_per_parameter
from distill_pretrain.mcore.runtime.core import (
    AsyncRequest,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    distrib_optimizer,
    filesystem_async,
    make_sharded_optimizer_tensor,
    megatron_optimizer,
    megatron_random,
    save_preprocess,
)
from distill_pretrain.mcore.runtime.parallel import current_groups
from distill_pretrain.mcore.student.average import PREFIX as AVERAGE
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.mcore.student.unpickling import check_pickles, reading
from distill_pretrain.processes.process import local_device, on_every_rank, on_first_rank
from distill_pretrain.processes.watchdog import alive

MASTERS = ("optimizer.state.fp32_param", "optimizer.state.param")
"""Where the fp32 weights of a bf16 run are: without, and with, the distributed optimizer."""

PART_BYTES = 1 << 30
"""What of a checkpoint's fp32 weights a rank holds at a time, beside the student that starts from them."""

_FILES_PER_RANK = 2
_GROUP_FACTORS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What megatron-core before 0.19 tells groups of parameters apart by; see `mcore.init.groups`."""
_SAVE_PARAMETERS = inspect.signature(dist_checkpointing.save).parameters
# megatron-core 0.17 and later look for nvidia-resiliency-ext unless they are told to write by themselves.
_WRITER = {"async_strategy": "mcore"} if "async_strategy" in _SAVE_PARAMETERS else {}
# 0.19 and later keep what is not sharded in rank 0's file; earlier ones know it in a file of its own only.
_WRITES_COMMON_FILE = "common_strategy" in _SAVE_PARAMETERS


def _agree_on_step_counts(student: Student) -> None:
    """Give every parameter group the optimizer's count of updates, where groups count (fused Adams).

    A fused Adam does not count in a group that has no parameter on this rank, such as the head's on the first pipeline
    stage; a checkpoint keeps the first rank's groups, and every rank resumes with their counts.
    """
    groups = student.optimizer.param_groups
    counts = [group["step"] for group in groups if "step" in group]
    for group in groups if counts else ():
        group["step"] = max(counts)


def _student_state(
    student: Student, *, is_loading: bool, with_average: bool = True
) -> ShardedStateDict:
    if not is_loading:
        _agree_on_step_counts(student)
    state = student.model_state(is_loading=is_loading)
    state["optimizer"] = student.optimizer_state(state, is_loading=is_loading)
    state["scheduler"] = student.scheduler.state_dict()
    if student.average is not None and with_average:
        state["average"] = student.average.state(is_loading=is_loading)
    return state


def rng_file(folder: Path, rank: int) -> Path:
    """Return where a rank's random streams are saved."""
    return folder / f"rng-{rank:05d}.pt"


def _layout(student: Student) -> list[int]:
    """Return what decides which rank draws from which random stream."""
    config = student.config
    return [
        dist.get_world_size(),
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size or 1,
        int(config.sequence_parallel),
        config.context_parallel_size,
        # Checkpoints of earlier versions lack it, and it was 1.
        *([config.expert_model_parallel_size] if config.expert_model_parallel_size > 1 else []),
    ]


def plan_save(student: Student, folder: Path) -> AsyncRequest:
    """Return what is still to be written, as megatron-core's AsyncRequest; all but the sharded tensors is written here.

    Every rank calls it. The request refers to the student's own tensors.
    """
    # It would start a Manager process for this queue and keep it: one that a SIGTERM to the process group ends before
    # the last save, and that outlives a killed job. A queue of this save alone, since a failed one leaves its results.
    filesystem_async._results_queue = Queue()
    state = _student_state(student, is_loading=False)
    request = dist_checkpointing.save(
        state,
        str(folder),
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_FILES_PER_RANK),
        async_sharded_save=True,
        **_WRITER,
    )
    if not _WRITES_COMMON_FILE and dist.get_rank() == 0:
        _, common = save_preprocess(state, validate_access_integrity=False)
        torch.save(common, folder / "common.pt")
    streams = {
        "default": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        **megatron_random.get_cuda_rng_tracker().get_states(),
    }
    torch.save({"layout": _layout(student), "streams": streams}, rng_file(folder, dist.get_rank()))
    return request


def saved_bytes(student: Student, *, precision: str) -> int:
    """Estimate what a checkpoint of a student takes, over all ranks; see `checkpoint_bytes_per_parameter`.

    Every rank calls it. What two pipeline stages share counts twice.
    """
    groups = current_groups()
    own = 0
    for parameter in (p for chunk in student.chunks for p in chunk.parameters()):
        is_dense = getattr(parameter, "allreduce", True)
        copies = groups.data_context if is_dense else groups.expert_data
        if dist.get_rank(copies) == 0:
            own += getattr(parameter, "ds_numel", parameter.numel())
    total = torch.tensor(own, dtype=torch.int64).to(local_device())
    dist.all_reduce(total)
    averaged = student.average is not None
    return int(total.item()) * checkpoint_bytes_per_parameter(precision, averaged=averaged)


def load_student(student: Student, folder: Path, *, with_average: bool = True) -> bool:
    """Restore what `background_save` wrote, under any layout.

    Args:
        student: whose state it becomes.
        folder: of the checkpoint.
        with_average: restore the moving average, too, where the student keeps one.

    Returns:
        Whether this rank's random streams were restored: not when the layout has changed.
    """
    on_first_rank(lambda: check_pickles(folder))
    with reading(folder):
        state = _student_state(student, is_loading=True, with_average=with_average)
        loaded = dist_checkpointing.load(state, str(folder))
        student.load_model_state(loaded)
        student.load_optimizer_state(loaded["optimizer"])
        _agree_on_step_counts(student)  # older checkpoints lack some
        if student.average is not None and with_average:
            student.average.load_state(loaded["average"])
        # The count alone: the recipe has the schedule. A branch of a stable part decays where its own recipe says.
        student.scheduler.num_steps = 0
        student.scheduler.step(increment=int(loaded["scheduler"]["num_steps"]))
    return on_every_rank(lambda: _load_streams(student, rng_file(folder, dist.get_rank())))


@contextmanager
def _groups_by_factors() -> Iterator[None]:
    """Find a checkpoint's groups of parameters by their factors in the block, whatever their rates.

    megatron-core 0.19 and later tell groups apart by their rates, too, which a new phase may have changed.
    """
    modules = (distrib_optimizer, megatron_optimizer.optimizer)
    known = [module.param_group_identifier_keys for module in modules]
    try:
        for module in modules:
            module.param_group_identifier_keys = _GROUP_FACTORS
        yield
    finally:
        for module, keys in zip(modules, known, strict=True):
            module.param_group_identifier_keys = keys


def continue_student(student: Student, folder: Path) -> None:
    """Give a new student the weights, moments and random streams of a checkpoint, under any layout.

    Its schedule, from the first step on, and the settings of its optimizer are its own.
    """
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in student.optimizer.param_groups
    ]
    with _groups_by_factors():
        load_student(student, folder, with_average=False)
    for group, own in zip(student.optimizer.param_groups, settings, strict=True):
        group.update(own)
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=0)


def _load_streams(student: Student, path: Path) -> bool:
    """Restore this rank's random streams, if they were saved under this layout; whether they were."""
    if not path.exists():
        return False
    with reading(path):
        saved = torch.load(path, weights_only=True)
        if saved["layout"] != _layout(student):
            return False
        _restore_streams(saved["streams"])
    return True


def _restore_streams(streams: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(streams.pop("default"))
    torch.cuda.set_rng_state(streams.pop("device"))
    megatron_random.get_cuda_rng_tracker().set_states(streams)


def load_weights(
    chunks: list[torch.nn.Module], folder: Path, *, from_masters: bool = False
) -> None:
    """Restore the weights alone, under any layout.

    Args:
        chunks: of the model.
        folder: of the checkpoint.
        from_masters: take the optimizer's fp32 weights of a bf16 run, where it has them.
    """
    names = on_first_rank(lambda: check_pickles(folder))
    with reading(folder):
        state = sharded_chunks(chunks)
        if from_masters:
            state = {chunk: _of_masters(entries, names) for chunk, entries in state.items()}
        loaded = dist_checkpointing.load(state, str(folder))
        load_chunks(chunks, loaded)


def load_average(chunks: list[torch.nn.Module], folder: Path) -> None:
    """Restore the moving average of the weights in their place, under any layout, into fp32 chunks."""
    on_first_rank(lambda: check_pickles(folder))
    with reading(folder):
        state = {
            chunk: {
                name: make_sharded_optimizer_tensor(entry, entry.data, prefix=AVERAGE)
                if isinstance(entry.data, torch.nn.Parameter)
                else entry
                for name, entry in entries.items()
            }
            for chunk, entries in sharded_chunks(chunks).items()
        }
        load_chunks(chunks, dist_checkpointing.load(state, str(folder)))


@torch.no_grad()
def load_mean(chunks: list[torch.nn.Module], folders: list[Path]) -> None:
    """Restore the mean of the weights of several checkpoints, masters where there are, into fp32 chunks."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    means: list[torch.Tensor] = []
    for number, folder in enumerate(folders):
        load_weights(chunks, folder, from_masters=True)
        means = means or [parameter.clone() for parameter in parameters]
        for mean, parameter in zip(means, parameters, strict=True):
            mean.lerp_(parameter, 1 / (number + 1))
        alive()
    for mean, parameter in zip(means, parameters, strict=True):
        parameter.copy_(mean)


def _of_masters(entries: ShardedStateDict, names: frozenset[str]) -> ShardedStateDict:
    """The entries of a chunk, of the fp32 weights beside them where there are such among the `names` of a folder."""
    return {name: _of_master(entry, entry.data, names) or entry for name, entry in entries.items()}


def _of_master(
    entry: ShardedTensor, values: torch.Tensor, names: frozenset[str]
) -> ShardedTensor | None:
    """An entry for the fp32 weights of `entry`, to be read into `values`; None where a folder has none."""
    for prefix in MASTERS:
        if f"{prefix}.{getattr(entry, 'key', None)}" in names:
            return make_sharded_optimizer_tensor(entry, values, prefix=prefix)
    return None


def start_from_checkpoint(student: Student, folder: Path, *, part_bytes: int = PART_BYTES) -> None:
    """Give a new student the weights of a checkpoint of any layout and precision: the fp32 ones, where it has such.

    Every rank calls it. A part of the weights is in memory at a time.
    """
    names = on_first_rank(lambda: check_pickles(folder))
    entries = student.weight_entries()
    with reading(folder):
        for parameters in _parts(student, list(entries), part_bytes):
            wanted = {
                f"{number}": _into_fp32(entries[parameter], student.shape_of(parameter), names)
                for number, parameter in enumerate(parameters)
            }
            # A part is not the whole model, which is what the validation asks for.
            loaded = dist_checkpointing.load(
                {"start": wanted}, str(folder), validate_access_integrity=False
            )
            for number, parameter in enumerate(parameters):
                student.set_weights(parameter, loaded["start"][f"{number}"])
            alive()


def _into_fp32(entry: ShardedTensor, shape: torch.Size, names: frozenset[str]) -> ShardedTensor:
    """An entry that reads a parameter in fp32. Rows of padding that the checkpoint lacks stay zero."""
    values = torch.zeros(shape, dtype=torch.float32)
    found = _of_master(entry, values, names)
    if found is not None:
        return found
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, data=values)
    return replace(entry, data=values, dtype=values.dtype)


def _parts(
    student: Student, parameters: list[torch.nn.Parameter], part_bytes: int
) -> list[list[torch.nn.Parameter]]:
    """Parameters in groups of at most so many bytes in fp32 (or one parameter); as many groups on every rank."""
    parts: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = 4 * student.shape_of(parameter).numel()
        if not parts or size > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(parameter)
        room -= size
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(parts))
    return parts + [[]] * (max(counts) - len(parts))
