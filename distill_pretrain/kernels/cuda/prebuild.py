"""Compiles every source ahead of time: python -m distill_pretrain.kernels.cuda.prebuild FOLDER [ARCHITECTURE ...].

Needs NVRTC, which every CUDA toolkit has, and no GPU. The images are read from `image_cache.PREBUILT`, where setup.py
puts them if DISTILL_PRETRAIN_PREBUILD=1. That is off by default: a source is compiled in seconds, once per machine, and
images for every architecture would make each wheel larger for the sake of machines without NVRTC.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from distill_pretrain.kernels.cuda.backend import OPTIONS, build
from distill_pretrain.kernels.cuda.image_cache import image_key, write_image
from distill_pretrain.kernels.cuda.launcher import KERNELS, KernelSource

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def sources() -> list[KernelSource]:
    """Return the kernel sources of every folder of kernels with host code."""
    names = sorted(path.parent.name for path in KERNELS.glob("*/launch.py"))
    modules = [importlib.import_module(f"distill_pretrain.kernels.{name}.launch") for name in names]
    return [source for module in modules for source in getattr(module, "SOURCES", (module.SOURCE,))]


def prebuild(folder: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[str]:
    """Write an image of every source for every architecture; their keys.

    Raises:
        KernelsUnavailable: there is no compiler, or it refuses a source.
        OSError: the folder cannot be written to.
    """
    keys = []
    for source in sources():
        digest = source.digest()
        for architecture in architectures:
            key = image_key(digest, architecture, OPTIONS, None)
            if not write_image(folder, key, build(source, architecture)):
                raise OSError(f"cannot write to {folder}")
            keys.append(key)
    return keys


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    args = parser.parse_args()
    keys = prebuild(args.folder, args.architectures)
    print(f"{len(keys)} images in {args.folder}")


if __name__ == "__main__":
    main()
