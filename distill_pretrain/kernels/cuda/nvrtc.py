"""NVIDIA's run-time compiler through ctypes: CUDA C++ in, a device image out. Standard library alone; needs no GPU.

The library comes with CUDA builds of torch, with `pip install nvidia-cuda-nvrtc`, or with a CUDA toolkit. The sources
include no header of CUDA or of C++, so the library is all that is needed.
"""

from __future__ import annotations

import ctypes
import site
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HOW_TO_INSTALL = (
    "pip install nvidia-cuda-nvrtc, of torch's CUDA version; CUDA builds of torch bring it"
)


class NvrtcMissing(Exception):
    """No usable library was found."""


class CompileFailed(Exception):
    """The compiler refused a source; the message is its log."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """Something the driver can load.

    Attributes:
        data: a cubin, or PTX ending in a zero byte.
        names: of each kernel's name expression, the name in the image.
        log: what the compiler said, if this was compiled just now.
    """

    data: bytes
    names: Mapping[str, str]
    log: str = ""


class Nvrtc:
    """The library of one version.

    Attributes:
        path: what it was loaded as.
        version: such as (12, 8).
        architectures: it makes machine code for, such as 90 for sm_90; ascending.
    """

    def __init__(self, path: str) -> None:
        """Loads the library.

        Raises:
            OSError: it cannot be loaded.
            NvrtcMissing: it is loaded but of no use.
        """
        self.path = path
        self._library: Any = ctypes.CDLL(path)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        try:
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
            self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
            numbers = (ctypes.c_int * count.value)()
            self._check(self._library.nvrtcGetSupportedArchs(numbers))
        except (AttributeError, CompileFailed) as error:
            raise NvrtcMissing(f"{path}: {error}") from error
        self.version = (major.value, minor.value)
        self.architectures = sorted(numbers)

    def compile(
        self,
        text: bytes,
        headers: Mapping[str, bytes],
        kernels: Sequence[str],
        options: Sequence[str],
    ) -> Image:
        """Compile a source, with the kernels that are asked for instantiated.

        Args:
            text: the translation unit.
            headers: what it may include, by the name it includes it as.
            kernels: name expressions.
            options: the compiler's; `--gpu-architecture=sm_*` gives a cubin, `compute_*` gives PTX.

        Raises:
            CompileFailed: with the compiler's log.
        """
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program),
                text,
                b"kernels.cu",
                len(headers),
                _strings(headers.values()),
                _strings(name.encode() for name in headers),
            )
        )
        try:
            for kernel in kernels:
                self._check(self._library.nvrtcAddNameExpression(program, kernel.encode()))
            encoded = [option.encode() for option in options]
            status = self._library.nvrtcCompileProgram(program, len(encoded), _strings(encoded))
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileFailed(log.strip() or self._reason(status))
            names = {}
            for kernel in kernels:
                name = ctypes.c_char_p()
                self._check(
                    self._library.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name))
                )
                names[kernel] = (name.value or b"").decode()
            virtual = any("=compute_" in option for option in options)
            data = self._read(program, "PTX" if virtual else "CUBIN")
            return Image(data=data, names=names, log=log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _reason(self, status: int) -> str:
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return str(self._library.nvrtcGetErrorString(status).decode())

    def _check(self, status: int) -> None:
        if status:
            raise CompileFailed(self._reason(status))


def _strings(values: Any) -> Any:
    values = list(values)
    return (ctypes.c_char_p * len(values))(*values)


def libraries() -> Iterator[str]:
    """Yield where the library may be, best first: beside torch and in other wheels, then where the system finds it."""
    folders = {sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()}
    for folder in sorted(folders):
        found = Path(folder).glob("nvidia/*/lib/libnvrtc.so*")
        yield from (str(path) for path in sorted(found) if "builtins" not in path.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@cache
def load() -> Nvrtc:
    """Load the first library that works.

    Raises:
        NvrtcMissing: none does; says why where one was found.
    """
    problem = "no libnvrtc in a wheel or on the library path"
    for path in libraries():
        try:
            return Nvrtc(path)
        except (OSError, NvrtcMissing) as error:
            if Path(path).is_absolute():
                problem = f"{error}"
    raise NvrtcMissing(problem)


def target(compiler: Nvrtc, capability: tuple[int, int]) -> str:
    """Return what to compile for on a device: machine code it runs, else PTX that its driver translates."""
    wanted = 10 * capability[0] + capability[1]
    older = [number for number in compiler.architectures if number <= wanted]
    same = [number for number in older if number // 10 == capability[0]]
    if same:
        return f"sm_{same[-1]}"
    if not older:
        raise CompileFailed(
            f"compute capability {capability[0]}.{capability[1]} is older than all that NVRTC "
            f"{compiler.version[0]}.{compiler.version[1]} knows"
        )
    return f"compute_{older[-1]}"
