from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.files import ownership
from distill_pretrain.files.ownership import owner_of
from tests.support.owner import owned_elsewhere

SCORE = {
    "num_sequences": 3,
    "num_positions": 48,
    "ce": 2.0,
    "ce_standard_error": None,
    "perplexity": 7.389,
    "top1_accuracy": 0.5,
    "kl": None,
    "top1_agreement": None,
    "teacher_entropy": None,
    "ece": 0.1,
    "reliability": {"bins": [0, 1], "positions": [48], "confidence": [0.6], "accuracy": [0.5]},
    "acceptance": None,
    "accepted_length": None,
    "num_cache_positions": None,
    "cross_entropy_cache": None,
    "kl_cache": None,
}


def write_recipe(root: Path) -> Path:
    (root / "run").mkdir()
    row = {"step": 1, "loss": 5.0, "ce": 5.0, "kl": None, "grad_norm": 1.0, "lr": 0.1, "tokens": 9}
    line = json.dumps({**row, "tokens_per_second": 1.0, "seconds": 1.0})
    (root / "run" / "metrics.jsonl").write_text(line + "\n")
    fields = {"version": 2, "inputs": {}, "paired": {}, "software": {}, "date": "today"}
    fields |= {"gradients": None, "tasks": None}
    (root / "eval.json").write_text(json.dumps({**fields, "scores": {"ce": SCORE}}))
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"report: {{runs: {{ce: {root / 'run'}}}, eval: {root / 'eval.json'}, output_dir: {root / 'out'}}}"
    )
    return recipe


def test_report_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["report", str(recipe), "report.title=Mine"]) == 0
    assert str(tmp_path / "out" / "report.md") in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Mine\n")
    assert f"recipe `{recipe}`" in text
    assert "There is no second student" in text
    assert "10.00%" in text
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 1000
    assert "title: Mine" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_report_has_one_writer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    recipe = write_recipe(tmp_path)
    with owned_elsewhere(owner_of(tmp_path / "out")) as holder:
        assert main(["report", str(recipe)]) == 2
    assert f"process {holder.pid} on node7" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.md").exists()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["report", str(write_recipe(tmp_path))]) == 0
    assert not (tmp_path / "out").exists()


def test_missing_inputs_are_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["report", str(recipe), "report.eval=nothing.json"]) == 2
    assert "nothing.json" in capsys.readouterr().err
    assert main(["report", str(recipe), "report={runs: {ce: nowhere}}"]) == 2
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["report", str(recipe)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
