"""Everything that `distill-pretrain doctor` looks for, by the standard library alone, so that it runs anywhere."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from distill_pretrain.jobs.doctor import machine
from distill_pretrain.jobs.doctor.finding import Finding, try_import, version_of

_MEGATRON = ((0, 16), (0, 19))
"""First and last of the versions of megatron-core that the tests have run with."""


def examine(folder: Path) -> list[Finding]:
    """Check everything that is looked for, in the order of the table."""
    return [
        _python(),
        _torch(),
        *_accelerator(),
        machine.cuda_driver(_torch_cuda()),
        machine.nvrtc(),
        _kernels(),
        _megatron(),
        _transformer_engine(),
        _apex(),
        *[
            _package(name, module, enables=enables, required=True, install=f"pip install {name}")
            for name, module, enables in (
                ("numpy", "numpy", "everything"),
                ("pydantic", "pydantic", "recipes"),
                ("pyyaml", "yaml", "recipes"),
                ("psutil", "psutil", "saving checkpoints"),
                ("safetensors", "safetensors", "weights of Hugging Face models"),
                ("sentencepiece", "sentencepiece", "training and loading tokenizers"),
            )
        ],
        _package(
            "transformers",
            "transformers",
            enables="Hugging Face teachers and tokenizers",
            install="pip install 'distill-pretrain[hf]'",
        ),
        _package(
            "matplotlib",
            "matplotlib",
            enables="the report's picture",
            install="pip install 'distill-pretrain[eval]'",
        ),
        _package(
            "lm-eval",
            "lm_eval",
            enables="zero-shot tasks (eval.tasks)",
            install="pip install 'distill-pretrain[tasks]'",
        ),
        _deepspeed(),
        _remote_stores(),
        _fast_coder(),
        machine.shared_memory(),
        machine.open_files(),
        *machine.file_system(folder),
    ]


def _python() -> Finding:
    return Finding(
        name="python",
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPU cores",
        usable=sys.version_info >= (3, 10),
        required=True,
        enables="3.10 or later; tested: 3.10 to 3.13",
        install="use Python 3.10 or later",
    )


def _torch() -> Finding:
    module, problem = try_import("torch")
    if module is None:
        return Finding(
            name="torch",
            found=problem,
            usable=False,
            required=True,
            enables="everything but tokenising",
            install="pip install 'torch>=2.6', choosing the build for your CUDA version or CPU",
        )
    cuda = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU build"
    backends = [
        name
        for name in ("nccl", "gloo")
        if module.distributed.is_available()
        and getattr(module.distributed, f"is_{name}_available")()
    ]
    return Finding(
        name="torch",
        found=f"{module.__version__}, {cuda}, torch.distributed with {' and '.join(backends) or 'nothing'}",
        usable="gloo" in backends,
        required=True,
        enables="everything but tokenising",
        install="install a torch build with torch.distributed and gloo",
    )


def _torch_cuda() -> str | None:
    """CUDA version of the torch build."""
    module, _ = try_import("torch")
    return None if module is None else module.version.cuda


def _accelerator() -> list[Finding]:
    """GPUs as torch sees them, and NCCL."""
    module, _ = try_import("torch")
    enables = "training and capture at speed; without one the CPU is used"
    if module is None or not module.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
        if not driver or module is None:
            return [Finding(name="GPU", found="none", usable=False, enables=enables)]
        if module.version.cuda:
            advice = "check that the driver is new enough for this CUDA version, and CUDA_VISIBLE_DEVICES"
        else:
            advice = "install a CUDA build of torch"
        found = "an NVIDIA driver is here, but torch cannot use it"
        return [Finding(name="GPU", found=found, usable=False, enables=enables, install=advice)]
    findings = []
    for number in range(module.cuda.device_count()):
        device = module.cuda.get_device_properties(number)
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
        findings.append(Finding(name=f"GPU {number}", found=found, enables=enables))
    if module.distributed.is_nccl_available():
        numbers = ".".join(map(str, module.cuda.nccl.version()))
        findings.append(Finding(name="NCCL", found=numbers, enables="several GPUs"))
    return findings


def _kernels() -> Finding:
    """The CUDA sources of this package: whether they can run here, and which are compiled already."""
    enables = "loss, LM head and teacher sampling at speed on a GPU; plain PyTorch otherwise"
    backend, problem = try_import("distill_pretrain.kernels.cuda.backend", top="distill_pretrain")
    if backend is None:
        return Finding(name="CUDA kernels", found=problem, usable=False, enables=enables)
    from distill_pretrain.kernels.cuda.prebuild import sources

    torch, _ = try_import("torch")
    reason = backend.unavailable_reason(torch.device("cuda"))
    states = []
    try:
        for source in sources() if reason is None else ():
            capability = torch.cuda.get_device_capability()
            is_kept = backend.prebuilt_image(source, capability) or backend.kept_image(
                source, capability
            )
            states.append(f"{source.folder} {'compiled' if is_kept else 'compiled at first use'}")
    except backend.KernelsUnavailable as error:
        reason = f"{error}"
    return Finding(
        name="CUDA kernels",
        # The remedy of a missing GPU is to run this very verb; the lines above have the answer.
        found=(reason or ", ".join(states)).removesuffix("; remedy: see `distill-pretrain doctor`"),
        usable=reason is None,
        enables=enables,
    )


def _megatron() -> Finding:
    first, last = (".".join(map(str, version)) for version in _MEGATRON)
    finding = _package(
        "megatron-core",
        "megatron.core",
        enables=f"the models, parallelism, .bin/.idx files; {first} to {last}, from 0.17 on with Python 3.12 or later",
        required=True,
        install=f"pip install 'megatron-core>={first},<{_MEGATRON[1][0]}.{_MEGATRON[1][1] + 1}'",
    )
    if finding.usable and not _MEGATRON[0] <= _first_numbers(finding.found) <= _MEGATRON[1]:
        found = f"{finding.found}, expected {first} to {last}"
        return replace(finding, found=found, usable=False)
    return finding


def _first_numbers(version: str) -> tuple[int, ...]:
    """(0, 19) of 0.19.2."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _transformer_engine() -> Finding:
    """A bare `pip install transformer_engine` has no framework part and raises RuntimeError on import."""
    install = (
        "pip install --no-build-isolation 'transformer_engine[pytorch]' (needs a GPU toolchain)"
    )
    enables = (
        "fused GPU layers and FP8; optional, no version tested; megatron-core 0.16 asks for 2.9 to 2.11, "
        "0.17 to 0.19 for any"
    )
    module, problem = try_import("transformer_engine.pytorch", top="transformer_engine")
    if module is not None:
        return Finding(
            name="Transformer Engine",
            found=version_of("transformer-engine", "transformer_engine"),
            enables=enables,
        )
    if "RuntimeError" in problem:
        problem = f"bare install, without its PyTorch part ({problem})"
    return Finding(
        name="Transformer Engine", found=problem, usable=False, enables=enables, install=install
    )


def _apex() -> Finding:
    """NVIDIA's apex has apex.optimizers and the extension amp_C; PyPI's `apex` is another project."""
    enables = "fused Adam on GPUs; optional, no version tested; torch's is used otherwise"
    install = "build it from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(name="apex", found="missing", usable=False, enables=enables, install=install)
    places = list(spec.submodule_search_locations or [])
    if not any(Path(place, "optimizers").is_dir() for place in places):
        found = f"{version_of('apex')}: not NVIDIA's apex, but the unrelated package of that name on PyPI"
        install = f"pip uninstall apex; {install}"
        return Finding(name="apex", found=found, usable=False, enables=enables, install=install)
    module, problem = try_import("amp_C") if try_import("torch")[0] else (None, "needs torch")
    if module is None:
        found = f"{version_of('apex')}, without its CUDA extension amp_C ({problem})"
        return Finding(name="apex", found=found, usable=False, enables=enables, install=install)
    return Finding(name="apex", found=version_of("apex"), enables=enables)


def _package(
    name: str, module: str, *, enables: str, install: str, required: bool = False
) -> Finding:
    loaded, problem = try_import(module)
    return Finding(
        name=name,
        found=problem or version_of(name),
        usable=loaded is not None,
        required=required,
        enables=enables,
        install=install,
    )


def _deepspeed() -> Finding:
    """DeepSpeed compiles its ops when they are first used."""
    finding = _package(
        "deepspeed",
        "deepspeed",
        enables="optimizer.backend=deepspeed: ZeRO 1 to 3, optimizer state in host memory",
        install="pip install 'distill-pretrain[deepspeed]'",
    )
    if not finding.usable:
        return finding
    ops = f"its own ops, which this package does not use, need compilers: {machine.compilers()}"
    return replace(finding, found=f"{finding.found}; {ops}")


def _remote_stores() -> Finding:
    """fsspec, and what it needs for the stores of the three large clouds."""
    finding = _package(
        "fsspec", "fsspec", enables="caches read from URLs", install="pip install fsspec"
    )
    stores = (("s3", "s3fs"), ("gcs", "gcsfs"), ("azure", "adlfs"))
    lacking = [store for store, module in stores if importlib.util.find_spec(module) is None]
    if not finding.usable or not lacking:
        return finding
    install = " or ".join(f"pip install 'distill-pretrain[{store}]'" for store in lacking)
    found = f"{finding.found}, without {', '.join(lacking)} ({install})"
    return replace(finding, found=found)


def _fast_coder() -> Finding:
    """The C part of this package, which an installation leaves out only where it is asked to."""
    module, problem = try_import("distill_pretrain.cache.codec.hc.native", top="distill_pretrain")
    install = "install a wheel, or pip install -e . with a C compiler (such as gcc) on PATH"
    if module is not None:
        try:
            module.load()
        except OSError as error:
            problem = "not built" if module.find_library() is None else f"{error}"
    return Finding(
        name="fast cache coder",
        found=problem or "built",
        usable=not problem,
        enables="entropy-coded caches; without it they are refused, or hundreds of times slower with "
        "DISTILL_PRETRAIN_SLOW_CODER=1",
        install=install,
    )
