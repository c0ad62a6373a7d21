"""Megatron-core chunks into a Hugging Face folder: stages write their own files, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain import __version__
from distill_pretrain.checkpoint.hf.config import CONFIG, hf_config
from distill_pretrain.checkpoint.hf.files import (
    DTYPES,
    PlannedFile,
    Tensor,
    TensorFile,
    plan_files,
    write_index,
)
from distill_pretrain.checkpoint.hf.registry import correspondence
from distill_pretrain.checkpoint.hf.tensors import Piece
from distill_pretrain.checkpoint.hf.tokenizer import tokenizer_folder, write_tokenizer
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.files.disk import require_room
from distill_pretrain.files.folders import building, replace_folder
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.expert_names import is_of_expert
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import on_first_rank
from distill_pretrain.processes.watchdog import alive

RECORD = "export.json"
MAX_SHARD_BYTES = 5 * 10**9


def save_hf_model(
    chunks: Sequence[torch.nn.Module],
    *,
    model: ModelConfig,
    vocab_size: int,
    max_positions: int,
    folder: Path,
    dtype: str,
    tokenizer: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    eod_id: int | None = None,
    bos_id: int | None = None,
    source: Mapping[str, Any] | None = None,
    replaces_step: bool = False,
) -> None:
    """Write a folder that stock transformers loads. Every rank calls it; the folder must be the same for all.

    Args:
        chunks: of this rank.
        model: architecture.
        vocab_size: V, without padding.
        max_positions: longest sequence trained on; of a gpt2 model the number of learned positions.
        folder: to be made; published whole or not at all.
        dtype: "fp32" or "bf16", of the stored weights.
        tokenizer: folder of a Hugging Face tokenizer, or a sentencepiece model file; None leaves it out.
        max_shard_bytes: size at which a new file of weights is begun.
        eod_id: token that ends a document.
        bos_id: token that begins one; None where they begin with their text.
        source: what the weights are, recorded in export.json; a folder of the same source is replaced.
        replaces_step: replace any export of the same step: in a run's own folder, where an earlier version may have
            described the run in other words.

    Raises:
        CheckpointError: the folder exists and is something else, no class of transformers computes the model, or
            the tokenizer cannot be converted.
        StorageError: there is no room for it, or it cannot be written.
    """
    from distill_pretrain.mcore.model.chunks import parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import current_groups

    config = hf_config(
        model,
        vocab_size=vocab_size,
        max_positions=max_positions,
        dtype=dtype,
        eod_id=eod_id,
        bos_id=bos_id,
    )
    known = dict(source or {})
    record = {"source": known, "dtype": dtype, "code_version": __version__}
    temporary = folder.with_name(f"{folder.name}.tmp")

    def prepare() -> None:
        require_replaceable(folder, known, any_run=replaces_step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        needed = sum(tensor.num_bytes(dtype) for file in files for tensor in file.tensors)
        require_room(temporary, needed, what="the model", remedy="name a folder on another disk")
        if tokenizer is not None:
            place = tokenizer_folder(tokenizer, temporary, config["model_type"])
            place.mkdir(exist_ok=True)
            write_tokenizer(tokenizer, place, max_positions=max_positions)

    def publish() -> None:
        write_index(temporary, files, dtype)
        generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            (CONFIG, config),
            ("generation_config.json", generation),
            (RECORD, record),
        ):
            publish_bytes(temporary / name, (json.dumps(content, indent=2) + "\n").encode())
        replace_folder(folder, temporary)

    pieces = correspondence(model, vocab_size=vocab_size, max_positions=max_positions).pieces()
    groups = current_groups()
    export = _Export(parameters_by_name(chunks), pieces, groups, dtype)
    files = plan_files(export.stages(), dtype=dtype, max_shard_bytes=max_shard_bytes)
    with building(temporary):
        on_first_rank(prepare)
        export.write(files, temporary)
        dist.barrier()
        on_first_rank(publish)


def require_replaceable(folder: Path, source: Mapping[str, Any], *, any_run: bool = False) -> None:
    """Raise CheckpointError where a folder exists that is no export of `source`, or of its step in `any_run`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads((folder / RECORD).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    same_step = isinstance(found, dict) and found.get("step") == source.get("step")
    if not source or not (found == dict(source) or (any_run and same_step)):
        raise CheckpointError(
            "the folder exists and is not an export of this checkpoint",
            where=folder,
            found=f"an export of {found}" if found else "other files",
            remedy="name another folder, or remove it",
        )


class _Export:
    """This rank's part in writing the weights: the first rank of each stage writes, those that hold the rest send.

    Args:
        parameters: of this rank, by name in the whole model.
        pieces: of the whole model.
        groups: of the layout.
        dtype: of the files.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        pieces: Mapping[str, Sequence[Piece]],
        groups: ParallelGroups,
        dtype: str,
    ) -> None:
        self.parameters = parameters
        self.groups = groups
        self.dtype = dtype
        self.rank = dist.get_rank(groups.tensor)
        self.size = dist.get_world_size(groups.tensor)
        self.stage = dist.get_rank(groups.pipeline)
        # Of dense parameters the first ranks of this stage hold one copy, and so do others of experts.
        self.holds_dense = dist.get_rank(groups.data_context) == 0
        self.holds_experts = dist.get_rank(groups.expert_data) == 0
        self.writes = self.holds_dense and self.rank == 0
        names: list[Any] = [None] * dist.get_world_size(groups.expert)
        dist.all_gather_object(names, list(parameters), group=groups.expert)
        self.owners = {name: rank for rank, own in enumerate(names) for name in own}
        self.by_tensor: dict[str, list[tuple[str, Piece]]] = {}
        for name, parts in pieces.items():
            for piece in parts:
                self.by_tensor.setdefault(piece.tensor, []).append((name, piece))

    def stages(self) -> list[list[Tensor]]:
        """The tensors of every pipeline stage; one that two stages have (a tied head) is the first one's."""
        mine = [
            Tensor(name=tensor, shape=parts[0][1].shape)
            for tensor, parts in self.by_tensor.items()
            if parts[0][0] in self.owners
        ]
        stages: list[Any] = [None] * dist.get_world_size(self.groups.pipeline)
        dist.all_gather_object(stages, mine, group=self.groups.pipeline)
        seen: set[str] = set()
        for number, tensors in enumerate(stages):
            stages[number] = [tensor for tensor in tensors if tensor.name not in seen]
            seen.update(tensor.name for tensor in tensors)
        assert seen == set(self.by_tensor)
        return stages

    def write(self, files: Sequence[PlannedFile], folder: Path) -> None:
        """Write this stage's files."""
        for file in files:
            if file.stage != self.stage:
                continue
            if not self.writes:
                for tensor in file.tensors:
                    self._gather(tensor)
                continue
            with TensorFile(folder / file.name, file.tensors, self.dtype) as out:
                for tensor in file.tensors:
                    whole = self._gather(tensor)
                    assert whole is not None
                    out.append(tensor.name, whole)
                    alive()

    @torch.no_grad()
    def _gather(self, tensor: Tensor) -> torch.Tensor | None:
        """The whole tensor on the CPU of the stage's first rank; None on the others."""
        whole = torch.empty(tensor.shape, dtype=DTYPES[self.dtype]) if self.writes else None
        for name, piece in self.by_tensor[tensor.name]:
            if is_of_expert(name):
                parts = self._from_owner(name, piece) if self.holds_experts else []
            else:
                parts = self._parts(self._local(name, piece), piece) if self.holds_dense else []
            for rank, part in enumerate(parts):
                assert whole is not None
                target = whole[piece.index(part.numel(), rank)]
                target.copy_(part[tuple(slice(0, n) for n in target.shape)])
        return whole

    def _local(self, name: str, piece: Piece) -> torch.Tensor:
        """This rank's part of a tensor."""
        values = piece.select(self.parameters[name])
        if piece.scale != 1.0:
            values = values.float() * piece.scale
        shape = piece.local_shape(values.numel())
        local = values.reshape(shape[::-1]).t() if piece.transposed else values.reshape(shape)
        return local.to(DTYPES[self.dtype])

    def _from_owner(self, name: str, piece: Piece) -> list[torch.Tensor]:
        """What the one rank that has an expert holds of it, on the stage's first rank; nothing on the others."""
        group, owner = self.groups.expert, self.owners[name]
        rank, first = dist.get_rank(group), dist.get_global_rank(group, 0)
        if rank == owner:
            local = self._local(name, piece)
            if self.writes:
                return [local]
            dist.send(local.contiguous(), dst=first, group=group)
        elif self.writes:
            device = next(iter(self.parameters.values())).device
            shape = piece.local_shape(0)
            part = torch.empty(shape, dtype=DTYPES[self.dtype], device=device)
            dist.recv(part, src=dist.get_global_rank(group, owner), group=group)
            return [part]
        return []

    def _parts(self, local: torch.Tensor, piece: Piece) -> list[torch.Tensor]:
        """What the ranks of the tensor group hold, on its first rank; nothing on the others."""
        if piece.split is None or self.size == 1:
            return [local] if self.rank == 0 else []
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)] if self.rank == 0 else None
        first = dist.get_global_rank(self.groups.tensor, 0)
        dist.gather(local, parts, dst=first, group=self.groups.tensor)
        return parts or []
