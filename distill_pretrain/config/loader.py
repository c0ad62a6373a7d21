"""From a recipe file and the command line to a validated recipe, and back to a file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distill_pretrain.config.base import Section
from distill_pretrain.config.layers import COMMAND_LINE, KeyPath, Layer, read_layers
from distill_pretrain.config.scalars import as_annotated, read_yaml
from distill_pretrain.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_recipe(schema: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Reads a recipe.

    Args:
        schema: the recipe's class; its fields are the sections.
        path: YAML file, which may inherit from others (`base: other.yaml`); None starts empty.
        overrides: `section.key=value`, the value in YAML; they win over the file.

    Returns:
        The validated recipe. Relative paths in it stay relative to the working directory.

    Raises:
        ConfigError: lists every problem, one per line, each with its file and line.
    """
    layer = Layer() if path is None else read_layers(path)
    for text in overrides:
        _apply_override(schema, layer, text)
    layer.values = _known_part(schema, schema, layer, layer.values, ())
    try:
        recipe = schema.model_validate(layer.values)
    except ValidationError as error:
        layer.problems += [
            _schema_problem(layer, detail)
            for detail in error.errors()
            if not _is_reported(layer, detail)
        ]
    if layer.problems:
        count = len(layer.problems)
        title = "the recipe has a problem:" if count == 1 else f"the recipe has {count} problems:"
        raise ConfigError("\n  ".join([title, *layer.problems]))
    return recipe


def recipe_text(recipe: Section) -> str:
    """Write the recipe as YAML that `load_recipe` reads back to an equal one; absent sections are left out."""
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if v is not None}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def dump_recipe(recipe: Section, path: Path) -> None:
    """Writes `recipe_text`, under its final name only once complete; a kill leaves at most a hidden file.

    A file that says the same already is left alone: it may be kept read-only.
    """
    text = recipe_text(recipe)
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = os.fspath(path)  # a full disk names none, others the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require(recipe: Section, verb: str, *sections: str) -> None:
    """Checks that a verb's sections are there.

    Raises:
        ConfigError: names all that are missing.
    """
    missing = [name for name in sections if getattr(recipe, name) is None]
    if missing:
        raise ConfigError(
            f"`{verb}` needs recipe sections that are missing",
            found=f"no {', '.join(missing)}",
            remedy=f"add them to the recipe; `distill-pretrain {verb} --help` lists their keys",
        )


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class that a field's annotation holds (`X` or `X | None`), if any."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _apply_override(schema: type[Section], layer: Layer, text: str) -> None:
    key, equals, value_text = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        layer.problems.append(f"{COMMAND_LINE}: {text}: expected section.key=value")
        return
    if not value_text.strip():
        layer.problems.append(
            f"{COMMAND_LINE}: {key}: no value given; write {key}=null or {key}=''"
        )
        return
    try:
        value = read_yaml(value_text)
    except (yaml.YAMLError, ValueError) as error:
        what = getattr(error, "problem", None) or "not valid YAML"
        layer.problems.append(f"{COMMAND_LINE}: {key}: {what}; found: {value_text}")
        return
    unknown = _first_unknown(schema, path)
    if unknown:
        layer.problems.append(f"{COMMAND_LINE}: {_unknown_key(schema, unknown)}")
        return
    layer.set(path, value, COMMAND_LINE)


def _first_unknown(schema: type[Section], path: KeyPath) -> KeyPath | None:
    """The shortest prefix of `path` that the schema does not have."""
    level: type[Section] | None = schema
    for depth, name in enumerate(path):
        if level is None:
            # Below a plain value there is nothing to name, below a mapping any name goes.
            return None if _is_mapping_field(schema, path[:depth]) else path[: depth + 1]
        if name not in level.model_fields:
            return path[: depth + 1]
        level = section_of(level.model_fields[name].annotation)
    return None


def _is_mapping_field(schema: type[Section], path: KeyPath) -> bool:
    level: type[Section] | None = schema
    annotation: Any = None
    for name in path:
        if level is None or name not in level.model_fields:
            return False
        annotation = level.model_fields[name].annotation
        level = section_of(annotation)
    return any(
        getattr(part, "__origin__", part) is dict for part in (annotation, *get_args(annotation))
    )


def _known_part(
    root: type[Section],
    schema: type[Section],
    layer: Layer,
    values: dict[str, Any],
    path: KeyPath,
) -> dict[str, Any]:
    """Drops keys the schema does not have, noting each as a problem."""
    known = {}
    for name, value in values.items():
        here = (*path, str(name))
        if name not in schema.model_fields:
            if isinstance(name, str):  # other keys were reported when the file was read
                layer.problems.append(f"{layer.origin(here)}: {_unknown_key(root, here)}")
            continue
        annotation = schema.model_fields[name].annotation
        inner = section_of(annotation)
        if inner is not None and isinstance(value, dict):
            known[name] = _known_part(root, inner, layer, value, here)
            continue
        value = as_annotated(value, annotation)
        if isinstance(value, bool) and annotation_takes_number_only(annotation):
            # pydantic would take `true` for 1.
            layer.problems.append(
                f"{layer.origin(here)}: {'.'.join(here)}: found: {str(value).lower()}; "
                "expected: a number"
            )
            layer.reported.add(here)
        known[name] = value
    return known


def annotation_takes_number_only(annotation: Any) -> bool:
    """Tell whether a field is int or float (or null), so that true and false are mistakes."""
    parts = set(get_args(annotation) or (annotation,)) - {type(None)}
    return bool(parts) and parts <= {int, float}


def _is_reported(layer: Layer, detail: ErrorDetails) -> bool:
    path = tuple(map(str, detail["loc"]))
    # A file's keys were judged when it was read; those in a value of the command line were not.
    is_key = path[-1:] == ("[key]",) and layer.origin(path) != COMMAND_LINE
    return is_key or path in layer.reported


def _unknown_key(root: type[Section], path: KeyPath) -> str:
    name = path[-1]
    elsewhere = [other for other in _all_keys(root) if other[-1] == name and other != path]
    level: type[Section] | None = root
    for part in path[:-1]:
        level = section_of(level.model_fields[part].annotation) if level else None
    siblings = list(level.model_fields) if level else []
    close = difflib.get_close_matches(name, siblings, n=1)
    guesses = elsewhere[:3] or [(*path[:-1], guess) for guess in close]
    message = f"{'.'.join(path)}: unknown key"
    if guesses:
        return f"{message}; did you mean {' or '.join('.'.join(guess) for guess in guesses)}?"
    if siblings:
        return f"{message}; expected one of: {', '.join(siblings)}"
    return message


def _all_keys(schema: type[Section], path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in schema.model_fields.items():
        yield (*path, name)
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*path, name))


def _schema_problem(layer: Layer, detail: ErrorDetails) -> str:
    path = tuple(str(part) for part in detail["loc"])
    if path[-1:] == ("[key]",):
        return f"{layer.origin(path)}: {'.'.join(path[:-1])}: a key must be text; put it in quotes"
    prefix = f"{layer.origin(path)}: {'.'.join(path) or 'recipe'}"
    if detail["type"] == "missing":
        return f"{prefix}: required, not given"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{prefix}: {message}"
    message = "a path" if detail["type"] == "path_type" else message
    message = message.removeprefix("Input should be ")
    return f"{prefix}: found: {_shown(detail['input'])}; expected: {message}"


def _shown(value: Any) -> str:
    """A value as a recipe would give it; text stands as it is, since the key decides what it is read as."""
    if isinstance(value, str) and value.strip():
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
