"""Which device can run the CUDA sources of this package, and what runs them there."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.kernels.cuda import driver, image_cache, nvrtc
from distill_pretrain.kernels.cuda.launcher import KernelSource, Launcher

Implementation = Literal["auto", "reference", "cuda"]
"""What a user may ask for: the kernels where they run, plain PyTorch everywhere, or the kernels and nothing else."""

Backend = Literal["cuda", "reference"]

OPTIONS = ("-std=c++17", "-lineinfo")
LEAST_CAPABILITY = (8, 0)


class KernelsUnavailable(DistillPretrainError):
    """The CUDA kernels cannot run on this device."""


def launcher_for(source: KernelSource, device: torch.device) -> Launcher:
    """Return what runs this source on a device; it is compiled or read from disk when first asked for, then kept.

    Raises:
        KernelsUnavailable: the device, the driver or the compiler is missing or of no use.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _loaded(source, device)


def unavailable_reason(device: torch.device) -> str | None:
    """Say why nothing can be launched on a device; None where it can, as far as is known without compiling."""
    try:
        _require_device(device)
        driver.load()
    except KernelsUnavailable as error:
        return f"{error}"
    except driver.DriverError as error:
        return f"{_no_driver(error)}"
    return None


def loading_problem(source: KernelSource, device: torch.device) -> str | None:
    """Say why a source cannot run on a device, found by loading or compiling it; None where it can."""
    try:
        launcher_for(source, device)
    except KernelsUnavailable as error:
        return f"{error}"
    return None


@cache
def _loaded(source: KernelSource, device: torch.device) -> Launcher:
    _require_device(device)
    try:
        machine = driver.load()
    except driver.DriverError as error:
        raise _no_driver(error) from None

    def launcher(image: nvrtc.Image) -> Launcher:
        return driver.ImageLauncher(
            machine, image, device.index, lambda: torch.cuda.current_stream(device).cuda_stream
        )

    capability = torch.cuda.get_device_capability(device)
    image = prebuilt_image(source, capability)
    if image is not None:
        try:
            return launcher(image)
        except driver.DriverError:
            # Made by a newer compiler than this driver understands; one made here may do.
            pass
    image = compiled_image(source, capability)
    try:
        return launcher(image)
    except driver.DriverError as error:
        raise KernelsUnavailable(
            "the driver cannot load the compiled kernels",
            where=device,
            found=error,
            remedy="install an NVRTC of the CUDA version that `nvidia-smi` shows, or a newer driver",
        ) from None


def _require_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise KernelsUnavailable("the CUDA kernels need a CUDA device", found=device)
    if torch.version.hip is not None:
        raise KernelsUnavailable("the CUDA kernels do not run on AMD GPUs", found=device)
    if not torch.cuda.is_available():
        raise KernelsUnavailable(
            "torch finds no usable GPU", found=device, remedy="see `distill-pretrain doctor`"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise KernelsUnavailable(
            "the GPU is too old for the kernels",
            where=device,
            found=f"compute capability {capability[0]}.{capability[1]}",
            expected=f"at least {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}",
        )


def _no_driver(error: driver.DriverError) -> KernelsUnavailable:
    return KernelsUnavailable(
        "the CUDA driver cannot be used",
        found=error,
        remedy="install NVIDIA's driver; in a container, start it with --gpus all",
    )


def prebuilt_image(source: KernelSource, capability: tuple[int, int]) -> nvrtc.Image | None:
    """Return the image of this very source that came with the package, if it runs on such a device."""
    digest = source.digest()
    for minor in range(capability[1], -1, -1):
        architecture = f"sm_{capability[0]}{minor}"
        key = image_cache.image_key(digest, architecture, OPTIONS, None)
        image = image_cache.read_image(image_cache.PREBUILT, key)
        if image is not None:
            return image
    return None


def compiled_image(source: KernelSource, capability: tuple[int, int]) -> nvrtc.Image:
    """Return the image of a source from the user's folder, else compile it, and keep it there if that can be.

    Raises:
        KernelsUnavailable: there is no compiler, or it refuses the source.
    """
    image = kept_image(source, capability)
    if image is None:
        architecture, key = _entry(source, capability)
        image = build(source, architecture)
        folder = image_cache.user_folder()
        if folder is None or not image_cache.write_image(folder, key, image):
            _warn_unwritable(folder)
    return image


def kept_image(source: KernelSource, capability: tuple[int, int]) -> nvrtc.Image | None:
    """Return the image of a source that was compiled before.

    Raises:
        KernelsUnavailable: there is no compiler.
    """
    folder = image_cache.user_folder()
    _, key = _entry(source, capability)
    return image_cache.read_image(folder, key) if folder else None


def _entry(source: KernelSource, capability: tuple[int, int]) -> tuple[str, str]:
    """What to compile for, and the name of the image."""
    compiler = _compiler()
    architecture = _target(compiler, capability)
    return architecture, image_cache.image_key(
        source.digest(), architecture, OPTIONS, compiler.version
    )


def build(source: KernelSource, architecture: str) -> nvrtc.Image:
    """Compile a source; "sm_90" gives machine code, "compute_90" PTX.

    Raises:
        KernelsUnavailable: there is no compiler, or it refuses the source.
    """
    compiler = _compiler()
    options = (f"--gpu-architecture={architecture}", *OPTIONS)
    try:
        return compiler.compile(source.text(), source.headers(), source.kernels, options)
    except nvrtc.CompileFailed as error:
        raise KernelsUnavailable(
            "NVRTC cannot compile the kernels",
            where=f"{source.folder}/{source.entry} for {architecture}, NVRTC {_words(compiler)}",
            found=error,
            remedy="install another NVRTC (CUDA 12.4 or later), or set objective.kernel=reference",
        ) from None


def _compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.load()
    except nvrtc.NvrtcMissing as error:
        raise KernelsUnavailable(
            "NVRTC, which compiles the kernels, cannot be used",
            found=error,
            remedy=f"{nvrtc.HOW_TO_INSTALL}; or pip install 'distill-pretrain[cuda]'",
        ) from None


def _target(compiler: nvrtc.Nvrtc, capability: tuple[int, int]) -> str:
    try:
        return nvrtc.target(compiler, capability)
    except nvrtc.CompileFailed as error:
        raise KernelsUnavailable(
            "NVRTC does not know this GPU", found=error, remedy=nvrtc.HOW_TO_INSTALL
        ) from None


def _words(compiler: nvrtc.Nvrtc) -> str:
    return f"{compiler.version[0]}.{compiler.version[1]} ({compiler.path})"


@cache
def _warn_unwritable(folder: Path | None) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept in {folder}; every process compiles them again. "
        f"Name a folder in {image_cache.FOLDER_VARIABLE}",
        stacklevel=2,
    )
