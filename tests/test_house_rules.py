"""Rules of the house that a tool can check; CONTRIBUTING.md has the reasons."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distill_pretrain"
LAUNCH_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as c; c()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_go_downwards():
    pytest.importorskip("importlinter")
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("errors.py", "from distill_pretrain.cli import recipe", "Imports go downwards"),
        ("corpus/readers.py", "import distill_pretrain.train", "Imports go downwards"),
        ("losses/config.py", "import distill_pretrain.mcore", "Imports go downwards"),
        ("data/config.py", "from megatron.core import mpu", "Only mcore knows megatron"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, module, line, contract):
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / "distill_pretrain")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "distill_pretrain" / module
    target.write_text(target.read_text() + f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout


def python_files() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_only_mcore_imports_megatron():
    # Also sees imports by name, which import-linter does not.
    for name, tree in python_files():
        if name.startswith("mcore/"):
            continue
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                modules = [ast.unparse(argument).strip("'\"f") for argument in node.args]
            for module in modules:
                assert module.split(".")[0] != "megatron", f"{name}:{node.lineno}"


def test_only_processes_reads_what_the_launcher_set():
    for name, tree in python_files():
        if name.startswith("processes/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in LAUNCH_VARIABLES:
                raise AssertionError(f"{name}:{node.lineno} names {node.value}")


def test_results_are_printed_by_commands_and_jobs_and_all_else_is_logged():
    # A process that the watchdog ends has its last words; `prebuild` is a command of its own.
    others = {"processes/watchdog.py", "kernels/cuda/prebuild.py"}
    for name, tree in python_files():
        if name.startswith(("cli/", "jobs/")) or name in others:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "print", f"{name}:{node.lineno} prints"


def test_the_package_takes_nothing_but_its_version_from_its_own_front_door():
    # The public names are imported lazily, where import-linter does not see which way.
    for name, tree in python_files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "distill_pretrain":
                public = {a.name for a in node.names if not (PACKAGE / a.name).is_dir()}
                public -= {file.stem for file in PACKAGE.glob("*.py")}
                assert public <= {"__version__"}, f"{name}:{node.lineno} imports {sorted(public)}"


def test_every_public_module_has_a_docstring():
    for name, tree in python_files():
        if not Path(name).name.startswith("_"):
            assert ast.get_docstring(tree), name


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]


def test_no_file_names_a_machine_or_a_folder_outside_the_repository():
    # Written in pieces, so that this file passes its own test.
    private = re.compile(
        "|".join(("/work" + r"/(?:main|shared|venv)", r"\.\./" + "shared", r"/home/" + r"\w+/"))
    )
    for path in repository_files():
        if not path.is_file() or path.suffix in {".png", ".bin", ".idx", ".model"}:
            continue
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            assert not private.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_every_test_file_is_collected():
    # Folders named as pytest's norecursedirs (dist, build, venv, ...) would be passed over without a word.
    collected = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-qq",
            "-p",
            "no:cacheprovider",
            "tests",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr
    seen = {line.rpartition(":")[0].partition("::")[0] for line in collected.stdout.splitlines()}
    files = {
        str(path.relative_to(ROOT))
        for path in repository_files()
        if path.name.startswith("test_") and path.suffix == ".py"
    }
    assert files and files <= seen, sorted(files - seen)


def test_every_python_file_is_linted():
    # ruff's default exclude has dist, build, venv and others.
    if shutil.which("ruff") is None:
        pytest.skip("ruff is not installed (extra dev)")
    listed = subprocess.run(
        ["ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen = {Path(line) for line in listed.stdout.splitlines()}
    files = {path for path in repository_files() if path.suffix == ".py" and path.exists()}
    assert files and files <= seen, sorted(map(str, files - seen))
