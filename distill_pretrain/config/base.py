"""The base class of every recipe section."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 4095


class Section(BaseModel):
    """A frozen, keyword-only, typed group of settings; unknown keys are refused.

    Fields carry their documentation as the docstring below them; `distill-pretrain VERB --help` prints it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        defer_build=True,  # a command validates few of the sections, and --help none
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _paths_can_be_named(cls, value: Any) -> Any:
        for path in _paths_in(value):
            _require_nameable(str(path))
        return value


def nameable(location: str | None) -> str | None:
    """Return the same path or URL; for validators of keys that take either, which are no `Path`."""
    if location is not None:
        _require_nameable(location)
    return location


def _require_nameable(path: str) -> None:
    """Raise ValueError where no file system takes a path or URL: the operating system's own error names no key."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(
            f"found: {path!r}; expected: a path of characters that UTF-8 has"
        ) from None
    if b"\0" in name:
        raise ValueError(f"found: {path!r}; expected: a path without zero bytes")
    longest = max(map(len, name.split(b"/")))
    if longest > _MOST_NAME_BYTES or len(name) > _MOST_PATH_BYTES:
        raise ValueError(
            f"found: {path[:40]}... ({len(name)} bytes, the longest name in it {longest}); expected: a path of at "
            f"most {_MOST_PATH_BYTES} bytes, of names of at most {_MOST_NAME_BYTES}"
        )


def _paths_in(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths_in(part)
