"""Scores with a Hugging Face causal LM that several processes hold together.

The trunk, everything below the LM head, is split by transformers (tensor parallel, FSDP2) or by DeepSpeed (ZeRO-3).
Each rank reads its own columns of the LM head from the files, so the head is never whole anywhere.

Shapes: B sequences, L positions, H hidden size, R ranks of the replica.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.hf.files import SINGLE, file_names, header
from distill_pretrain.checkpoint.hf.nested import RENAMED, renamed
from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.errors import LayoutError, MissingDependency, TeacherError
from distill_pretrain.processes.process import local_device, on_first_rank
from distill_pretrain.teacher.config import TeacherConfig, Trust
from distill_pretrain.teacher.engines.folder import (
    DTYPES,
    cannot_be_loaded,
    files_identity,
    import_transformers,
    read_config,
)
from distill_pretrain.teacher.engines.head import ChunkedHead, head_rows, trunk_name, trunk_of
from distill_pretrain.teacher.engines.known_head import finish_of, require_known_head
from distill_pretrain.teacher.engines.text_part import key_mapping
from distill_pretrain.teacher.engines.weights import (
    meta_model,
    quiet,
    require_all_loaded,
    require_own_weights,
    require_plain_head,
)

Trunk = Callable[[torch.Tensor], torch.Tensor]
"""tokens int64[B, L] -> final hidden states [B, L, H]; every rank of the replica calls it together."""

OpenTrunk = Callable[[TeacherConfig, Any, str], Trunk]
"""(section, the folder's configuration, name of the LM head, which the trunk has no use for) -> trunk."""


class SplitHFEngine:
    """This process's part of a Hugging Face causal LM that several hold together; see `open_teacher_engine`.

    Args:
        teacher: the section.
        vocab_size: V of the corpus.
        seq_len: L.
        open_trunk: loads this rank's part of the trunk.
        splits_sequences: the ranks of a replica take different sequences through the trunk and exchange hidden states,
            B * L * H numbers; otherwise all take the same ones.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        *,
        vocab_size: int,
        seq_len: int,
        open_trunk: OpenTrunk,
        splits_sequences: bool,
    ) -> None:
        path, trust = teacher.path, teacher.trust
        config = read_config(path, vocab_size=vocab_size, seq_len=seq_len, trust=trust)
        files = on_first_rank(
            lambda: require_own_weights(path, meta_model(path, config, trust), trust)
        )
        model = meta_model(path, config, trust)
        config = model.config
        _require_own_trunk(path, model, trust)
        head_tensors = _head_tensors(model)
        head_name = require_known_head(path, model)
        self.vocab_size = vocab_size
        self.device = local_device()
        self.replica = _contiguous_replica(teacher.processes)
        assert self.replica.group is not None
        self._rank = dist.get_rank(self.replica.group)
        self._size = teacher.processes
        self._splits_sequences = splits_sequences
        self._trunk = open_trunk(teacher, config, head_name)
        self._head = self._read_head(teacher, config, head_tensors)
        ways = ("tensor", "fsdp", "zero", "offload", "head_chunk_tokens")
        fields = type(teacher).model_fields
        self._identity = {
            "kind": teacher.kind,
            "dtype": teacher.dtype,
            "model_type": str(config.model_type),
            "files": files_identity(path, files, trust),
            **{
                n: getattr(teacher, n)
                for n in ways[:-1]
                if getattr(teacher, n) != fields[n].default
            },
            "head_chunk_tokens": teacher.head_chunk_tokens,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Engine, arithmetic, layout and weights."""
        return self._identity

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`."""
        yield from self._head.chunks(self._hidden(tokens))

    @torch.no_grad()
    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L, H] on every rank."""
        if not self._splits_sequences:
            return self._trunk(tokens)
        each = -(-len(tokens) // self._size)
        # All ranks must run, and the last ones may have nothing of their own.
        mine = torch.arange(self._rank * each, (self._rank + 1) * each).clamp(max=len(tokens) - 1)
        own = self._trunk(tokens[mine.to(tokens.device)]).contiguous().view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(parts, own, group=self.replica.group)
        return torch.cat(parts).view(self._dtype)[: len(tokens)]

    def _read_head(
        self, teacher: TeacherConfig, config: Any, names_of: dict[str, list[str]]
    ) -> ChunkedHead:
        self._dtype = DTYPES[teacher.dtype]
        rows = head_rows(self.vocab_size, self._rank, self._size)
        tensors = {part: _read_rows(teacher.path, names, rows) for part, names in names_of.items()}
        if tensors["weight"] is None:
            raise TeacherError(
                "the LM head is not among the weights",
                where=teacher.path,
                expected=f"{names_of['weight'][0]} in safetensors files",
                remedy="save the model with save_pretrained",
            )
        require_plain_head(teacher.path, tensors["weight"])
        weight, bias = (
            None if found is None else found.to(self.device, self._dtype)
            for found in (tensors["weight"], tensors["bias"])
        )
        assert weight is not None
        return ChunkedHead(
            weight,
            bias,
            first_id=rows.start,
            vocab_size=self.vocab_size,
            chunk_tokens=teacher.head_chunk_tokens,
            finish=finish_of(config),
        )


def open_transformers_trunk(teacher: TeacherConfig, config: Any, head: str) -> Trunk:
    """Split by transformers itself; copies of the teacher are its data-parallel replicas.

    Raises:
        MissingDependency: accelerate, or a transformers that splits.
        TeacherError: the model cannot be split in this way.
    """
    import_transformers()  # or the line that installs it
    needed_for = "teacher.tensor and teacher.fsdp"
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MissingDependency("accelerate", extra="hf", needed_for=needed_for) from None
    from transformers.distributed import DistributedConfig

    if "dp_replicate_size" not in inspect.signature(DistributedConfig).parameters:
        raise MissingDependency("transformers>=5.20", needed_for=needed_for)
    heads = getattr(config, "num_key_value_heads", None) or teacher.tensor
    if heads % teacher.tensor:
        raise LayoutError(
            "the attention cannot be split over so many processes",
            where="teacher.tensor",
            found=teacher.tensor,
            expected=f"a divisor of num_key_value_heads = {heads}",
        )
    layout = DistributedConfig(
        tp_size=teacher.tensor,
        fsdp_size=teacher.fsdp,
        dp_replicate_size=dist.get_world_size() // teacher.processes,
    )
    trunk = _load_trunk(teacher, config, head, distributed_config=layout)
    trunk.eval()

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        found: Any = trunk(input_ids=tokens, use_cache=False)[0]
        whole: torch.Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
        return whole

    return hidden


def open_deepspeed_trunk(teacher: TeacherConfig, config: Any, head: str) -> Trunk:
    """Open the trunk under ZeRO-3 over all ranks of the job.

    Raises:
        MissingDependency: deepspeed or accelerate.
    """
    try:
        import accelerate  # noqa: F401
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise MissingDependency(
            error.name or "deepspeed", extra="deepspeed", needed_for="teacher.kind=deepspeed"
        ) from None
    from transformers.integrations import HfDeepSpeedConfig

    # Its shared-memory collectives need a C++ compiler where the job runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    zero: dict[str, Any] = {"stage": 3}
    if teacher.offload:
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": teacher.dtype == "bf16"},
    }
    # While this object lives, transformers splits each weight as it is read.
    splitting = HfDeepSpeedConfig(settings)
    trunk = _load_trunk(teacher, config, head)
    del splitting
    engine = deepspeed.initialize(model=trunk, config=settings)[0]
    engine.eval()

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = engine(input_ids=tokens, use_cache=False)[0]
        return found

    return hidden


def _load_trunk(teacher: TeacherConfig, config: Any, head: str, **settings: Any) -> Any:
    """The trunk as transformers loads it, split as it is told by `settings` or by what surrounds the call.

    Raises:
        TeacherError: it cannot be loaded, or not all of it, or not all of the files but the LM head's.
    """
    mapping = key_mapping(teacher.path, config)
    if mapping:
        settings["key_mapping"] = mapping
    try:
        with quiet(keep_bar=True):
            trunk, info = import_transformers().AutoModel.from_pretrained(
                teacher.path,
                config=config,
                dtype=DTYPES[teacher.dtype],
                local_files_only=True,
                trust_remote_code=teacher.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # transformers raises nearly anything here
        raise cannot_be_loaded(teacher.path, error) from error
    require_all_loaded(teacher.path, info, spare=f"{head}.", mapping=mapping)
    return trunk


def _contiguous_replica(size: int) -> Replica:
    """Ranks 0 to size - 1 hold the first copy, the next ones the second."""
    number = dist.get_rank() // size
    count = dist.get_world_size() // size
    # Every process takes part in making every group.
    groups = [dist.new_group(range(n * size, (n + 1) * size)) for n in range(count)]
    return Replica(
        group=groups[number],
        vocab_group=groups[number],
        leader=number * size,
        number=number,
        count=count,
    )


def _require_own_trunk(path: Path, model: Any, trust: Trust) -> None:
    """Refuse a causal LM whose trunk is not the model that transformers loads where none with a head is asked for.

    Raises:
        TeacherError: see above.
    """
    try:
        with torch.device("meta"), quiet():
            alone = import_transformers().AutoModel.from_config(
                model.config, trust_remote_code=trust.remote_code
            )
    except Exception as error:  # transformers raises nearly anything here
        raise cannot_be_loaded(path, error) from error
    if type(alone) is not type(trunk_of(model)):
        raise TeacherError(
            "the model cannot be split: its trunk is not loaded without its head",
            where=path,
            found=f"{type(alone).__name__} where {type(model).__name__} has {type(trunk_of(model)).__name__}",
            remedy="hold it whole in each process: teacher.kind=hf without tensor and fsdp",
        )


def _head_tensors(model: Any) -> dict[str, list[str]]:
    """Part of the head -> names under which files may have it."""
    old_head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is old_head), "lm_head")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(f"{name}.weight")
    weight = [f"{name}.weight"]
    if source is not None:
        # The embedding is what counts; older files name it without the trunk's prefix.
        weight = [source, source.removeprefix(f"{trunk_name(model)}."), *weight]
    return {"weight": weight, "bias": [f"{name}.bias"]}


def _read_rows(folder: Path, names: list[str], rows: slice) -> torch.Tensor | None:
    """Some rows of the first of these tensors that the safetensors files have."""
    from safetensors import safe_open

    named = file_names(folder)
    if not named and (folder / SINGLE).is_file():
        named = {name: SINGLE for name, *_ in header(folder / SINGLE)}
    # Names of a nested text model's tensors differ from each other, and from those that no mapping touches.
    own_names = {renamed(name, RENAMED): name for name in named} | {name: name for name in named}
    for name in names:
        if name not in own_names:
            continue
        with safe_open(folder / named[own_names[name]], framework="pt") as tensors:
            found: torch.Tensor = tensors.get_slice(own_names[name])[rows]
            return found
    return None
