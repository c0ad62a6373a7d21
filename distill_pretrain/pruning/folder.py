"""The source's files, checked before anything is loaded, and the folder of a smaller model, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.checkpoint.hf.config import CONFIG, hf_config, read_hf_model
from distill_pretrain.checkpoint.hf.family import DTYPE_NAMES, Family
from distill_pretrain.checkpoint.hf.files import (
    DTYPES,
    Tensor,
    TensorFile,
    WeightFiles,
    plan_files,
    write_index,
)
from distill_pretrain.checkpoint.hf.load import check_hf_weights
from distill_pretrain.checkpoint.hf.nested import text_part
from distill_pretrain.checkpoint.hf.registry import families
from distill_pretrain.checkpoint.hf.save import MAX_SHARD_BYTES
from distill_pretrain.checkpoint.record import hash_files
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import canonical_json, publish_bytes
from distill_pretrain.files.disk import require_room
from distill_pretrain.files.folders import building, replace_folder
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.slicing import Cut

RECORD = "prune.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face folder to prune, of which only config.json and headers of files have been read.

    Attributes:
        folder: of the model.
        config: its config.json.
        model: the same architecture as a section `model`.
        vocab_size: rows of its embedding.
        files: where its tensors are.
        dtype: "fp32" or "bf16", of what is written; fp16 becomes fp32, which holds its numbers.
    """

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    vocab_size: int
    files: WeightFiles
    dtype: str

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read what describes the model.

        Raises:
            CheckpointError: a model that cannot be pruned, files that are missing or damaged, or tensors that are not
                the model's.
        """
        found = read_hf_model(folder)
        family = families()[found.family]
        if family.unpruned is not None:
            raise unsupported(folder, family)
        return cls(
            folder=folder,
            config=_own_config(folder),
            model=found.model,
            vocab_size=found.vocab_size,
            files=check_hf_weights(folder),
            dtype="bf16" if found.dtype == "bf16" else "fp32",
        )

    def sha256(self) -> str:
        """Hash config.json and all weights, as train.start_from does; every byte is read."""
        names = sorted({CONFIG, *self.files.files.values()})
        return hashlib.sha256(canonical_json(hash_files(self.folder, names))).hexdigest()

    def config_of(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json of a model of this kind in other sizes: what pruning does not touch stays as it is."""
        config = dict(self.config)
        known = hf_config(
            model,
            vocab_size=self.vocab_size,
            max_positions=config["max_position_embeddings"],
            dtype=self.dtype,
        )
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        for key in (*sizes, "num_key_value_heads", "head_dim"):
            config[key] = known[key]
        if known["model_type"] == "mistral" and config["model_type"] == "llama":
            # Of the same function; LlamaConfig refuses widths that the heads do not divide.
            for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
                config.pop(key, None)
            for key in ("model_type", "architectures", "sliding_window"):
                config[key] = known[key]
        own = families()[self.config["model_type"]].config(model, config["max_position_embeddings"])
        for key in ("layer_types", "no_rope_layers"):
            if key in own:
                config[key] = own[key]
            elif config.get(key):
                config[key] = config[key][: model.num_layers]
        dtypes = {short: name for name, short in DTYPE_NAMES.items()}
        for key in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
            config[key] = dtypes[self.dtype]
        return config


def _own_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; that of the text model alone, which is what becomes smaller, where it nests one."""
    raw = json.loads((folder / CONFIG).read_bytes())
    config = text_part(raw)
    if config is raw:
        return config
    return {**config, "architectures": [families()[config["model_type"]].architecture]}


def unsupported(where: Path, family: Family) -> CheckpointError:
    """Make what to raise for a model of a family that is not pruned."""
    return CheckpointError(
        "models of this family cannot be pruned",
        where=where,
        found=f"{family.title} ({family.model_type}): {family.unpruned}",
        expected=", ".join(name for name, kind in families().items() if kind.unpruned is None),
        remedy="prune a model of one of these families; or set the sizes of a smaller student in the section model, "
        "and train it from fresh weights",
    )


def require_replaceable(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a folder exists that is not what this job makes."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / RECORD).read_bytes())["identity"]
    if found != dict(identity):
        raise CheckpointError(
            "the folder exists and is something else",
            where=folder,
            found="a model pruned from another source or in another way"
            if found
            else "other files",
            remedy="set another prune.output_dir, rename the target, or remove the folder",
        )


def write_folder(
    folder: Path,
    source: Source,
    config: Mapping[str, Any],
    cuts: list[Cut],
    record: Mapping[str, Any],
) -> None:
    """Write the folder of a smaller model; what else lies beside the source's weights, such as a tokenizer, is copied.

    Args:
        folder: to be made, or replaced.
        source: that the tensors are cut out of.
        config: of the smaller model.
        cuts: its tensors.
        record: for prune.json.

    Raises:
        StorageError: there is no room for it, or it cannot be written.
    """
    tensors = [Tensor(name=cut.name, shape=cut.shape) for cut in cuts]
    files = plan_files([tensors], dtype=source.dtype, max_shard_bytes=MAX_SHARD_BYTES)
    by_name = {cut.name: cut for cut in cuts}
    temporary = folder.with_name(f"{folder.name}.tmp")
    with building(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        needed = sum(tensor.num_bytes(source.dtype) for tensor in tensors)
        require_room(temporary, needed, what="the model", remedy="set another prune.output_dir")
        for file in files:
            with TensorFile(temporary / file.name, file.tensors, source.dtype) as out:
                for tensor in file.tensors:
                    values = by_name[tensor.name].read(source.files)
                    out.append(tensor.name, values.to(DTYPES[source.dtype]))
        write_index(temporary, files, source.dtype)
        _copy_rest(source.folder, temporary)
        publish_bytes(temporary / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        publish_bytes(temporary / RECORD, _lines(record))
        replace_folder(folder, temporary)


def _lines(record: Mapping[str, Any]) -> bytes:
    """Write JSON with a line for each key: the numbers of thousands of channels want no lines of their own."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return f"{{\n{lines}\n}}\n".encode()


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and the like; no weights, no records of how the source was made."""
    for path in sorted(source.iterdir()):
        is_weights = any(path.match(pattern) for pattern in _WEIGHTS)
        if path.name in (CONFIG, RECORD, "export.json") or is_weights or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "tokenizer":
            shutil.copytree(path, folder / path.name)
