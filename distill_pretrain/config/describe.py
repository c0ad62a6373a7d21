"""The keys of recipe sections as text, for `--help`."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from distill_pretrain.config.base import Section
from distill_pretrain.config.documentation import field_documentation
from distill_pretrain.config.loader import section_of

NAMES = {
    int: "integer",
    float: "number",
    bool: "true/false",
    str: "text",
    Path: "path",
    Any: "values",
}


def describe(schema: type[Section], sections: Sequence[str]) -> str:
    """Lists the sections' keys with type, default and documentation."""
    return "\n\n".join("\n".join(_section_lines(schema, name)) for name in sections)


def _section_lines(schema: type[Section], name: str) -> Iterator[str]:
    section = section_of(schema.model_fields[name].annotation)
    if section is None:
        raise KeyError(f"{schema.__name__}.{name} is not a section")
    yield f"{name}:  {inspect.getdoc(section) or ''}".rstrip()
    texts = field_documentation(section)
    for key, field in section.model_fields.items():
        yield f"  {key}: {type_text(field.annotation)}{default_text(field)}"
        if key in texts:
            yield f"      {texts[key]}"


def type_text(annotation: Any) -> str:
    """Name a type in a recipe writer's words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in args)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if part is type(None) else type_text(part) for part in args)
    if origin in (tuple, list):
        return f"list of {type_text(args[0])}"
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return "{" + ", ".join(f"{name}: {type_text(hint)}" for name, hint in hints.items()) + "}"
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    return NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def default_text(field: FieldInfo) -> str:
    """Return what follows the type of a key: its default, or that it is required."""
    if field.is_required():
        return "  (required)"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "  (default null)"
    if isinstance(default, bool):
        return f"  (default {str(default).lower()})"
    if isinstance(default, tuple):
        return f"  (default [{', '.join(map(str, default))}])"
    return f"  (default {default})"
