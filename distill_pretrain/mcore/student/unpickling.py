"""What may be unpickled out of a checkpoint folder: torch's own descriptions of tensors, and nothing that runs code.

Several files of megatron-core's dist_checkpointing are pickles, and some are read without limits: `.metadata` (by
torch's FileSystemReader), common.pt (by megatron-core 0.17) and the objects among the tensors (by torch's
DefaultLoadPlanner). A pickle may name any function for the reader to call, so each of these is read here first by an
unpickler that knows what megatron-core 0.16 to 0.19 and torch 2.6 to 2.15 write, and refuses every other name.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint import planner as torch_planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from distill_pretrain.errors import CheckpointError, DistillPretrainError

METADATA = ".metadata"
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_CLASSES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "torch.distributed.checkpoint.metadata": (
        torch_metadata,
        (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
    ),
    "torch.distributed.checkpoint.planner": (
        torch_planner,
        ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
}
_ENUMS = (torch_metadata._MEM_FORMAT_ENCODING, torch_planner.WriteItemType)


def _layout(name: str) -> torch.layout:
    """The tensor layout of a name such as "torch.strided"."""
    found = getattr(torch, str(name).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"{name} is no layout")
    return found


def _member(kind: object, name: str) -> object:
    """The member of an enumeration, which Python 3.11.0 pickles as a call of getattr."""
    for known in _ENUMS:
        if kind is known:
            return known[name]
    raise pickle.UnpicklingError("getattr of something else than an enumeration of torch")


_OTHERS: dict[tuple[str, str], object] = {
    ("builtins", "getattr"): _member,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _layout,
}


class _Limited(pickle.Unpickler):
    """Knows the names in `.metadata`, and refuses every other."""

    def find_class(self, module: str, name: str) -> object:
        """What a pickle means by a name."""
        if (module, name) in _OTHERS:
            return _OTHERS[module, name]
        source, names = _CLASSES.get(module, (None, ()))
        if name in names:
            found: object = getattr(source, name)
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


@contextmanager
def _newer_descriptions() -> Iterator[None]:
    """Let an older torch read in the block what torch 2.15 and later write of a tensor.

    They say its strides in a sixth field, at which a torch that knows five fails. Loading needs none of them.
    """
    described = torch_metadata.TensorProperties
    restore, known = described.__setstate__, len(described().__getstate__())  # type: ignore[no-untyped-call]

    def restore_known(self: torch_metadata.TensorProperties, state: tuple[object, ...]) -> None:
        restore(self, state[:known])  # type: ignore[no-untyped-call]

    described.__setstate__ = restore_known  # type: ignore[method-assign]
    try:
        yield
    finally:
        described.__setstate__ = restore  # type: ignore[method-assign]


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint is read into CheckpointError; knows what newer versions write.

    Memory that does not suffice stays what it is.
    """
    try:
        with _newer_descriptions():
            yield
    except (DistillPretrainError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        # torch gathers what went wrong on each rank.
        causes = getattr(error, "failures", None)
        first = next(iter(causes.values()))[0] if isinstance(causes, dict) and causes else error
        lines = str(first).strip().splitlines() or [""]
        raise CheckpointError(
            "the checkpoint cannot be read",
            where=where,
            found=f"{type(first).__name__}: {lines[0][:300]}",
            expected="files as this program wrote them",
            remedy="restore the folder from a copy, or remove it to go on from the checkpoint before",
        ) from error


def check_pickles(folder: Path) -> frozenset[str]:
    """Read every pickle of a checkpoint folder that loading it would read, allowing no code to run.

    Returns:
        The names of the tensors in the folder.

    Raises:
        CheckpointError: a file is damaged, or holds what no checkpoint needs.
    """
    with reading(folder / "metadata.json"):
        backends = json.loads((folder / "metadata.json").read_bytes())
        for key, expected in _BACKENDS.items():
            # megatron-core 0.19 and later have no backend for what is not sharded, and name none.
            found = backends.get(key, expected) if key == "common_backend" else backends[key]
            if found != expected:
                raise ValueError(f"{key} is {found!r}, expected {expected!r}")
    with reading(folder / "common.pt"):
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    for path in sorted(folder.glob(f"*{METADATA}")):
        with reading(path), path.open("rb") as file:
            _Limited(file).load()
    with reading(folder / METADATA), (folder / METADATA).open("rb") as file:
        found = _Limited(file).load()
        if not isinstance(found, torch_metadata.Metadata):
            raise TypeError(f"a {type(found).__name__}, not torch's Metadata")
        for index, info in found.storage_data.items():
            _check_place(folder, info)
            described = found.state_dict_metadata[index.fqn]
            if isinstance(described, torch_metadata.BytesStorageMetadata):
                _check_object(folder, info)
        return frozenset(found.state_dict_metadata)


def _check_place(folder: Path, info: _StorageInfo) -> None:
    """Refuse bytes outside the folder, and such as pass through a filter first."""
    name = info.relative_path
    if not isinstance(info, _StorageInfo) or not isinstance(name, str) or name != Path(name).name:
        raise ValueError(f"a place outside the folder: {name!r}")
    # Versions of torch before 2.7 have none.
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"bytes of {name} that are not stored as they are")
    if info.offset < 0 or info.offset + info.length > (folder / name).stat().st_size:
        raise ValueError(f"{name} is cut short")


def _check_object(folder: Path, info: _StorageInfo) -> None:
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
