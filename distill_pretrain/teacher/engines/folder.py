"""What every engine asks of a Hugging Face folder: its configuration, its files, and that nothing foreign runs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.hf.family import wrong_types
from distill_pretrain.checkpoint.hf.files import SINGLE, file_names, header
from distill_pretrain.checkpoint.hf.nested import text_part
from distill_pretrain.errors import (
    DistillPretrainError,
    MissingDependency,
    TeacherError,
    TokenizerMismatch,
)
from distill_pretrain.files.atomic import sha256_file
from distill_pretrain.processes.process import on_first_rank
from distill_pretrain.teacher.config import NO_TRUST, Trust
from distill_pretrain.teacher.engines.text_part import text_config_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def import_transformers() -> Any:
    """Import the package, or say the line that installs it.

    Raises:
        MissingDependency: it is not there.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "transformers", extra="hf", needed_for="a Hugging Face teacher"
        ) from None
    return transformers


def read_config(path: Path, *, vocab_size: int, seq_len: int, trust: Trust = NO_TRUST) -> Any:
    """Read the folder's configuration, of a model that knows the corpus's ids and positions.

    Of a configuration that nests a text model beside a vision or audio model it is the text model's.

    Raises:
        TeacherError, TokenizerMismatch: it cannot be used.
    """
    transformers = import_transformers()
    raw = _require_plain_folder(path, trust)
    _require_known_type(path, raw, transformers, trust)
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust.remote_code
        )
        text = config.get_text_config(decoder=True)
    except Exception as error:  # transformers raises nearly anything here
        raise cannot_be_loaded(path, error) from error
    width = getattr(text, "vocab_size", None)
    if not isinstance(width, int):
        raise TeacherError(
            "the model's configuration does not say how many ids it knows",
            where=path / CONFIG_FILE,
            found=f"vocab_size: {width} (model_type {config.model_type})",
            expected="a causal language model of text",
        )
    require_known_ids(path, width, vocab_size)
    require_positions(path, getattr(text, "max_position_embeddings", None), seq_len)
    if trust.remote_code:
        return config
    return text_config_of(config, raw, has_head=_stores_head(path))


def _stores_head(path: Path) -> bool:
    """Whether a folder's safetensors files have an LM head; False where there are none, which is found later."""
    with suppress(DistillPretrainError):
        named = file_names(path)
        names = named or [name for name, *_ in header(path / SINGLE)]
        return any("lm_head." in name for name in names)
    return False


def _require_plain_folder(path: Path, trust: Trust) -> dict[str, Any]:
    """Refuse what is no model folder, an adapter, and code that was not asked for; returns config.json."""
    try:
        raw = json.loads((path / CONFIG_FILE).read_bytes())
    except OSError:
        raise TeacherError(
            "not a Hugging Face model folder",
            where=path,
            expected="a local folder with config.json and weights",
            remedy="download the model first and set teacher.path to its folder",
        ) from None
    except ValueError as error:
        raise TeacherError(
            "the file is no valid JSON",
            where=path / CONFIG_FILE,
            found=error,
            remedy="download it again",
        ) from None
    if not isinstance(raw, dict):
        raise TeacherError("the file is no JSON object", where=path / CONFIG_FILE)
    if (path / _ADAPTER_FILE).exists():
        # Whether transformers applies it depends on what else is installed.
        raise TeacherError(
            "the folder holds an adapter (PEFT), not a whole model",
            where=path / _ADAPTER_FILE,
            remedy="merge it into its base model (merge_and_unload) and save that with save_pretrained",
        )
    auto_map = raw.get("auto_map") or {}
    own = [name for name in _AUTO_CLASSES if name in auto_map]
    if own and not trust.remote_code:
        raise TeacherError(
            "the folder brings Python code of its own, which is not run",
            where=path / CONFIG_FILE,
            found=f"auto_map: {', '.join(f'{name}: {auto_map[name]}' for name in own)}",
            remedy="read the code and set teacher.trust_remote_code=true (kind hf or deepspeed); or, where "
            f"transformers has its own class for model_type {raw.get('model_type')}, remove auto_map from config.json",
        )
    return raw


def _require_known_type(path: Path, raw: dict[str, Any], transformers: Any, trust: Trust) -> None:
    kind = raw.get("model_type")
    if kind is None or trust.remote_code or kind in transformers.CONFIG_MAPPING:
        return
    raise TeacherError(
        "transformers does not know models of this type",
        where=path / CONFIG_FILE,
        found=f"model_type: {kind} (transformers {transformers.__version__})",
        remedy="install a transformers that has it (pip install -U transformers), or correct config.json",
    )


def cannot_be_loaded(path: Path, error: Exception) -> TeacherError:
    """Make the error to raise after transformers refused."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {' '.join(lines[:2])[:500]}"
    suspects: list[str] = []
    with suppress(OSError, ValueError):
        suspects = wrong_types(text_part(json.loads((path / CONFIG_FILE).read_bytes())))
    return TeacherError(
        "the model cannot be loaded",
        where=path,
        found="; ".join([said, *(f"perhaps for {suspect}" for suspect in suspects)]),
        remedy="correct config.json, download the folder again, or install the transformers that it was made for",
    )


def require_known_ids(path: Path, width: int, vocab_size: int) -> None:
    """Refuse a model with fewer ids than the corpus.

    Raises:
        TokenizerMismatch: see above.
    """
    if width < vocab_size:
        raise TokenizerMismatch(
            "the model's vocabulary is smaller than the corpus's",
            where=path,
            found=f"{width} ids",
            expected=f"at least {vocab_size} ids",
            remedy=another_vocabulary(width, vocab_size),
        )


def another_vocabulary(width: int, vocab_size: int) -> str:
    """Say what to do where a model has another number of ids than a corpus."""
    remedy = "tokenise the corpus with the model's own tokenizer (tokenizer.kind=hf)"
    if width >= vocab_size:
        return remedy
    return (
        f"if the tokenizer merely gained ids that the corpus does not hold (a padding token), set "
        f"data.vocab_size={width}; else {remedy}"
    )


def require_positions(path: Path, longest: int | None, seq_len: int) -> None:
    """Refuse sequences that the model was not made for.

    Raises:
        TeacherError: see above.
    """
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise TeacherError(
            "the sequences are longer than the model allows",
            where=path,
            found=f"data.seq_len = {seq_len}",
            expected=f"at most {longest}",
        )


def files_identity(path: Path, weights: list[Path], trust: Trust = NO_TRUST) -> dict[str, str]:
    """Return file name -> sha256 of what decides the model; every rank of the job calls it, and one reads.

    Args:
        path: of the folder.
        weights: the files that the weights are read from; others in the folder decide nothing.
        trust: the folder's code counts where it may run.
    """
    code = path.glob("*.py") if trust.remote_code else ()
    files = sorted({path / CONFIG_FILE, *weights, *code})
    return on_first_rank(lambda: {f.name: sha256_file(f) for f in files})
