"""CUDA kernels on the CPU: the sources that run on a GPU, compiled by a C++ compiler with emulate.h."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from distill_pretrain.kernels.cuda.launcher import KERNELS, KernelSource, Launcher

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-fPIC", "-shared", "-w", "-DEMULATED"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-U_FORTIFY_SOURCE"),
)
MAIN = """\
#include "emulate.h"
#include "{entry}"
static void run(int kernel, const void* arguments) {{
    switch (kernel) {{
{cases}
    }}
}}
extern "C" size_t argument_bytes(int kernel) {{
    switch (kernel) {{
{sizes}
    }}
    return 0;
}}
extern "C" const char* launch(int kernel, const void* arguments, unsigned grid_x, unsigned grid_y, unsigned threads,
                              size_t shared_bytes, unsigned cluster, uint64_t schedule) {{
    return emulation::launch(run, kernel, arguments, grid_x, grid_y, threads, shared_bytes, cluster, schedule);
}}
"""


class EmulationError(Exception):
    """A kernel did what a GPU would not survive, or hangs."""


def emulated(
    source: KernelSource, *, schedule: int = 0, folder: Path = KERNELS, optimised: bool = True
) -> Launcher:
    """Launcher that runs the kernels of `source` on CPU tensors.

    Args:
        source: what to compile.
        schedule: 0 for threads that take turns, else the seed of a random order.
        folder: where the sources are; another than the package's for changed copies.
        optimised: compile slower to run faster.
    """
    return EmulatedLauncher(source, _library(source, folder, optimised), schedule)


class EmulatedLauncher:
    """Runs kernels in the calling thread."""

    def __init__(self, source: KernelSource, library: ctypes.CDLL, schedule: int) -> None:
        self.kernels, self.library, self.schedule = source.kernels, library, schedule

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
        """Run a kernel; see `Launcher`.

        Raises:
            EmulationError: the launch breaks a limit of the hardware, or the kernel hangs or breaks a rule.
        """
        number = self.kernels.index(kernel)
        _require_possible(grid, block, shared_bytes, cluster)
        expected = self.library.argument_bytes(number)
        if ctypes.sizeof(arguments) != expected:
            raise EmulationError(
                f"{kernel} takes {expected} bytes of arguments, given {ctypes.sizeof(arguments)}"
            )
        error = self.library.launch(
            number, ctypes.byref(arguments), *grid, block, shared_bytes, cluster, self.schedule
        )
        if error is not None:
            raise EmulationError(f"{kernel}: {error.decode()}")


def _require_possible(grid: tuple[int, int], block: int, shared_bytes: int, cluster: int) -> None:
    possible = {
        f"block {block}": 1 <= block <= 1024,
        f"grid x {grid[0]} of clusters of {cluster}": 0 < grid[0] < 2**31
        and grid[0] % cluster == 0,
        f"grid y {grid[1]}": 0 < grid[1] < 65536,
        f"cluster {cluster}": cluster in (1, 2, 4, 8),
        f"shared memory {shared_bytes}": 0 <= shared_bytes <= 99 * 1024,
    }
    for what, holds in possible.items():
        if not holds:
            raise EmulationError(f"no GPU launches {what}")


@functools.cache
def _library(source: KernelSource, folder: Path, optimised: bool) -> ctypes.CDLL:
    flags = (*FLAGS, "-O1" if optimised else "-O0")
    library = ctypes.CDLL(str(_compiled(source, folder, flags)))
    library.argument_bytes.restype = ctypes.c_size_t
    library.launch.restype = ctypes.c_char_p
    unsigned = ctypes.c_uint
    library.launch.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, unsigned, unsigned, unsigned),
        *(ctypes.c_size_t, unsigned, ctypes.c_uint64),
    ]
    return library


def _compiled(source: KernelSource, folder: Path, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled unless one of the same content is there; test processes share it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to emulate CUDA kernels with")
    main = _main(source)
    content = [main, *flags, platform.machine(), (HERE / "emulate.h").read_text("utf-8")]
    content += _included(folder / source.folder / source.entry)
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"distill_pretrain_emulation_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    built = cache / f"{source.folder}_{key}.so"
    with (cache / f"{source.folder}_{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile([compiler, *flags, f"-I{HERE}", f"-I{folder}"], main, built)
    return built


def _included(path: Path) -> list[str]:
    """Contents of a source and of all that it includes, but for emulate.h."""
    text = path.read_text("utf-8")
    found = (path.parent / name for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE))
    return [text, *(part for file in found if file.exists() for part in _included(file))]


def _compile(command: list[str], main: str, built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        unit, library = Path(scratch) / "main.cpp", Path(scratch) / "main.so"
        unit.write_text(main, encoding="utf-8")
        done = subprocess.run(
            [*command, str(unit), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EmulationError(done.stderr[:4000])
        library.rename(built)


def _main(source: KernelSource) -> str:
    cases, sizes = [], []
    for number, kernel in enumerate(source.kernels):
        cases.append(f"        case {number}: return emulation::call(&{kernel}, arguments);")
        sizes.append(f"        case {number}: return emulation::argument_bytes(&{kernel});")
    return MAIN.format(
        entry=f"{source.folder}/{source.entry}", cases="\n".join(cases), sizes="\n".join(sizes)
    )
