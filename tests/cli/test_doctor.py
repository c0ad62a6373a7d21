from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_pretrain.cli import doctor
from distill_pretrain.cli.main import main
from distill_pretrain.formats import hc_native

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
    for name in ("python", "torch", "megatron-core", "Transformer Engine", "apex", "transformers"):
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
    finding = doctor._apex()
    assert found in finding.found
    assert finding.usable == usable
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)


def test_a_bare_transformer_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raise RuntimeError('Found empty `transformer-engine` meta package installed.')"
    write_package(tmp_path, "transformer_engine", {"__init__.py": text})
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._transformer_engine()
    assert not finding.usable
    assert finding.found.startswith("bare install")
    assert "transformer_engine[pytorch]" in finding.install


def test_another_megatron_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_import", lambda *a, **k: (object(), ""))
    monkeypatch.setattr(doctor, "_version", lambda *names: "0.17.3")
    finding = doctor._megatron()
    assert not finding.usable
    assert "0.17.3, expected 0.16.x" in finding.found


def test_a_broken_package_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "broken_one", {"__init__.py": "import no_such_thing"})
    write_package(
        tmp_path, "broken_two", {"__init__.py": "raise OSError('libcudart.so.12: no file')"}
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._import("broken_one") == (None, "needs no_such_thing")
    assert (
        doctor._import("broken_two")[1] == "cannot be imported: OSError: libcudart.so.12: no file"
    )
    assert doctor._import("broken_three") == (None, "missing")


def test_a_folder_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No such file" in doctor._locks(tmp_path / "nowhere").found
    monkeypatch.setattr(doctor.fcntl, "lockf", lambda *a: None)  # as a mount with nolock does
    finding = doctor._locks(tmp_path)
    assert not finding.usable
    assert "do not keep other processes out" in finding.found


def test_a_fast_coder_that_was_not_built_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hc_native, "find_library", lambda: None)
    finding = doctor._fast_coder()
    assert (finding.usable, finding.required, finding.found) == (False, False, "not built")
    assert "C compiler" in finding.install
    monkeypatch.setattr(hc_native, "load", lambda: None)
    assert doctor._fast_coder().usable
