"""One line of `distill-pretrain doctor`, and how it looks for a package. Standard library alone."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_MOST_DETAIL = 200


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked for.
        found: version, or "missing", or what is wrong with it.
        usable: whether it can be used.
        required: whether nothing works without it.
        enables: what it is for.
        install: what to do where it is not usable.
    """

    name: str
    found: str
    usable: bool = True
    required: bool = False
    enables: str
    install: str = ""

    def lines(self, width: int) -> list[str]:
        """Return the finding as text."""
        mark = "ok" if self.usable else ("MISSING" if self.required else "-")
        lines = [f"{mark:<8}{self.name:<{width}}  {self.found}  ({self.enables})"]
        if not self.usable and self.install:
            lines.append(f"{'':<8}{'':<{width}}  -> {self.install}")
        return lines


def try_import(module: str, *, top: str | None = None) -> tuple[Any, str]:
    """Return (module, "") or (None, what is wrong); a broken package raises nearly anything when imported."""
    try:
        if importlib.util.find_spec(top or module.partition(".")[0]) is None:
            return None, "missing"
        return _quietly(lambda: importlib.import_module(module)), ""
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return None, "missing"
        return None, f"needs {error.name}" if error.name else f"{error}"
    except Exception as error:
        text = " ".join(str(error).split())[:_MOST_DETAIL]
        return None, f"cannot be imported: {type(error).__name__}: {text}"


def _quietly(action: Callable[[], Any]) -> Any:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    finally:
        logging.disable(disabled)


def version_of(*distributions: str) -> str:
    """Return the version of the first of these that is installed."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "version unknown"
