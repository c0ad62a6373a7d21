"""What the public functions refuse before they look at a value: shapes, dtypes, devices, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from distill_pretrain.config import Section
from distill_pretrain.errors import ConfigError, LossInputError

S = TypeVar("S", bound=Section)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of logits, hidden states and LM heads."""


def require_tensor(
    name: str,
    value: object,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise LossInputError unless an argument is a tensor of one of the dtypes, of the shape and on the device.

    Args:
        name: of the argument.
        value: the argument.
        dtypes: that it may have.
        shape: sizes, or names of sizes that may be anything; None does not look.
        device: None does not look.
    """
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if shape is not None:
        expected += f" [{', '.join(map(str, shape))}]"
    if device is not None:
        expected += f" on {device}"
    if not isinstance(value, torch.Tensor):
        raise LossInputError(
            "an argument of the loss is no tensor", where=name, found=type(value), expected=expected
        )
    fits = value.dtype in dtypes and (device is None or value.device == device)
    if shape is not None:
        sizes = zip(shape, value.shape, strict=False)
        fits &= len(shape) == value.ndim
        fits &= all(isinstance(size, str) or size == found for size, found in sizes)
    if not fits:
        raise LossInputError(
            "an argument of the loss has the wrong dtype, shape or device",
            where=name,
            found=f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}",
            expected=expected,
        )


def section(kind: type[S], settings: Mapping[str, Any]) -> S:
    """Make a section of a recipe of a function's arguments, checked as a recipe is.

    Raises:
        ConfigError: lists every argument that it does not take.
    """
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        problems = [
            f"where: {'.'.join(map(str, detail['loc'])) or 'arguments'}; found: {detail['input']!r}; "
            f"expected: {detail['msg'].removeprefix('Value error, ').removeprefix('Input should be ')}"
            for detail in error.errors()
        ]
        raise ConfigError(
            "\n  ".join(["arguments are none that the function takes:", *problems])
        ) from None
