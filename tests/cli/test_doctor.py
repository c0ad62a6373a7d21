from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_pretrain.cache.codec.hc import native as hc_native
from distill_pretrain.cli.main import main
from distill_pretrain.jobs.doctor import checks
from distill_pretrain.jobs.doctor import finding as doctor_finding
from distill_pretrain.jobs.doctor import machine as doctor_machine

REPOSITORY = Path(__file__).resolve().parents[2]


def write_package(root: Path, name: str, files: dict[str, str]) -> None:
    for file, text in files.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_doctor(*path: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The verb in a fresh process that sees `path` first, after running `code`."""
    program = f"import sys\n{code}\nfrom distill_pretrain.cli.main import main\nsys.exit(main(['doctor']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY]))}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=path[0] if path else None,
        timeout=120,
    )


def test_every_line_says_found_or_missing_and_what_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    findings = [line for line in lines if "->" not in line]
    assert all(line.startswith(("ok", "-")) and line.endswith(")") for line in findings)
    text = "\n".join(findings)
    assert "distill-pretrain doctor" not in text  # as a remedy
    for name in (
        "python",
        "torch",
        "CUDA driver",
        "NVRTC",
        "megatron-core",
        "Transformer Engine",
        "apex",
        "transformers",
        "safetensors",
        "lm-eval",
        "deepspeed",
        "fsspec",
        "shared memory",
        "open files",
        "replacing files",
        "free space",
    ):
        assert f" {name} " in text
    assert f"work in {tmp_path}" in text


def test_works_without_torch_and_says_that_it_is_required(tmp_path: Path) -> None:
    blocked = ("torch", "megatron", "transformers", "matplotlib", "sentencepiece")
    code = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name.split('.')[0] in {blocked} else find(name, *a)\n"
        + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    )
    done = run_doctor(tmp_path, code=code)
    assert done.returncode == 2, done.stderr
    rows = {
        line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if "->" not in line
    }
    assert rows["torch"] == rows["megatron-core"] == rows["sentencepiece"] == "MISSING"
    assert rows["matplotlib"] == rows["transformers"] == "-"
    assert rows["numpy"] == "ok"
    assert "pip install 'distill-pretrain[eval]'" in done.stdout
    assert "torch: missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "found", "usable"),
    [
        ({"__init__.py": "raise ImportError('needs pyramid')"}, "unrelated package", False),
        (
            {"__init__.py": "", "optimizers/__init__.py": ""},
            "without its CUDA extension amp_C (missing)",
            False,
        ),
        ({"__init__.py": "", "optimizers/__init__.py": "", "../amp_C.py": ""}, "unknown", True),
    ],
)
def test_apex_is_told_from_its_namesake(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    found: str,
    usable: bool,
) -> None:
    write_package(tmp_path, "apex", files)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    finding = checks._apex()
    assert found in finding.found
    assert finding.usable == usable
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)


def test_a_bare_transformer_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raise RuntimeError('Found empty `transformer-engine` meta package installed.')"
    write_package(tmp_path, "transformer_engine", {"__init__.py": text})
    monkeypatch.syspath_prepend(tmp_path)
    finding = checks._transformer_engine()
    assert not finding.usable
    assert finding.found.startswith("bare install")
    assert "transformer_engine[pytorch]" in finding.install


@pytest.mark.parametrize(
    ("version", "usable"),
    [("0.15.3", False), ("0.16.0", True), ("0.19.2", True), ("0.20.0", False), ("1.0", False)],
)
def test_another_megatron_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, version: str, usable: bool
) -> None:
    monkeypatch.setattr(checks, "try_import", lambda *a, **k: (object(), ""))
    monkeypatch.setattr(checks, "version_of", lambda *names: version)
    finding = checks._megatron()
    assert finding.usable == usable
    assert finding.found == (version if usable else f"{version}, expected 0.16 to 0.19")


def test_doctor_asks_for_the_megatron_that_the_package_asks_for() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.search(r'"(megatron-core>=.+?)"', project)
    assert asked and asked[1] in checks._megatron().install


def test_a_broken_package_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "broken_one", {"__init__.py": "import no_such_thing"})
    write_package(
        tmp_path, "broken_two", {"__init__.py": "raise OSError('libcudart.so.12: no file')"}
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor_finding.try_import("broken_one") == (None, "needs no_such_thing")
    assert (
        doctor_finding.try_import("broken_two")[1]
        == "cannot be imported: OSError: libcudart.so.12: no file"
    )
    assert doctor_finding.try_import("broken_three") == (None, "missing")


def test_a_folder_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No such file" in doctor_machine.locks(tmp_path / "nowhere").found
    monkeypatch.setattr(
        doctor_machine.fcntl, "lockf", lambda *a: None
    )  # as a mount with nolock does
    finding = doctor_machine.locks(tmp_path)
    assert not finding.usable
    assert "do not keep other processes out" in finding.found


def test_a_fast_coder_that_was_not_built_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hc_native, "find_library", lambda: None)
    finding = checks._fast_coder()
    assert (finding.usable, finding.required, finding.found) == (False, False, "not built")
    assert "C compiler" in finding.install
    monkeypatch.setattr(hc_native, "load", lambda: None)
    assert checks._fast_coder().usable


class Driver:
    """Stands for libcuda: a driver that runs CUDA 12.4."""

    def cuDriverGetVersion(self, number) -> int:
        number._obj.value = 12040
        return 0


@pytest.mark.parametrize(
    ("torch_cuda", "usable"), [("12.8", True), ("11.8", True), ("13.0", False), (None, True)]
)
def test_a_driver_too_old_for_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, usable: bool
) -> None:
    monkeypatch.setattr(doctor_machine.ctypes, "CDLL", lambda name: Driver())
    finding = doctor_machine.cuda_driver(torch_cuda)
    assert finding.usable == usable
    assert "runs CUDA up to 12.4" in finding.found
    assert "for CUDA 12" in finding.install or usable


def test_a_run_time_compiler_that_cannot_be_loaded_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libnvrtc.so.12"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(doctor_machine, "_nvrtc_libraries", lambda: iter([str(broken)]))
    finding = doctor_machine.nvrtc()
    assert not finding.usable
    assert finding.found.startswith("cannot be loaded")
    monkeypatch.setattr(doctor_machine, "_nvrtc_libraries", lambda: iter(["libnvrtc.so.none"]))
    assert doctor_machine.nvrtc().found == "missing"


def test_nvrtc_is_found_in_a_pip_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nvidia/cuda_nvrtc/lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.12", "libnvrtc-builtins.so.12.4"):
        (folder / name).touch()
    monkeypatch.setattr(doctor_machine.site, "getsitepackages", lambda: [str(tmp_path)])
    ours = [library for library in doctor_machine._nvrtc_libraries() if str(tmp_path) in library]
    assert ours == [str(folder / "libnvrtc.so.12")]


def test_small_limits_are_named_with_what_raises_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda which: (1024, 4096))
    finding = doctor_machine.open_files()
    assert not finding.usable
    assert "1024 per process, may be raised to 4096" in finding.found
    usage = SimpleNamespace(total=64 * 2**20, free=2**20)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda folder: usage)
    assert not doctor_machine.free_space(tmp_path).usable
    shared = doctor_machine.shared_memory()
    assert not shared.usable
    assert "--ipc=host" in shared.install


def test_a_file_system_that_does_not_replace_files_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor_machine.publishing(tmp_path).found.startswith("works, ")
    assert not list(tmp_path.iterdir())
    assert "No such file" in doctor_machine.publishing(tmp_path / "nowhere").found
    replace = os.replace
    monkeypatch.setattr(doctor_machine.os, "replace", lambda old, new: None)
    assert "does not replace" in doctor_machine.publishing(tmp_path).found

    def copy_over(old: Path, new: Path) -> None:
        text = old.read_bytes()
        new.write_bytes(text)  # as a mount of an object store may do
        replace(old, old.with_suffix(".gone"))

    monkeypatch.setattr(doctor_machine.os, "replace", copy_over)
    assert "takes the old file" in doctor_machine.publishing(tmp_path).found


def test_remote_stores_that_lack_a_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "try_import", lambda name: (object(), ""))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name == "s3fs" or None)
    finding = checks._remote_stores()
    assert finding.usable
    assert "distill-pretrain[gcs]" in finding.found and "[s3]" not in finding.found


def test_deepspeed_is_told_from_the_compilers_of_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "try_import", lambda name: (None, "missing"))
    finding = checks._deepspeed()
    assert (finding.usable, finding.found) == (False, "missing")
    assert "distill-pretrain[deepspeed]" in finding.install
    monkeypatch.setattr(checks, "try_import", lambda name: (object(), ""))
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    assert "c++ missing, nvcc missing" in checks._deepspeed().found
