"""The families that there are: every module of `families` has one or several."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from distill_pretrain.checkpoint.hf import families as _modules
from distill_pretrain.checkpoint.hf.family import Family, TeacherOnly, pieces_of
from distill_pretrain.checkpoint.hf.tensors import Correspondence
from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig


@cache
def _everything() -> tuple[Family | TeacherOnly, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(_modules.__path__))
    found = [import_module(f"{_modules.__name__}.{name}").FAMILIES for name in names]
    every = [family for several in found for family in several]
    return tuple(sorted(every, key=lambda family: family.model_type))


def families() -> dict[str, Family]:
    """Return every family that megatron-core computes by its model_type, in alphabetical order."""
    return {f.model_type: f for f in _everything() if isinstance(f, Family)}


def teachers_only() -> dict[str, TeacherOnly]:
    """Return every other family that is known, in the same way."""
    return {f.model_type: f for f in _everything() if isinstance(f, TeacherOnly)}


def why_not(model_type: object) -> str:
    """Say why there is no family of this model_type."""
    known = teachers_only().get(str(model_type))
    reason = "" if known is None else f": {known.reason}"
    return f"model_type: {model_type} is not supported{reason}"


def family_of(model: ModelConfig) -> Family:
    """Return the family whose class of transformers computes a model, the first with most of its pieces.

    Raises:
        CheckpointError: there is none.
    """
    found = [family for family in families().values() if family.has(model)]
    if found:
        return max(found, key=lambda family: len(family.always))
    pieces = pieces_of(model)
    keys = {piece.partition(":")[0] for piece in pieces}
    reasons = [
        reason
        for family in families().values()
        if family.arch == model.arch and family.always <= pieces <= family.always | family.options
        if (reason := family.cannot_write(model)) is not None
    ]
    raise CheckpointError(
        f"no class of transformers computes this {model.arch} model",
        where=", ".join(f"model.{name}" for name in ModelConfig.model_fields if name in keys)
        or "section model",
        found="; ".join(reasons)
        or ", ".join(f"{name}: {getattr(model, name)}" for name in sorted(keys)),
        expected="the pieces of one family, such as "
        + "; ".join(
            f"{family.model_type} ({', '.join(sorted(family.always)) or 'none'})"
            for family in families().values()
            if family.arch == model.arch
        ),
    )


def correspondence(
    model: ModelConfig, *, vocab_size: int, max_positions: int, family: str | None = None
) -> Correspondence:
    """Return the key map of a model.

    Args:
        model: architecture.
        vocab_size: see `Correspondence`.
        max_positions: see `Correspondence`.
        family: model_type of the folder that is read; null means that of `family_of`, which is written.

    Raises:
        CheckpointError: it is of no family.
    """
    found = family_of(model) if family is None else families()[family]
    return found.tensors(model, vocab_size=vocab_size, max_positions=max_positions)
