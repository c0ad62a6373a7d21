"""docs/api.md has a section with a snippet for every public name, and the snippets run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch

import distill_pretrain
from tests.support.distributed import run_distributed

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_public_name_has_a_section_with_a_snippet_that_imports_it():
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", DOCUMENT.read_text(), re.M | re.S))
    assert set(sections) == set(distill_pretrain.__all__) - {"__version__"}
    for name, text in sections.items():
        assert re.search(rf"```python\n(.|\n)*from distill_pretrain import {name}\b", text), name


def run_snippets(folder: str, answer: str) -> None:
    """In a process of its own: some snippets are jobs. What a job changes in it is gone afterwards."""
    os.chdir(folder)
    before = state()
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for snippet in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S):
            exec(compile(snippet, str(DOCUMENT), "exec"), names)
    after = state()
    changed = [name for name, value in before.items() if after[name] != value]
    Path(answer).write_text(json.dumps({"printed": printed.getvalue(), "changed": changed}))


def state() -> dict[str, object]:
    functions = {f"torch.cuda.{name}": getattr(torch.cuda, name) for name in dir(torch.cuda)}
    return functions | {
        "random": torch.cuda.random.get_rng_state,
        "modes": torch.overrides._get_current_function_mode_stack(),
        "threads": torch.get_num_threads(),
        "warnings": [entry for entry in warnings.filters if "sympy" not in str(entry)],
        "environment": {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},
    }


def test_the_snippets_run_one_after_another(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    answer = tmp_path / "answer.json"
    run_distributed(run_snippets, 1, folder=str(tmp_path / "run"), answer=str(answer))
    found = json.loads(answer.read_text())
    wanted = "a label is outside the vocabulary; where: labels; found: 127; expected: below 64"
    assert wanted in found["printed"]
    assert found["changed"] == []
    for name in (
        "second_cache/manifest.json",
        "third_cache/manifest.json",
        "eval.json",
        "pruned/narrow/model.safetensors",
        "exported/model.safetensors",
    ):
        assert (tmp_path / "run" / name).exists(), name
