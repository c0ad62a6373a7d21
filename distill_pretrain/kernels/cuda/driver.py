"""The CUDA driver through ctypes: loads an image into a device's primary context, the one torch uses, and launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from distill_pretrain.kernels.cuda.nvrtc import Image

LIBRARY = "libcuda.so.1"
FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory a block may have without asking."""
PORTABLE_CLUSTER = 8

_MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
_NON_PORTABLE_CLUSTER_ALLOWED = 14
_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID


class DriverError(Exception):
    """The driver is missing or refused a call."""


class _ClusterDimension(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _AttributeValue(ctypes.Union):
    _fields_ = (("bytes", ctypes.c_char * 64), ("cluster", _ClusterDimension))


class LaunchAttribute(ctypes.Structure):
    """The C structure CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", _AttributeValue),
    )


class LaunchConfig(ctypes.Structure):
    """The C structure CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Driver:
    """Calls of the driver library; each raises `DriverError` with the driver's own name of the error."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the library.

        Raises:
            DriverError: it is not there, or returned an error.
        """
        try:
            status = getattr(self._library, function)(*arguments)
        except AttributeError:
            raise DriverError(f"the driver is too old: it has no {function}") from None
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise DriverError(f"{function}: {(name.value or b'error').decode()} ({status})")


@cache
def load() -> Driver:
    """Load the driver of this machine.

    Raises:
        DriverError: there is none.
    """
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise DriverError(f"no NVIDIA driver: {error}") from None


class ImageLauncher:
    """A `launcher.Launcher` over an image loaded on one device.

    Args:
        driver: of this machine.
        image: compiled for the device.
        device: its number.
        current_stream: gives the handle of the stream to launch in.
    """

    def __init__(
        self, driver: Driver, image: Image, device: int, current_stream: Callable[[], int]
    ) -> None:
        """Loads the image.

        Raises:
            DriverError: the driver cannot run it.
        """
        self._driver = driver
        self._names = image.names
        self._current_stream = current_stream
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}
        handle, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._module = ctypes.c_void_p()
        driver.call("cuDeviceGet", ctypes.byref(handle), device)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        with self._in_context():
            driver.call("cuModuleLoadData", ctypes.byref(self._module), image.data)

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        """Autograd's threads have no current context until something of the CUDA runtime ran in them."""
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

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
        """See `launcher.Launcher`; an empty grid starts nothing.

        Raises:
            DriverError: the launch was refused.
        """
        if 0 in grid:
            return
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with self._in_context():
            function = self._function(kernel, shared_bytes, cluster)
            stream = ctypes.c_void_p(self._current_stream())
            if cluster == 1:
                sizes = (*grid, 1, block, 1, 1, shared_bytes)
                self._driver.call("cuLaunchKernel", function, *sizes, stream, pointers, None)
                return
            attribute = LaunchAttribute(id=_CLUSTER_DIMENSION)
            attribute.value.cluster = _ClusterDimension(cluster, 1, 1)
            config = LaunchConfig(
                *grid, 1, block, 1, 1, shared_bytes, stream, ctypes.pointer(attribute), 1
            )
            self._driver.call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)

    def _function(self, kernel: str, shared_bytes: int, cluster: int) -> ctypes.c_void_p:
        function = self._functions.get(kernel)
        if function is None:
            function = ctypes.c_void_p()
            name = self._names[kernel].encode()
            self._driver.call("cuModuleGetFunction", ctypes.byref(function), self._module, name)
            self._functions[kernel] = function
        if shared_bytes > self._shared_bytes.get(kernel, FREE_SHARED_BYTES):
            self._set(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
            self._shared_bytes[kernel] = shared_bytes
        if cluster > PORTABLE_CLUSTER:
            self._set(function, _NON_PORTABLE_CLUSTER_ALLOWED, 1)
        return function

    def _set(self, function: ctypes.c_void_p, attribute: int, value: int) -> None:
        self._driver.call("cuFuncSetAttribute", function, attribute, value)
