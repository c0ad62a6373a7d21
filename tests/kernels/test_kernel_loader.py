"""Compiling, keeping and launching kernels without a GPU: NVRTC is real, the driver is a stand-in."""

from __future__ import annotations

import ctypes
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch

from distill_pretrain.kernels.cuda import backend, driver, image_cache, nvrtc, prebuild
from distill_pretrain.kernels.cuda.launcher import KERNELS, KernelSource

SOURCE = KernelSource(folder="toy", entry="toy.cuh", kernels=("toy::fill<3>", "toy::fill<5>"))
IMAGE = nvrtc.Image(data=b"\x7fELF" + bytes(range(200)), names={"toy::fill<3>": "_Z1k"})
CUDA = torch.device("cuda", 0)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A source that includes a header of its folder and a shared one; caches of its own."""
    folder = tmp_path / "kernels"
    for name, text in {
        "toy/toy.cuh": '#include "arguments.cuh"\n#include "../cuda/shared.cuh"\nnamespace toy {\n'
        "template <int N> __global__ void fill(Arguments a) { a.p[threadIdx.x] = plus_one(N); }\n}\n",
        "toy/arguments.cuh": "struct Arguments { int* p; };\n",
        "cuda/shared.cuh": "__device__ inline int plus_one(int n) { return n + 1; }\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr("distill_pretrain.kernels.cuda.launcher.KERNELS", folder)
    monkeypatch.setattr(image_cache, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv(image_cache.FOLDER_VARIABLE, str(tmp_path / "images"))
    return folder


@pytest.fixture(autouse=True)
def _forget():
    """Nothing that was loaded, or warned of, stays from test to test."""
    for cached in (backend._loaded, backend._warn_unwritable):
        cached.cache_clear()


@pytest.fixture
def compiler():
    try:
        return nvrtc.load()
    except nvrtc.NvrtcMissing as error:
        pytest.skip(f"{error}: pip install 'distill-pretrain[cuda]'")


class FakeDriver:
    """Stands for libcuda: every call succeeds and is written down, unless it is told to refuse it."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.calls: list[tuple] = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            return 222 if name in self.refused else 0

        return call

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def gpu(toy, monkeypatch):
    """A machine with a GPU of compute capability 9.0, as far as can be seen."""
    library = FakeDriver()
    monkeypatch.setattr(driver, "load", lambda: driver.Driver(library))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return library


def test_nvrtc_compiles_with_the_headers_of_the_package_alone(toy, compiler):
    image = backend.build(SOURCE, "sm_90")
    assert image.data.startswith(b"\x7fELF")
    assert set(image.names) == set(SOURCE.kernels)
    for name in image.names.values():
        assert name.encode() in image.data
    ptx = backend.build(SOURCE, "compute_80").data
    assert b".target sm_80" in ptx and ptx.endswith(b"\0")


def test_what_the_compiler_refuses_is_told_with_its_log(toy, compiler):
    (toy / "toy/toy.cuh").write_text("namespace toy { template <int N> void fill() { nonsense; } }")
    with pytest.raises(backend.KernelsUnavailable, match=r"(?s)toy/toy.cuh for sm_90.*nonsense"):
        backend.build(SOURCE, "sm_90")


def test_the_target_is_what_the_device_runs(compiler):
    known = compiler.architectures
    assert nvrtc.target(compiler, (9, 0)) == "sm_90"
    assert nvrtc.target(compiler, (known[-1] // 10 + 5, 0)) == f"compute_{known[-1]}"
    with pytest.raises(nvrtc.CompileFailed, match="older than all"):
        nvrtc.target(compiler, (3, 5))


def test_any_change_of_the_source_changes_its_digest(toy):
    seen = {SOURCE.digest()}
    for name in ("toy/toy.cuh", "toy/arguments.cuh", "cuda/shared.cuh"):
        (toy / name).write_text((toy / name).read_text() + "\n")
        seen.add(SOURCE.digest())
    seen.add(KernelSource(folder="toy", entry="toy.cuh", kernels=("toy::fill<3>",)).digest())
    assert len(seen) == 5


def test_the_key_holds_architecture_options_and_version():
    keys = {
        image_cache.image_key(*of)
        for of in (
            ("source", "sm_90", ("-a",), (13, 0)),
            ("source", "sm_80", ("-a",), (13, 0)),
            ("source", "sm_90", ("-b",), (13, 0)),
            ("source", "sm_90", ("-a",), (12, 9)),
            ("source", "sm_90", ("-a",), None),
        )
    }
    assert len(keys) == 5


def test_an_entry_comes_back_as_it_was_written(tmp_path):
    assert image_cache.read_image(tmp_path, "key") is None
    assert image_cache.write_image(tmp_path / "new/folder", "key", IMAGE)
    assert image_cache.read_image(tmp_path / "new/folder", "key") == IMAGE


def test_no_damaged_entry_is_read(tmp_path):
    assert image_cache.write_image(tmp_path, "key", IMAGE)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for length in range(0, len(sound), 5):
        path.write_bytes(sound[:length])
        assert image_cache.read_image(tmp_path, "key") is None
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert image_cache.read_image(tmp_path, "key") is None
    path.write_bytes(sound)
    path.rename(tmp_path / "other.image")
    assert image_cache.read_image(tmp_path, "other") is None


def test_writers_at_once_leave_a_whole_entry(tmp_path):
    images = [nvrtc.Image(data=bytes([n]) * 100_000, names={"k": f"{n}"}) for n in range(8)]
    found = []

    def write(image):
        for _ in range(10):
            assert image_cache.write_image(tmp_path, "key", image)
            found.append(image_cache.read_image(tmp_path, "key"))

    threads = [threading.Thread(target=write, args=(image,)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(image in images for image in found)
    assert [path.name for path in tmp_path.iterdir()] == ["key.image"]


def test_the_users_folder_is_never_one_that_others_may_fill():
    assert image_cache.user_folder({image_cache.FOLDER_VARIABLE: "/some"}) == Path("/some")
    in_cache = image_cache.user_folder({"XDG_CACHE_HOME": "/caches"})
    assert in_cache == Path("/caches/distill-pretrain/kernels")
    assert image_cache.user_folder({"XDG_CACHE_HOME": "caches"}) is None


def fake_compiler(monkeypatch, version=(13, 0)):
    """Counts what it is asked to compile."""
    asked = []

    class Compiler:
        path, architectures = "libnvrtc.so", [80, 90]

        def compile(self, text, headers, kernels, options):
            asked.append(options[0])
            return IMAGE

    Compiler.version = version
    monkeypatch.setattr(nvrtc, "load", Compiler)
    return asked


def test_an_image_is_compiled_once_and_again_where_its_entry_is_bad(toy, monkeypatch):
    asked = fake_compiler(monkeypatch)
    for _ in range(3):
        assert backend.compiled_image(SOURCE, (9, 0)) == IMAGE
    assert asked == ["--gpu-architecture=sm_90"]
    (entry,) = image_cache.user_folder().iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert backend.compiled_image(SOURCE, (9, 0)) == IMAGE
    assert len(asked) == 2
    fake_compiler(monkeypatch, version=(13, 1))
    assert backend.kept_image(SOURCE, (9, 0)) is None


@pytest.mark.parametrize("fault", ["a file in its place", "no permission"])
def test_a_folder_that_cannot_be_written_to_costs_a_warning(toy, monkeypatch, fault):
    asked = fake_compiler(monkeypatch)
    folder = image_cache.user_folder()
    if fault == "no permission":

        def refuse(self, data):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        folder.write_text("not a folder")
    with pytest.warns(UserWarning, match="Name a folder in DISTILL_PRETRAIN_KERNEL_CACHE"):
        assert backend.compiled_image(SOURCE, (9, 0)) == IMAGE
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert backend.compiled_image(SOURCE, (9, 0)) == IMAGE
    assert len(asked) == 2


def test_images_that_came_with_the_package_are_preferred(gpu, monkeypatch):
    monkeypatch.setattr(prebuild, "sources", lambda: [SOURCE])
    fake_compiler(monkeypatch)
    prebuild.prebuild(image_cache.PREBUILT, ["sm_80", "sm_90"])
    asked = fake_compiler(monkeypatch)
    backend.launcher_for(SOURCE, CUDA)
    assert asked == []
    assert gpu.named("cuModuleLoadData")[0][1] == IMAGE.data


def test_every_source_of_the_package_is_found():
    found = {source.folder for source in prebuild.sources()}
    assert found == {path.parent.name for path in KERNELS.glob("*/*.cuh")} - {"cuda"}


class Arguments(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int),)


def test_structures_are_those_of_the_driver():
    """Sizes and offsets of CUlaunchConfig and CUlaunchAttribute in cuda.h."""
    config = driver.LaunchConfig
    assert ctypes.sizeof(config) == 56
    assert (config.shared_bytes.offset, config.stream.offset) == (24, 32)
    assert (config.attributes.offset, config.num_attributes.offset) == (40, 48)
    assert ctypes.sizeof(driver.LaunchAttribute) == 72
    assert driver.LaunchAttribute.value.offset == 8


def launcher(library):
    return driver.ImageLauncher(driver.Driver(library), IMAGE, 0, lambda: 77)


def test_a_launch_names_grid_block_memory_stream_and_argument():
    library = FakeDriver()
    some = launcher(library)
    arguments = Arguments(number=5)
    some.launch("toy::fill<3>", arguments, grid=(7, 2), block=64, shared_bytes=100)
    (call,) = library.named("cuLaunchKernel")
    _, *sizes, stream, pointers, extra = call
    assert sizes == [7, 2, 1, 64, 1, 1, 100]
    assert stream.value == 77 and extra is None
    assert Arguments.from_address(pointers[0]).number == 5
    assert library.named("cuModuleGetFunction")[0][2] == b"_Z1k"
    some.launch("toy::fill<3>", arguments, grid=(7, 2), block=64)
    assert len(library.named("cuModuleGetFunction")) == 1
    some.launch("toy::fill<3>", arguments, grid=(0, 2), block=64)
    assert len(library.named("cuLaunchKernel")) == 2
    # The thread's own context is as it was.
    assert len(library.named("cuCtxPushCurrent_v2")) == len(library.named("cuCtxPopCurrent_v2"))


def test_clusters_and_large_shared_memory_are_asked_for():
    library = FakeDriver()
    launcher(library).launch(
        "toy::fill<3>", Arguments(), grid=(32, 1), block=64, shared_bytes=100_000, cluster=16
    )
    ((config, *_),) = library.named("cuLaunchKernelEx")
    config = config._obj
    attribute = config.attributes[0]
    assert (config.grid_x, config.block_x, config.shared_bytes) == (32, 64, 100_000)
    assert (config.num_attributes, attribute.id, attribute.value.cluster.x) == (1, 4, 16)
    assert [call[1:] for call in library.named("cuFuncSetAttribute")] == [(8, 100_000), (14, 1)]


def test_an_error_of_the_driver_has_its_name_and_the_call():
    with pytest.raises(driver.DriverError, match=r"cuModuleLoadData: .* \(222\)"):
        launcher(FakeDriver("cuModuleLoadData"))

    class Old:
        cuInit = staticmethod(lambda flags: 0)

    with pytest.raises(driver.DriverError, match="too old: it has no cuLaunchKernelEx"):
        driver.Driver(Old()).call("cuLaunchKernelEx")


def test_without_a_gpu_the_reason_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "need a CUDA device" in backend.unavailable_reason(torch.device("cpu"))
    assert "torch finds no usable GPU" in backend.unavailable_reason(CUDA)
    with pytest.raises(backend.KernelsUnavailable, match="doctor"):
        backend.launcher_for(SOURCE, CUDA)


def no_driver():
    raise driver.DriverError("no NVIDIA driver: libcuda.so.1: cannot open shared object file")


def no_compiler():
    raise nvrtc.NvrtcMissing("no libnvrtc in a wheel or on the library path")


@pytest.mark.parametrize(
    ("module", "load", "message"),
    [
        (driver, no_driver, r"the CUDA driver cannot be used; found: no NVIDIA driver.*--gpus all"),
        (nvrtc, no_compiler, r"NVRTC, which compiles.*pip install nvidia-cuda-nvrtc.*\[cuda\]"),
    ],
)
def test_what_is_missing_is_named(gpu, monkeypatch, module, load, message):
    monkeypatch.setattr(module, "load", load)
    with pytest.raises(backend.KernelsUnavailable, match=message):
        backend.launcher_for(SOURCE, CUDA)
    assert re.search(message, backend.loading_problem(SOURCE, CUDA))


def test_a_gpu_that_is_too_old_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "found: compute capability 7.5; expected: at least 8.0" in backend.unavailable_reason(
        CUDA
    )


def test_an_image_the_driver_cannot_load_is_told(gpu, monkeypatch):
    fake_compiler(monkeypatch)
    gpu.refused = ("cuModuleLoadData",)
    with pytest.raises(backend.KernelsUnavailable, match=r"cannot load.*nvidia-smi"):
        backend.launcher_for(SOURCE, CUDA)


def test_where_everything_is_there_nothing_is_in_the_way(gpu, monkeypatch):
    fake_compiler(monkeypatch)
    assert backend.loading_problem(SOURCE, CUDA) is None
    assert backend.launcher_for(SOURCE, CUDA) is backend.launcher_for(SOURCE, CUDA)
