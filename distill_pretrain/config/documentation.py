"""The documentation of a section's fields: the strings below them in the source.

Pydantic can collect them too (`use_attribute_docstrings`), but does so for every class as it is made, which was a third
of the time that a command takes to start; they are wanted for `--help` and the pages alone.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from distill_pretrain.config.base import Section


def field_documentation(section: type[Section]) -> dict[str, str]:
    """Return the documentation by field; inherited fields too.

    A field's own `description` wins over the string below it. Fields without either, and all strings where the source
    is not at hand, are left out.
    """
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        found.update(_of_module(kind.__module__).get(kind.__qualname__, {}))
    found = {name: text for name, text in found.items() if name in section.model_fields}
    own = {name: field.description for name, field in section.model_fields.items()}
    return found | {name: text for name, text in own.items() if text}


@cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    """Class -> field -> documentation; only modules of sections are read."""
    module = sys.modules.get(name)
    classes = [] if module is None else [v for v in vars(module).values() if _is_section(v)]
    path = getattr(module, "__file__", None)
    if path is None or not classes:
        return {}
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError):
        return {}
    return dict(_classes(tree, ""))


def _is_section(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Section)


def _classes(node: ast.AST, scope: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name = f"{scope}{child.name}"
            yield name, dict(_fields(child))
            yield from _classes(child, f"{name}.")
        elif isinstance(child, ast.FunctionDef):
            yield from _classes(child, f"{scope}{child.name}.<locals>.")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = below.value.value
            if isinstance(text, str):
                yield field.target.id, inspect.cleandoc(text)
