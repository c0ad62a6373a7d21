"""What `distill-pretrain doctor` finds of the driver, the run-time compiler, memory, limits and the file system."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import site
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from distill_pretrain.jobs.doctor.finding import Finding

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**30
LEAST_OPEN_FILES = 4096
LEAST_FREE_SPACE = 10 * 2**30
SLOW_PUBLISH_S = 0.5
_PUBLISHES = 5
_CHILD_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(7)
"""


def cuda_driver(torch_cuda: str | None) -> Finding:
    """Find the newest CUDA version that the driver runs, beside the one of the torch build (None for a CPU build)."""
    enables = "GPUs; it must run the CUDA version that torch was built for"
    supported = _driver_version()
    if supported is None:
        return Finding(name="CUDA driver", found="none", usable=False, enables=enables)
    found = f"runs CUDA up to {supported[0]}.{supported[1]}"
    if torch_cuda is None:
        return Finding(name="CUDA driver", found=found, enables=enables)
    # Releases of one major version run on every driver of that major version.
    usable = supported[0] >= int(torch_cuda.partition(".")[0])
    return Finding(
        name="CUDA driver",
        found=f"{found}, torch was built for {torch_cuda}",
        usable=usable,
        enables=enables,
        install=f"install a newer driver, or a torch build for CUDA {supported[0]}",
    )


def _driver_version() -> tuple[int, int] | None:
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def nvrtc() -> Finding:
    """Find NVIDIA's run-time compiler, of the system or of a pip wheel."""
    problem = "missing"
    for library in _nvrtc_libraries():
        major, minor = ctypes.c_int(), ctypes.c_int()
        try:
            status = ctypes.CDLL(library).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError) as error:
            if os.path.isabs(library):
                problem = f"cannot be loaded: {error}"
            continue
        if status == 0:
            return _nvrtc_finding(f"{major.value}.{minor.value} ({library})", usable=True)
    return _nvrtc_finding(problem, usable=False)


def _nvrtc_finding(found: str, *, usable: bool) -> Finding:
    return Finding(
        name="NVRTC",
        found=found,
        usable=usable,
        enables="CUDA kernels compiled at run time, some of torch's own among them",
        install="pip install nvidia-cuda-nvrtc, of torch's CUDA version; CUDA builds of torch bring it",
    )


def _nvrtc_libraries() -> Iterator[str]:
    folders = {sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()}
    for folder in sorted(folders):
        found = Path(folder).glob("nvidia/*/lib/libnvrtc.so*")
        yield from (str(path) for path in sorted(found) if "builtins" not in path.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def compilers() -> str:
    """Say in words which compilers are on PATH."""
    return ", ".join(
        f"{name} {'found' if shutil.which(name) else 'missing'}" for name in ("c++", "nvcc")
    )


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Measure the memory that the processes of a node share."""
    enables = "NCCL between GPUs of a node, data loading"
    try:
        total = shutil.disk_usage(folder).total
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return Finding(name="shared memory", found=found, usable=False, enables=enables)
    return Finding(
        name="shared memory",
        found=f"{total / 2**30:.1f} GiB in {folder}",
        usable=total >= LEAST_SHARED_MEMORY,
        enables=enables,
        install="start the container with --ipc=host or --shm-size=8g",
    )


def open_files() -> Finding:
    """Find how many files and sockets one process may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def words(limit: int) -> str:
        return "no limit" if limit == resource.RLIM_INFINITY else f"{limit}"

    return Finding(
        name="open files",
        found=f"{words(soft)} per process, may be raised to {words(hard)}",
        usable=soft == resource.RLIM_INFINITY or soft >= LEAST_OPEN_FILES,
        enables="large jobs: shards of caches, sockets between ranks",
        install="ulimit -n 65536, in the shell or job script that starts the processes",
    )


def file_system(folder: Path) -> list[Finding]:
    """Locks, publishing and space in the folder that caches and checkpoints go to."""
    return [locks(folder), publishing(folder), free_space(folder)]


def locks(folder: Path) -> Finding:
    """Try whether a lock taken here keeps another process out."""

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


def publishing(folder: Path) -> Finding:
    """Try whether a file that replaces another is there, durable and whole, and measure how long that takes."""

    def finding(found: str, usable: bool) -> Finding:
        return Finding(
            name="replacing files",
            found=f"{found} in {folder.absolute()}",
            usable=usable,
            enables="caches and checkpoints that a kill cannot damage",
            install="use a folder on a local disk or a file system of the cluster, not an object store's mount",
        )

    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            seconds = [_publish_and_read(Path(scratch), number) for number in range(_PUBLISHES)]
    except _NotReplaced as error:
        return finding(f"{error}", False)
    except OSError as error:
        return finding(f"fails ({error.strerror})", False)
    median = statistics.median(seconds)
    return finding(f"works, {1000 * median:.1f} ms with fsync", median < SLOW_PUBLISH_S)


class _NotReplaced(Exception):
    pass


def _publish_and_read(folder: Path, number: int) -> float:
    """Replace FOLDER/file as this package does; seconds.

    A reader that has the old file open must go on seeing it.
    """
    target, temporary = folder / "file", folder / "file.tmp"
    old = target.open("rb") if target.exists() else None
    started = time.perf_counter()
    with temporary.open("wb") as file:
        file.write(f"{number}".encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - started
    if temporary.exists() or target.read_bytes() != f"{number}".encode():
        raise _NotReplaced("does not replace them")
    if old is not None:
        with old:
            if old.read() != f"{number - 1}".encode():
                raise _NotReplaced("takes the old file from its readers")
    return seconds


def free_space(folder: Path) -> Finding:
    """Measure the room that is left in a folder."""
    enables = "caches and checkpoints"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        found = f"{error.strerror} in {folder.absolute()}"
        return Finding(name="free space", found=found, usable=False, enables=enables)
    return Finding(
        name="free space",
        found=f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB in {folder.absolute()}",
        usable=usage.free >= LEAST_FREE_SPACE,
        enables=enables,
        install="free some, or name another folder",
    )
