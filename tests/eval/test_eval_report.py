from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import make_scores, write_eval, write_run

from distill_pretrain.errors import ConfigError, MissingDependency
from distill_pretrain.eval.config import ReportConfig
from distill_pretrain.eval.curves import RunLogError, TrainingCurve
from distill_pretrain.eval.report import write_report
from distill_pretrain.eval.results import EvalFileError, EvalResults


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    """A teacher, a CE student and a KD student; the run folder of the teacher is called big."""
    runs = {
        "big": write_run(tmp_path / "big", steps=90, floor=2.5),
        "kd": write_run(tmp_path / "kd", steps=60, floor=3.0, kd=True, seed=1),
        "ce": write_run(tmp_path / "ce", steps=60, floor=3.2, seed=2),
    }
    scores = {
        "kd": make_scores(3.11, 0.31, 0.68, seed=1),
        "ce": make_scores(3.29, 0.62, 0.55, seed=2),
        "teacher": make_scores(2.88, 0.0, 1.0, seed=3),
    }
    write_eval(tmp_path / "eval.json", scores, teacher_path=runs["big"])
    return ReportConfig(runs=runs, eval=tmp_path / "eval.json", output_dir=tmp_path / "report")


def table_of(text: str) -> dict[str, dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_structure(config: ReportConfig) -> None:
    path = write_report(config, recipe="my recipe.yaml")
    text = path.read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Distillation report",
        "## Measured differences",
        "## Training curves",
        "## How it was made",
    ]
    assert list(table_of(text)) == ["big (teacher)", "kd", "ce"]
    assert "my recipe.yaml" in text
    assert f"`{config.runs['ce'] / 'recipe.yaml'}`" in text
    assert "torch 1.2.3" in text.replace("torch (at eval) 1.2.3", "torch 1.2.3")
    assert sorted(p.name for p in path.parent.iterdir()) == ["loss.png", "report.md"]


def test_numbers_are_those_of_the_files(config: ReportConfig) -> None:
    table = table_of(write_report(config).read_text())
    scores = json.loads(config.eval.read_text())["scores"]
    for row, run, scored in (
        ("big (teacher)", "big", "teacher"),
        ("kd", "kd", "kd"),
        ("ce", "ce", "ce"),
    ):
        lines = (config.runs[run] / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        cells = table[row]
        assert cells["steps"] == str(log[-1]["step"])
        assert cells["tokens seen"] == f"{log[-1]['tokens']:,}"
        final = sum(record["ce"] for record in log[-20:]) / 20
        assert float(cells["final train CE"]) == pytest.approx(final, abs=5.1e-5)
        assert float(cells["held-out CE"]) == pytest.approx(scores[scored]["ce"], abs=5.1e-5)
        assert float(cells["perplexity"]) == pytest.approx(
            math.exp(scores[scored]["ce"]), abs=5.1e-4
        )
        median = np.median([record["tokens_per_second"] for record in log])
        assert float(cells["median tokens/s"].replace(",", "")) == pytest.approx(median, abs=0.51)
    assert table["kd"]["KL(teacher‖model)"] == "0.3100"
    assert table["ce"]["KL(teacher‖model)"] == "0.6200"
    assert table["ce"]["top-1 agreement"] == "55.0%"
    assert table["big (teacher)"]["KL(teacher‖model)"] == "–"


def test_differences_are_against_the_plain_run_and_say_their_direction(
    config: ReportConfig,
) -> None:
    text = write_report(config).read_text()
    lines = [line for line in text.splitlines() if line.startswith("- **")]
    assert len(lines) == 1
    pair = EvalResults.load(config.eval).paired["kd"]["ce"]["ce"]
    assert pair["difference"] == pytest.approx(-0.18)
    expected = f"held-out CE is 0.1800 ± {pair['standard_error']:.4f} nats per token lower"
    assert lines[0].startswith("- **kd** against **ce** (60 steps against 60): ")
    assert expected in lines[0]
    assert "KL(teacher‖model) is 0.3100 ± 0.0000 nats per token lower" in lines[0]


def test_a_worse_model_is_called_higher(config: ReportConfig) -> None:
    scores = {"kd": make_scores(3.4, None, 0, seed=1), "ce": make_scores(3.3, None, 0, seed=2)}
    write_eval(config.eval, scores)
    text = write_report(config).read_text()
    assert "held-out CE is 0.1000 ± " in text
    assert "nats per token higher." in text
    assert list(table_of(text)) == ["big", "kd", "ce"]
    assert table_of(text)["big"]["held-out CE"] == "–"
    assert table_of(text)["kd"]["KL(teacher‖model)"] == "–"


def test_a_killed_runs_log_is_read_to_its_last_whole_line(config: ReportConfig) -> None:
    path = config.runs["ce"] / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    text = write_report(config).read_text()
    assert table_of(text)["ce"]["steps"] == "59"
    assert "The log of ce ends in an incomplete line" in text


def test_the_picture_is_a_png_of_decent_size(config: ReportConfig) -> None:
    data = (write_report(config).parent / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") >= 1000


def test_nan_in_a_curve_still_makes_a_report(config: ReportConfig) -> None:
    path = config.runs["ce"] / "metrics.jsonl"
    record = json.loads(path.read_text().splitlines()[-1])
    path.write_text(json.dumps({**record, "step": 1, "ce": float("nan")}) + "\n")
    assert table_of(write_report(config).read_text())["ce"]["final train CE"] == "nan"


def test_missing_and_damaged_inputs_are_named(config: ReportConfig, tmp_path: Path) -> None:
    runs = {**config.runs, "ce": tmp_path / "nowhere"}
    with pytest.raises(RunLogError, match="nowhere"):
        write_report(config.model_copy(update={"runs": runs}))
    whole = config.eval.read_bytes()
    values = json.loads(whole)
    damaged = [
        (whole[:-40], "no valid JSON"),
        (b"[]", "not a version 1"),
        (json.dumps({**values, "version": 2}).encode(), "not a version 1"),
        (json.dumps({k: v for k, v in values.items() if k != "scores"}).encode(), "scores"),
        (json.dumps({**values, "scores": {"ce": {"ce": 1}}}).encode(), "ce are incomplete"),
        (json.dumps({**values, "scores": {}}).encode(), "no scores"),
        (json.dumps({**values, "paired": {"kd": {"ce": {"ce": 1}}}}).encode(), "paired"),
    ]
    for content, message in damaged:
        config.eval.write_bytes(content)
        with pytest.raises(EvalFileError, match=message):
            write_report(config)
    config.eval.unlink()
    with pytest.raises(EvalFileError, match="No such file"):
        write_report(config)
    assert not config.output_dir.exists()


def test_names_that_do_not_meet_are_refused(config: ReportConfig) -> None:
    write_eval(config.eval, {"other": make_scores(3.0, None, 0)})
    with pytest.raises(ConfigError, match="other"):
        write_report(config)


def test_without_matplotlib_the_extra_is_named(
    config: ReportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(MissingDependency, match=r"distill-pretrain\[eval\]"):
        write_report(config)


def test_saved_figures_load_to_the_same(config: ReportConfig, tmp_path: Path) -> None:
    results = EvalResults.load(config.eval)
    results.save(tmp_path / "deep" / "copy.json")
    assert EvalResults.load(tmp_path / "deep" / "copy.json") == results
    assert TrainingCurve.load(config.runs["kd"]).has_kl
