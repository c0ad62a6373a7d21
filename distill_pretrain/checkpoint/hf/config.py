"""config.json to and from the section `model`; what megatron-core cannot represent is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distill_pretrain.checkpoint.hf.family import (
    DTYPE_NAMES,
    dtype_of,
    general_problems,
    wrong_types,
)
from distill_pretrain.checkpoint.hf.nested import text_part
from distill_pretrain.checkpoint.hf.registry import families, family_of, why_not
from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """What the config.json of a Hugging Face folder describes.

    Attributes:
        model: the same architecture as a section `model`.
        vocab_size: V, rows of the embedding.
        max_positions: longest sequence the model was made for; of a gpt2 model the number of learned positions.
        dtype: "fp32", "bf16" or "fp16", of the stored weights.
        family: model_type.
    """

    model: ModelConfig
    vocab_size: int
    max_positions: int
    dtype: str
    family: str


def read_hf_model(path: Path) -> HFModel:
    """Describe the (text) model of a Hugging Face folder, from its config.json alone.

    Raises:
        CheckpointError: no such folder, or a model that megatron-core cannot represent; lists every reason.
    """
    raw = text_part(_read_json(path / CONFIG))
    wrong = wrong_types(raw)
    if wrong:
        raise _wrong(path, wrong)
    family = families().get(str(raw.get("model_type")))
    if family is None:
        problems = [why_not(raw.get("model_type")), *general_problems(raw)]
        raise _unsupported(path, problems)
    problems = family.problems(raw)
    if problems:
        raise _unsupported(path, problems)
    try:
        return HFModel(
            model=family.section(raw),
            vocab_size=int(raw["vocab_size"]),
            max_positions=int(raw[family.longest]),
            dtype=DTYPE_NAMES[dtype_of(raw)],
            family=family.model_type,
        )
    except ValidationError as error:
        details = error.errors()
        known = _wrong if all(detail["loc"] for detail in details) else _unsupported
        raise known(path, list(map(_in_words, details))) from None
    except (ValueError, TypeError) as error:
        raise _unsupported(path, [str(error)]) from None


def _in_words(detail: ErrorDetails) -> str:
    """Say what pydantic refused of the section model."""
    said = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return said
    return f"model.{'.'.join(map(str, detail['loc']))}: {detail['input']!r} ({said})"


def hf_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    dtype: str,
    eod_id: int | None = None,
    bos_id: int | None = None,
) -> dict[str, Any]:
    """Make the config.json of a model of this project.

    Args:
        model: architecture.
        vocab_size: V, without padding.
        max_positions: longest sequence it was trained on.
        dtype: "fp32" or "bf16", of the weights beside it.
        eod_id: token that ends a document.
        bos_id: token that began every document it was trained on; None where there was none.

    Raises:
        CheckpointError: no class of transformers computes this model.
    """
    family = family_of(model)
    names = {short: name for name, short in DTYPE_NAMES.items()}
    return {
        "vocab_size": vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": names[dtype],
        "bos_token_id": bos_id,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "use_cache": True,
        **family.config(model, max_positions),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        raise CheckpointError(
            "not a Hugging Face model folder",
            where=path.parent,
            expected=f"a local folder with {CONFIG} and *.safetensors",
            remedy="download the model first and name its folder",
        ) from None
    except ValueError as error:
        raise CheckpointError("the file is no valid JSON", where=path, found=error) from None
    if not isinstance(raw, dict):
        raise CheckpointError("the file is no JSON object", where=path)
    return raw


def _wrong(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "the configuration has values that no model has:\n"
        + "\n".join(f"  - {p}" for p in problems),
        where=path / CONFIG,
        remedy="download the folder again, or correct its config.json",
    )


def _unsupported(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "megatron-core cannot run this model as it is:\n" + "\n".join(f"  - {p}" for p in problems),
        where=path / CONFIG,
        expected=f"one of {', '.join(families())}",
        remedy="set teacher.kind=hf for a teacher; a student cannot start from it",
    )
