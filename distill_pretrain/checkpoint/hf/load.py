"""Hugging Face weights into megatron-core chunks: each rank reads its own share, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.hf.config import CONFIG, read_hf_model
from distill_pretrain.checkpoint.hf.files import WeightFiles
from distill_pretrain.checkpoint.hf.nested import nests_text
from distill_pretrain.checkpoint.hf.registry import correspondence
from distill_pretrain.checkpoint.hf.tensors import Correspondence, Piece
from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import on_first_rank
from distill_pretrain.processes.watchdog import alive

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import Student


def load_hf_weights(chunks: Sequence[torch.nn.Module], path: Path) -> None:
    """Fill this rank's chunks from the safetensors files of a folder. Every rank calls it.

    Args:
        chunks: of `build_model_chunks`, from `read_hf_model(path)`: its `model`, its `vocab_size`, and for gpt2
            seq_len=`max_positions`; any layout and precision.
        path: folder with config.json and safetensors files in fp32, bf16 or fp16.

    Raises:
        CheckpointError: a model that megatron-core cannot represent, damaged files, tensors that are missing, extra
            or of another shape, or chunks of another model.
    """
    from distill_pretrain.mcore.model.chunks import parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import current_groups

    pieces = _correspondence_of(path).pieces()
    files = on_first_rank(lambda: check_hf_weights(path))
    groups = current_groups()
    parameters = parameters_by_name(chunks)
    _require_all(parameters, pieces, groups, path)
    rank, size = dist.get_rank(groups.tensor), dist.get_world_size(groups.tensor)
    load_parameters(parameters, pieces, files, rank=rank, size=size)


def check_hf_weights(path: Path) -> WeightFiles:
    """Compare a folder's files with its config.json, from their headers.

    Raises:
        CheckpointError: as for `load_hf_weights`.
    """
    names = _correspondence_of(path)
    tied = names.tied_tensors if names.model.tie_embeddings else None
    nested = nests_text(json.loads((path / CONFIG).read_bytes()))
    return WeightFiles.open(path, names.shapes(), tied=tied, nested=nested)


def _correspondence_of(path: Path) -> Correspondence:
    found = read_hf_model(path)
    return correspondence(
        found.model,
        vocab_size=found.vocab_size,
        max_positions=found.max_positions,
        family=found.family,
    )


def start_from_hf(
    student: Student,
    files: WeightFiles,
    *,
    model: ModelConfig,
    vocab_size: int,
    max_positions: int,
    family: str,
) -> None:
    """Give a new student the values that a folder stores, one parameter of this rank in memory at a time.

    Every rank calls it.

    Args:
        student: under any layout, precision and backend; its fp32 masters are the stored values, not rounded.
        files: of `check_hf_weights`, of the same architecture.
        model: of the student.
        vocab_size: V of the student; rows beyond it are left out.
        max_positions: learned positions of a gpt2 student; those beyond are left out.
        family: model_type of the folder.
    """
    from distill_pretrain.mcore.model.chunks import parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import current_groups

    pieces = correspondence(
        model, vocab_size=vocab_size, max_positions=max_positions, family=family
    ).pieces()
    parameters = parameters_by_name(student.chunks)
    groups = current_groups()
    _require_all(parameters, pieces, groups, files.folder)
    rank, size = dist.get_rank(groups.tensor), dist.get_world_size(groups.tensor)
    for name, parameter in parameters.items():
        values = torch.empty(student.shape_of(parameter), dtype=torch.float32)
        load_parameters({name: values}, pieces, files, rank=rank, size=size)
        student.set_weights(parameter, values)
        alive()


@torch.no_grad()
def load_parameters(
    parameters: Mapping[str, torch.Tensor],
    pieces: Mapping[str, Sequence[Piece]],
    files: WeightFiles,
    *,
    rank: int,
    size: int,
) -> None:
    """Fill parameters with their tensor-parallel slices.

    Args:
        parameters: by name in the whole model.
        pieces: what each is made of.
        files: where from.
        rank: tensor-parallel.
        size: tensor-parallel.
    """
    for name, parameter in parameters.items():
        for piece in pieces[name]:
            _load_piece(name, parameter, piece, files, rank, size)


def _load_piece(
    name: str, parameter: torch.Tensor, piece: Piece, files: WeightFiles, rank: int, size: int
) -> None:
    assert piece.scale == 1.0, "config.json describes plain models"
    target = piece.select(parameter)
    if not piece.fits(target.numel(), size):
        raise CheckpointError(
            "the model was built with other sizes than the folder's",
            where=f"{files.folder}, {piece.tensor}",
            found=f"{name} {list(parameter.shape)} on each of {size} tensor-parallel ranks",
            expected=f"a share of {list(piece.shape)}",
            remedy="build it from read_hf_model of this folder",
        )
    part = files.read(piece.tensor, piece.index(target.numel(), rank))
    if piece.padded:
        target[len(part) :].zero_()
        target = target[: len(part)]
    if piece.transposed:
        part = part.t()
    target.copy_(part.reshape(target.shape))


def _require_all(
    parameters: Mapping[str, torch.Tensor],
    pieces: Mapping[str, Sequence[Piece]],
    groups: ParallelGroups,
    path: Path,
) -> None:
    """Raise CheckpointError unless all stages, and ranks with other experts, have exactly the model's parameters."""
    built = set(parameters)
    for group in (groups.expert, groups.pipeline):
        others: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(others, built, group=group)
        built = set().union(*others)
    differing = sorted(built ^ set(pieces))
    if differing:
        raise CheckpointError(
            "the model was built differently from the folder's",
            where=path,
            found=f"{len(differing)} parameters that only one of them has, such as {differing[0]}",
            remedy="build it from read_hf_model of this folder",
        )
