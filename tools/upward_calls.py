"""Runs a command of the package and lists the calls that go up: into a room that is above the caller's.

    python tools/upward_calls.py eval recipe.yaml

Imports go one way, which `lint-imports` checks; calls need not, since a function may be handed down and called there.
A room is a folder or a file directly in the package. Its floor is one above the highest of those it imports, as its
files say. Calls of one room's function by another are counted once, however often they happen, and through other
libraries too; what runs while modules are imported is left out, and so is what other processes do.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import distill_pretrain
from distill_pretrain.cli.main import main as run_command

PACKAGE = Path(distill_pretrain.__file__).parent


class Call(NamedTuple):
    """Who calls whom: rooms, and functions as FILE:NAME."""

    caller_room: str
    caller: str
    room: str
    function: str


@cache
def room_of(file: str) -> str | None:
    """The room that a file of the package is in; None for files of others."""
    path = Path(file)
    if not path.is_relative_to(PACKAGE):
        return None
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def _imported(node: ast.AST) -> Iterator[str]:
    """Rooms that a statement, or one inside it, imports when it runs."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_pretrain"):
        below = (node.module or "").split(".")[1:2]
        yield from below or (alias.name for alias in node.names)
    elif isinstance(node, ast.Import):
        names = (alias.name.split(".") for alias in node.names)
        yield from (name[1] for name in names if name[0] == "distill_pretrain" and len(name) > 1)
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


def floors() -> dict[str, int]:
    """Every room's floor, from 1; rooms that import each other, of which there are none, would never end."""
    imports: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = room_of(str(file))
        assert room is not None
        imports.setdefault(room, set()).update(_imported(ast.parse(file.read_text())))

    @cache
    def floor(room: str) -> int:
        below = [floor(other) for other in imports[room] - {room} if other in imports]
        return 1 + max(below, default=0)

    return {room: floor(room) for room in imports}


class Calls:
    """Takes note of calls between rooms, as a profile function of Python."""

    def __init__(self) -> None:
        self.seen: set[Call] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Python calls this at every call."""
        room = room_of(frame.f_code.co_filename)
        if event != "call" or room is None or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and room_of(caller.f_code.co_filename) is None:
            caller = caller.f_back
        if caller is None or caller.f_code.co_name == "<module>":
            return
        caller_room = room_of(caller.f_code.co_filename)
        if caller_room is not None and caller_room != room:
            names = _name(caller.f_code), _name(frame.f_code)
            self.seen.add(Call(caller_room, names[0], room, names[1]))


def _name(code: CodeType) -> str:
    name = getattr(code, "co_qualname", code.co_name)  # of Python 3.11
    return f"{Path(code.co_filename).relative_to(PACKAGE)}:{name}"


def main() -> int:
    """Run the command, then print."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    calls, floor = Calls(), floors()
    threading.setprofile(calls)
    sys.setprofile(calls)
    try:
        status = run_command(sys.argv[1:])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    up = sorted(call for call in calls.seen if floor[call.room] > floor[call.caller_room])
    print(f"{len(calls.seen)} calls from room to room, {len(up)} of them up:")
    for call in up:
        print(
            f"  {floor[call.caller_room]} -> {floor[call.room]}  {call.caller} -> {call.function}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
