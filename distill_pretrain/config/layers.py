"""Recipe files: YAML, `base:` inheritance, and where each key came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_pretrain.config.scalars import RecipeLoader, read_yaml
from distill_pretrain.errors import ConfigError

KeyPath = tuple[str, ...]

COMMAND_LINE = "command line"


@dataclass
class Layer:
    """Settings as read, before the schema sees them.

    Attributes:
        values: nested mappings of plain YAML values.
        origins: key path to "file:line" or "command line".
        problems: what is wrong so far, one line each.
        reported: key paths whose values are among the problems.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reported: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> str:
        """Tell where the key, or the nearest mapping around it, was set."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return self.origins.get((), COMMAND_LINE)

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Replaces one value, creating the mappings on the way to it."""
        target = self.values
        for name in path[:-1]:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[path[-1]] = value
        self._forget_below(path)
        self.origins[path] = origin

    def update(self, child: Layer) -> None:
        """Lays `child` over this layer: mappings merge, everything else is replaced."""
        self._merge(self.values, child.values, child, ())
        self.problems += child.problems
        if () in child.origins:
            self.origins[()] = child.origins[()]

    def _merge(
        self, into: dict[str, Any], values: dict[str, Any], child: Layer, path: KeyPath
    ) -> None:
        for name, value in values.items():
            here = (*path, name)
            if isinstance(value, dict) and isinstance(into.get(name), dict):
                self._merge(into[name], value, child, here)
                self.origins[here] = child.origin(here)
                continue
            into[name] = value
            self._forget_below(here)
            for below, origin in child.origins.items():
                if below[: len(here)] == here:
                    self.origins[below] = origin

    def _forget_below(self, path: KeyPath) -> None:
        for below in [key for key in self.origins if key[: len(path)] == path]:
            del self.origins[below]


def read_layers(path: Path, children: Sequence[Path] = ()) -> Layer:
    """Reads a recipe file over the files its `base:` names.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, or inherits from itself.
    """
    resolved = path.resolve()
    if resolved in children:
        cycle = [*children[list(children).index(resolved) :], resolved]
        raise ConfigError(
            "recipes inherit from each other in a circle",
            where=path,
            found=" -> ".join(file.name for file in cycle),
            remedy="remove one `base:`",
        )
    layer = read_file(path)
    bases = layer.values.pop("base", None)
    if bases is None:
        return layer
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            "`base` names no recipe",
            where=layer.origin(("base",)),
            found=repr(bases),
            expected="a file name or a list of file names, relative to this recipe",
        )
    merged = Layer()
    for name in names:
        base = path.parent / name
        if not base.is_file():
            raise ConfigError("base recipe not found", where=layer.origin(("base",)), found=base)
        merged.update(read_layers(base, [*children, resolved]))
    layer.origins.pop(("base",), None)
    merged.update(layer)
    return merged


def read_file(path: Path) -> Layer:
    """Reads one YAML file, keeping the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=RecipeLoader)
        values = read_yaml(text)
    except FileNotFoundError:
        raise ConfigError("recipe not found", where=path) from None
    except OSError as error:
        raise ConfigError(
            "recipe cannot be read", where=path, found=error.strerror or str(error)
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            "recipe is not UTF-8 text", where=path, found=f"byte offset {error.start}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("recipe is not valid YAML", **_yaml_problem(path, error)) from None
    layer = Layer(origins={(): str(path)})
    if root is None:
        return layer
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "recipe is not a mapping",
            where=path,
            found=type(values).__name__,
            expected="sections, such as `train:`, with keys below them",
        )
    _note_lines(root, (), path, layer, ())
    layer.values = values
    return layer


def _yaml_problem(path: Path, error: Exception) -> dict[str, Any]:
    mark = getattr(error, "problem_mark", None)
    line = "" if mark is None else f":{mark.line + 1}"
    return {
        "where": f"{path}{line}",
        "found": getattr(error, "problem", None) or str(error).splitlines()[0],
    }


def _note_lines(
    node: yaml.MappingNode,
    path: KeyPath,
    file: Path,
    layer: Layer,
    parents: tuple[yaml.Node, ...],
) -> None:
    if node in parents:
        raise ConfigError("an alias contains itself", where=f"{file}:{node.start_mark.line + 1}")
    seen: set[str] = set()
    for key, value in node.value:
        origin = f"{file}:{key.start_mark.line + 1}"
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            layer.problems.append(
                f"{origin}: {'.'.join((*path, str(key.value)))}: a key must be text; "
                "put it in quotes"
            )
            continue
        name = key.value
        here = (*path, name)
        if name in seen:
            layer.problems.append(f"{origin}: {'.'.join(here)}: given twice in this file")
        seen.add(name)
        layer.origins[here] = origin
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, here, file, layer, (*parents, node))
