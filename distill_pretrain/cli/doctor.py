"""`distill-pretrain doctor`. Uses the standard library alone, so that it runs where nothing else does."""

from __future__ import annotations

import argparse
import errno
import fcntl
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.errors import DistillPretrainError

if TYPE_CHECKING:
    from distill_pretrain.cli.recipe import Recipe

SECTIONS = ()

HELP = """
Checks this machine: one line for each package and device, what was found, and what it is for; for anything missing or
unusable, the line that installs it. Also checks that files can be locked in FOLDER, which `capture` needs where several
processes write one cache; name the folder your caches go to, if it is on another file system.

Exit status 2 if something required is missing, else 0.

Example
  distill-pretrain doctor /data/caches
"""

_MEGATRON = "0.16"
_MOST_DETAIL = 200
_CHILD_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(7)
"""


class MachineNotReady(DistillPretrainError):
    """Something required is missing."""


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
        """The finding as text."""
        mark = "ok" if self.usable else ("MISSING" if self.required else "-")
        lines = [f"{mark:<8}{self.name:<{width}}  {self.found}  ({self.enables})"]
        if not self.usable and self.install:
            lines.append(f"{'':<8}{'':<{width}}  -> {self.install}")
        return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this verb."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=Path(),
        help="folder on the file system that caches go to (default: the current one)",
    )


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        MachineNotReady: a required package is missing.
    """
    findings = examine(args.folder)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        for line in finding.lines(width):
            print(line)
    lacking = [finding for finding in findings if finding.required and not finding.usable]
    if lacking:
        raise MachineNotReady(
            "something required is missing",
            found=", ".join(f"{finding.name}: {finding.found}" for finding in lacking),
            remedy="; ".join(dict.fromkeys(finding.install for finding in lacking)),
        )


def examine(folder: Path) -> list[Finding]:
    """Everything that is looked for, in the order of the table."""
    return [
        _python(),
        _torch(),
        *_accelerator(),
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
        _fast_coder(),
        _locks(folder),
    ]


def _python() -> Finding:
    return Finding(
        name="python",
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPU cores",
        usable=sys.version_info >= (3, 10),
        required=True,
        enables="3.10 or later",
        install="use Python 3.10 or later",
    )


def _torch() -> Finding:
    module, problem = _import("torch")
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


def _accelerator() -> list[Finding]:
    """GPUs as torch sees them, and NCCL."""
    module, _ = _import("torch")
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


def _megatron() -> Finding:
    finding = _package(
        "megatron-core",
        "megatron.core",
        enables="the models, parallelism, .bin/.idx files",
        required=True,
        install=f"pip install 'megatron-core=={_MEGATRON}.*'",
    )
    if finding.usable and not finding.found.startswith(f"{_MEGATRON}."):
        found = f"{finding.found}, expected {_MEGATRON}.x"
        return replace(finding, found=found, usable=False)
    return finding


def _transformer_engine() -> Finding:
    """A bare `pip install transformer_engine` has no framework part and raises RuntimeError on import."""
    install = (
        "pip install --no-build-isolation 'transformer_engine[pytorch]' (needs a GPU toolchain)"
    )
    enables = "fused GPU layers and FP8; optional"
    module, problem = _import("transformer_engine.pytorch", top="transformer_engine")
    if module is not None:
        return Finding(
            name="Transformer Engine",
            found=_version("transformer-engine", "transformer_engine"),
            enables=enables,
        )
    if "RuntimeError" in problem:
        problem = f"bare install, without its PyTorch part ({problem})"
    return Finding(
        name="Transformer Engine", found=problem, usable=False, enables=enables, install=install
    )


def _apex() -> Finding:
    """NVIDIA's apex has apex.optimizers and the extension amp_C; PyPI's `apex` is another project."""
    enables = "fused Adam on GPUs; optional, torch's is used otherwise"
    install = "build it from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(name="apex", found="missing", usable=False, enables=enables, install=install)
    places = list(spec.submodule_search_locations or [])
    if not any(Path(place, "optimizers").is_dir() for place in places):
        found = (
            f"{_version('apex')}: not NVIDIA's apex, but the unrelated package of that name on PyPI"
        )
        install = f"pip uninstall apex; {install}"
        return Finding(name="apex", found=found, usable=False, enables=enables, install=install)
    module, problem = _import("amp_C") if _import("torch")[0] else (None, "needs torch")
    if module is None:
        found = f"{_version('apex')}, without its CUDA extension amp_C ({problem})"
        return Finding(name="apex", found=found, usable=False, enables=enables, install=install)
    return Finding(name="apex", found=_version("apex"), enables=enables)


def _package(
    name: str, module: str, *, enables: str, install: str, required: bool = False
) -> Finding:
    loaded, problem = _import(module)
    return Finding(
        name=name,
        found=problem or _version(name),
        usable=loaded is not None,
        required=required,
        enables=enables,
        install=install,
    )


def _fast_coder() -> Finding:
    """The C part of this package, which pip leaves out without an error where it cannot compile it."""
    module, problem = _import("distill_pretrain.formats.hc_native", top="distill_pretrain")
    install = "pip install -e . with a C compiler (such as gcc) on PATH"
    if module is not None:
        try:
            module.load()
        except OSError as error:
            problem = "not built" if module.find_library() is None else f"{error}"
    return Finding(
        name="fast cache coder",
        found=problem or "built",
        usable=not problem,
        enables="entropy-coded caches at speed; without it they are hundreds of times slower",
        install=install,
    )


def _locks(folder: Path) -> Finding:
    """Whether a lock taken here keeps another process out."""

    def finding(found: str, usable: bool) -> Finding:
        return Finding(
            name="file locks",
            found=f"{found} in {folder.absolute()}",
            usable=usable,
            enables="several capture processes on one cache",
            install="use a folder on a file system with POSIX locks (on NFS: mount without nolock)",
        )

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-S", "-c", _CHILD_LOCK, file.name]
            status = subprocess.run(command, capture_output=True, timeout=60).returncode
    except OSError as error:
        unsupported = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
        return finding("not supported" if unsupported else f"{error.strerror}", False)
    return finding("work" if status == 7 else "do not keep other processes out", status == 7)


def _import(module: str, *, top: str | None = None) -> tuple[Any, str]:
    """(module, "") or (None, what is wrong); a broken package raises nearly anything when imported."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "version unknown"
