"""safetensors files, one tensor in memory at a time.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, data_offsets), and the data.
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distill_pretrain.checkpoint.hf.nested import RENAMED, is_of_other_part, renamed
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import fsync_path, publish_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_CODES = {"fp32": "F32", "bf16": "BF16"}
_READABLE = ("F32", "BF16", "F16")
_ITEM_BYTES = {"fp32": 4, "bf16": 2}
# Buffers that old versions of transformers stored and computes itself.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_LISTED = 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The tensors of a Hugging Face folder.

    Attributes:
        folder: where they are.
        files: tensor name -> file name.
        stored: tensor name -> its name in the file, where that is another.
    """

    folder: Path
    files: dict[str, str]
    stored: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        expected: Mapping[str, tuple[int, ...]],
        *,
        tied: tuple[str, str] | None,
        nested: bool = False,
    ) -> WeightFiles:
        """Find every tensor and compare names, shapes and dtypes with what the model needs; reads headers only.

        Args:
            folder: with model.safetensors, or model.safetensors.index.json and its files.
            expected: tensor name -> shape.
            tied: head and embedding of a tied model; the head may be stored too if it is the same.
            nested: other models are beside the text model: their tensors are left out.

        Raises:
            CheckpointError: a file is missing or damaged, or tensors are missing, not of the model, or of another
                shape or type; lists all of them.
        """
        named = file_names(folder)
        found: dict[str, tuple[str, tuple[int, ...], str]] = {}
        stored: dict[str, str] = {}
        remedy = "download the folder again, or correct its config.json"
        for file in sorted(set(named.values()) if named else {SINGLE}):
            for own_name, shape, dtype in header(folder / file):
                if nested and is_of_other_part(own_name):
                    continue
                name = renamed(own_name, RENAMED) if nested else own_name
                found[name], stored[name] = (file, shape, dtype), own_name
        files = {name: file for name, (file, _, _) in found.items()}
        weights = cls(folder=folder, files=files, stored=stored)
        extra = [n for n in files if n not in expected and not n.endswith(_COMPUTED)]
        problems = []
        if tied is not None and tied[0] in extra:
            extra.remove(tied[0])
            if not weights.same(*tied):
                problems.append(f"{tied[0]} and {tied[1]} differ, though config.json ties them")
                remedy = (
                    "set tie_word_embeddings: false in config.json if the head is the model's own"
                )
        missing = [name for name in expected if name not in found]
        problems += [f"{name} is missing" for name in missing]
        if missing == ["lm_head.weight"] and tied is None:
            remedy = "set tie_word_embeddings: true in config.json if the head is the embedding"
        problems += [f"{name} is not of this model" for name in extra]
        for name, shape in expected.items():
            _, found_shape, dtype = found.get(name, ("", shape, _READABLE[0]))
            if found_shape != shape:
                problems.append(f"{name} has shape {list(found_shape)}, not {list(shape)}")
            if dtype not in _READABLE:
                problems.append(f"{name} is stored as {dtype}, not {', '.join(_READABLE)}")
        if problems:
            raise CheckpointError(
                "the weights are not those of the model in config.json:\n" + bullets(problems),
                where=folder,
                remedy=remedy,
            )
        return weights

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """Read a part of a tensor, as stored; pages of the rest are not touched."""
        # Opened for each part: what a mapping has read stays in memory until the file is closed.
        with _safe_open(self.folder / self.files[name]) as file:
            part: torch.Tensor = file.get_slice(self.stored.get(name, name))[index]
            return part

    def same(self, name: str, other: str) -> bool:
        """Say whether two stored tensors are equal."""
        if other not in self.files:
            return False
        everything = (slice(None),)
        return torch.equal(self.read(name, everything), self.read(other, everything))


def file_names(folder: Path) -> dict[str, str]:
    """Read the index, tensor name -> file name; it is empty where there is a single file.

    Raises:
        CheckpointError: no weights, an index that is damaged or names files that are not there, or both an index and
            a single file.
    """
    path = folder / INDEX
    if path.exists() and (folder / SINGLE).exists():
        # Readers differ in which of them they take.
        raise CheckpointError(
            "the folder holds its weights twice, and they may differ",
            where=folder,
            found=f"{SINGLE} and {INDEX}",
            remedy="remove the one that is not the model's",
        )
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(
                "no weights found",
                where=folder,
                expected=f"{SINGLE}, or {INDEX} and the files it names",
                remedy="convert other formats with transformers' save_pretrained",
            )
        return {}
    try:
        named = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the index of the weights is damaged", where=path, found=error
        ) from None
    if not named or any(Path(str(file)).name != file for file in named.values()):
        raise CheckpointError(
            "the index of the weights is damaged",
            where=path,
            expected="weight_map: tensor name -> file in the same folder",
        )
    missing = sorted(file for file in set(named.values()) if not (folder / file).exists())
    if missing:
        raise CheckpointError(
            "files of the weights are missing",
            where=folder,
            found=", ".join(missing[:_LISTED]),
            remedy="download the folder again",
        )
    return named


def header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors' name of the dtype of every tensor in a file.

    Raises:
        CheckpointError: the file is damaged, cut short, or no safetensors file.
    """
    with _safe_open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [(n, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()]


def _safe_open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        if _starts_with(path, _LFS_POINTER):
            raise CheckpointError(
                "a file of weights was not downloaded: it is a pointer of Git LFS",
                where=path,
                remedy="run `git lfs pull` in its folder, or download the file",
            ) from None
        raise CheckpointError(
            "a file of weights is damaged or cut short",
            where=path,
            found="an empty file" if path.exists() and not path.stat().st_size else error,
            remedy="download or export it again",
        ) from None


def _starts_with(path: Path, beginning: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def bullets(lines: Sequence[str]) -> str:
    """Write the first lines of a list, indented, and how many more there are."""
    shown = [f"  - {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"  - and {len(lines) - _LISTED} more")
    return "\n".join(shown)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written: name and shape."""

    name: str
    shape: tuple[int, ...]

    def num_bytes(self, dtype: str) -> int:
        """Return the bytes that it takes in a file."""
        return math.prod(self.shape) * _ITEM_BYTES[dtype]


class TensorFile:
    """Writes a safetensors file tensor by tensor; a context manager.

    Args:
        path: of the file; replaced if it exists.
        tensors: what will be written, in this order.
        dtype: "fp32" or "bf16".
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor], dtype: str) -> None:
        self._path = path
        self._left = list(tensors)
        self._dtype = dtype
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorFile:
        self._file = open(self._path, "wb")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self._left:
            start, end = end, end + tensor.num_bytes(self._dtype)
            header[tensor.name] = {
                "dtype": _CODES[self._dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def append(self, name: str, values: torch.Tensor) -> None:
        """Write the next tensor, on the CPU and of the file's dtype."""
        tensor = self._left.pop(0)
        assert self._file is not None and (tensor.name, tensor.shape) == (name, tuple(values.shape))
        assert values.dtype == DTYPES[self._dtype]
        self._file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        if kind is None:
            assert not self._left
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file of an export.

    Attributes:
        name: of the file.
        stage: pipeline stage that writes it.
        tensors: what it holds, in order.
    """

    name: str
    stage: int
    tensors: list[Tensor]


def plan_files(
    stages: Sequence[Sequence[Tensor]], *, dtype: str, max_shard_bytes: int
) -> list[PlannedFile]:
    """Distribute the tensors of each pipeline stage over files of at most `max_shard_bytes` (or one tensor)."""
    groups: list[tuple[int, list[Tensor]]] = []
    for stage, tensors in enumerate(stages):
        size = max_shard_bytes + 1
        for tensor in tensors:
            size += tensor.num_bytes(dtype)
            if size > max_shard_bytes:
                groups.append((stage, []))
                size = tensor.num_bytes(dtype)
            groups[-1][1].append(tensor)
    if len(groups) == 1:
        return [PlannedFile(name=SINGLE, stage=groups[0][0], tensors=groups[0][1])]
    return [
        PlannedFile(
            name=f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            stage=stage,
            tensors=tensors,
        )
        for number, (stage, tensors) in enumerate(groups, 1)
    ]


def write_index(folder: Path, files: Sequence[PlannedFile], dtype: str) -> None:
    """Publish the index of several files; a single one has none."""
    if len(files) == 1:
        return
    total = sum(tensor.num_bytes(dtype) for file in files for tensor in file.tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
    }
    publish_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    fsync_path(folder)
