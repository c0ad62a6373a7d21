"""What an operation's host code needs of a device: named kernels that can be launched. Standard library alone."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

KERNELS = Path(__file__).parents[1]
"""Sources include each other relative to this folder."""

SHARED = "cuda"
"""Folder of the headers that every source may include."""


@dataclass(frozen=True, kw_only=True)
class KernelSource:
    """A CUDA source and the kernels that are instantiated from it.

    Attributes:
        folder: below `KERNELS`, such as "sparse_kd".
        entry: file in it, such as "sparse_kd.cuh".
        kernels: C++ name expressions, such as "sparse_kd::row_statistics<bf16, true>".
    """

    folder: str
    entry: str
    kernels: tuple[str, ...]

    def text(self) -> bytes:
        """Return the contents of the entry file."""
        return (KERNELS / self.folder / self.entry).read_bytes()

    def headers(self) -> dict[str, bytes]:
        """Read what the entry may include: files of its own folder, and shared ones as ../cuda/NAME.

        Shared headers include each other by their bare names.
        """
        found = {path.name: path.read_bytes() for path in _sources(self.folder)}
        for path in _sources(SHARED):
            found[f"../{SHARED}/{path.name}"] = found[path.name] = path.read_bytes()
        return found

    def digest(self) -> str:
        """Return the sha256 over everything that makes up the compiled image, but for compiler and options."""
        parts = [self.text(), *(kernel.encode() for kernel in self.kernels)]
        for name, content in sorted(self.headers().items()):
            parts += [name.encode(), content]
        seen = hashlib.sha256()
        for part in parts:
            seen.update(hashlib.sha256(part).digest())
        return seen.hexdigest()


class Launcher(Protocol):
    """Runs the kernels of one `KernelSource` on one device."""

    def launch(
        self,
        kernel: str,
        arguments: ctypes.Structure,
        *,
        grid: tuple[int, int],
        block: int,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Start a kernel on the current stream.

        Args:
            kernel: name expression in the source's `kernels`.
            arguments: the kernel's only parameter, passed by value.
            grid: blocks along x and y.
            block: threads per block.
            shared_bytes: dynamic shared memory of a block.
            cluster: neighbouring blocks along x that run together.
        """


def _sources(folder: str) -> list[Path]:
    return sorted((KERNELS / folder).glob("*.cuh"))
