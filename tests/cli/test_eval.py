from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import VOCAB, SmallCache

import distill_pretrain.mcore.parallel
import distill_pretrain.teacher.engines
from distill_pretrain.cli.main import main


class ScaledTable:
    """Random bigram logits; the file's text names the seed."""

    device = torch.device("cpu")

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.text = path.read_text()
        rng = np.random.default_rng(int(self.text))
        self.table = torch.from_numpy(rng.standard_normal((VOCAB, vocab_size)).astype(np.float32))

    @property
    def identity(self) -> dict[str, Any]:
        return {"text": self.text}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Engines without megatron-core; lists what was opened."""
    calls: list[tuple[str, str, str]] = []

    def open_engine(kind: str, path: Path, dtype: str, **options: Any) -> ScaledTable:
        assert options["tokenizer_sha256"] == "d" * 64
        calls.append((kind, path.name, dtype))
        return ScaledTable(path, options["vocab_size"])

    @contextmanager
    def no_groups(parallel: object, *, seed: int):
        yield None

    monkeypatch.setattr(distill_pretrain.teacher.engines, "open_engine", open_engine)
    monkeypatch.setattr(distill_pretrain.mcore.parallel, "model_parallel", no_groups)
    return calls


@pytest.fixture
def recipe(small_cache: SmallCache) -> Path:
    root = small_cache.recipe.parent
    for name, seed in (("a", "1"), ("b", "2"), ("t", "3")):
        (root / name).write_text(seed)
    with small_cache.recipe.open("a") as file:
        file.write(
            f"teacher: {{path: {root / 't'}, dtype: bf16}}\n"
            f"eval: {{models: {{a: {root / 'a'}, b: {root / 'b'}}}, output: {root / 'out' / 'eval.json'}}}\n"
        )
    return small_cache.recipe


def run(recipe: Path, *overrides: str) -> int:
    tokens = recipe.parent / "tokens" / "train"
    return main(["eval", str(recipe), f"data.held_out_tokens={tokens}", *overrides])


def figures(recipe: Path) -> dict[str, Any]:
    return json.loads((recipe.parent / "out" / "eval.json").read_text())


def test_figures_are_written_with_all_that_decides_them(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe) == 0
    assert opened == [
        ("megatron", "t", "bf16"),
        ("megatron", "a", "fp32"),
        ("megatron", "b", "fp32"),
    ]
    values = figures(recipe)
    assert list(values["scores"]) == ["a", "b", "teacher"]
    assert values["scores"]["a"]["num_positions"] == 74
    assert values["inputs"]["models"]["b"]["identity"] == {"text": "2"}
    assert values["inputs"]["teacher"]["identity"] == {"text": "3"}
    out = capsys.readouterr().out
    assert f"{values['scores']['b']['kl']:.4f}" in out
    beside = recipe.parent / "out" / "eval.json.recipe.yaml"
    assert "held_out_tokens" in beside.read_text()


def test_the_same_inputs_are_not_scored_again(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe)
    path = recipe.parent / "out" / "eval.json"
    first = path.stat().st_mtime_ns
    assert run(recipe, "eval.micro_batch_size=2") == 0
    assert path.stat().st_mtime_ns == first
    assert "already done" in capsys.readouterr().out
    (recipe.parent / "b").write_text("5")
    before = figures(recipe)
    assert run(recipe) == 0
    assert figures(recipe)["scores"]["b"] != before["scores"]["b"]
    assert run(recipe, "eval.num_sequences=2") == 0
    assert figures(recipe)["inputs"]["num_sequences"] == 2
    path.write_text("{}")
    assert run(recipe) == 0
    assert figures(recipe)["scores"]["a"] == before["scores"]["a"]


def test_a_teacher_listed_as_a_model_runs_once(recipe: Path, opened: list[Any]) -> None:
    root = recipe.parent
    assert run(recipe, f"eval.models={{teacher: {root / 't'}, a: {root / 'a'}}}") == 0
    assert [name for _, name, _ in opened] == ["t", "a"]
    assert list(figures(recipe)["scores"]) == ["a", "teacher"]
    assert run(recipe, f"eval.models.teacher={root / 'b'}") == 2


def test_without_a_teacher(recipe: Path, opened: list[Any]) -> None:
    assert run(recipe, "teacher=null") == 0
    values = figures(recipe)
    assert list(values["scores"]) == ["a", "b"]
    assert values["scores"]["a"]["kl"] is None
    assert set(values["paired"]["a"]["b"]) == {"ce"}


def test_no_held_out_text(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "data.held_out_tokens=null") == 2
    assert "data.held_out_tokens" in capsys.readouterr().err
