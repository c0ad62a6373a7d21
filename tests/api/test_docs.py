"""docs/api.md has a section with a snippet for every public name, and the snippets run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import distill_pretrain

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_public_name_has_a_section_with_a_snippet_that_imports_it():
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", DOCUMENT.read_text(), re.M | re.S))
    assert set(sections) == set(distill_pretrain.__all__) - {"__version__"}
    for name, text in sections.items():
        assert re.search(rf"```python\n(.|\n)*from distill_pretrain import {name}\b", text), name


def test_the_snippets_run_one_after_another(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S):
        exec(compile(snippet, str(DOCUMENT), "exec"), names)
    printed = capsys.readouterr().out
    assert (
        "a label is outside the vocabulary; where: labels; found: 127; expected: below 64"
        in printed
    )
