"""The machine and its packages (`environment`); the package's own code compiled for it (`compile`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from figures import end_without_gpu, record
from reporting import environment

from distill_pretrain.cache.codec.hc import native
from distill_pretrain.kernels.cuda import nvrtc
from distill_pretrain.kernels.cuda.backend import OPTIONS, launcher_for
from distill_pretrain.kernels.sparse_kd.launch import SOURCE as SPARSE_KD
from distill_pretrain.kernels.teacher_sampling import SOURCE as TEACHER_SAMPLING

PACKAGES = ("numpy", "transformers", "pydantic", "megatron-core", "transformer-engine")
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def show_environment() -> None:
    versions = {package: version_of(package) for package in PACKAGES}
    record("machine", torch_cuda=torch.version.cuda, **environment("torch"), **versions)
    end_without_gpu()
    card = torch.cuda.get_device_properties(0)
    record(
        "card",
        name=card.name,
        gpus=torch.cuda.device_count(),
        capability=f"{card.major}.{card.minor}",
        multiprocessors=card.multi_processor_count,
        memory_gb=round(card.total_memory / 1e9, 1),
        l2_mb=round(card.L2_cache_size / 1e6, 1),
        nccl=".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        **nvidia_smi(),
    )


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str]:
    """What only the driver's tool says; empty where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.stdout else []
    return dict(zip((name.replace(".", "_") for name in QUERY.split(",")), values, strict=False))


def compile_all() -> None:
    """The coder of caches with the C compiler, every kernel with NVRTC."""
    started = time.perf_counter()
    coder = native_coder()
    record("compiled", what="cache coder", found=coder, seconds=seconds_since(started))
    compiler = nvrtc.load()
    for source in (SPARSE_KD, TEACHER_SAMPLING):
        started = time.perf_counter()
        if torch.cuda.is_available():
            launcher_for(source, torch.device("cuda", 0))
        else:
            # One kernel of each source: that the compiler works; the tests compile all.
            image = compiler.compile(
                source.text(),
                source.headers(),
                source.kernels[-1:],
                ("--gpu-architecture=sm_90", *OPTIONS),
            )
            assert image.data
        record(
            "compiled",
            what=source.folder,
            found=f"NVRTC {compiler.version[0]}.{compiler.version[1]}",
            seconds=seconds_since(started),
        )
    end_without_gpu()


def native_coder() -> str:
    """Builds the C coder where it is missing; says what will code caches."""
    if native.find_library() is None and (compiler := shutil.which("cc") or shutil.which("gcc")):
        source = Path(native.__file__).with_name("_hc.c")
        options = ["-O3", "-shared", "-fPIC", "-o", str(source.with_suffix(".so"))]
        subprocess.run([compiler, *options, str(source)], check=False)
    return "C" if native.find_library() is not None else "none: set DISTILL_PRETRAIN_SLOW_CODER=1"


def seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 2)


def main() -> None:
    actions: dict[str, Any] = {"environment": show_environment, "compile": compile_all}
    actions[sys.argv[1]]()


if __name__ == "__main__":
    main()
