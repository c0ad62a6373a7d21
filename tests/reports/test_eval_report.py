from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import make_scores, write_eval, write_run

from distill_pretrain.errors import ConfigError, MissingDependency
from distill_pretrain.eval.config import ReportConfig
from distill_pretrain.eval.metrics import ModelScores
from distill_pretrain.reports.curves import RunLogError, TrainingCurve
from distill_pretrain.reports.picture import draw_diagram
from distill_pretrain.reports.report import write_report
from distill_pretrain.reports.results import EvalFileError, EvalResults

VERSION_1_FIGURES = {
    "num_sequences",
    "num_positions",
    "ce",
    "ce_standard_error",
    "perplexity",
    "top1_accuracy",
    "kl",
    "top1_agreement",
    "teacher_entropy",
}


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


def table_of(text: str, heading: str | None = None) -> dict[str, dict[str, str]]:
    """The first table below a heading, or of all."""
    lines = text.splitlines()
    lines = lines[0 if heading is None else lines.index(heading) :]
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_structure(config: ReportConfig) -> None:
    path = write_report(config, recipe="my recipe.yaml")
    text = path.read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Distillation report",
        "## Measured differences",
        "## Calibration",
        "## Drafting for the teacher",
        "## Training curves",
        "## How it was made",
    ]
    assert list(table_of(text)) == ["big (teacher)", "kd", "ce"]
    assert "my recipe.yaml" in text
    assert f"`{config.runs['ce'] / 'recipe.yaml'}`" in text
    assert "torch 1.2.3" in text.replace("torch (at eval) 1.2.3", "torch 1.2.3")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "loss.png",
        "reliability.png",
        "report.md",
    ]


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
    assert table["ce"]["ECE"] == table["big (teacher)"]["ECE"] == "15.00%"
    assert table["ce"]["acceptance"] == "41.2%"
    assert table["big (teacher)"]["acceptance"] == "–"


def test_drafting_is_told_of_every_model_but_the_teacher(config: ReportConfig) -> None:
    table = table_of(write_report(config).read_text(), "## Drafting for the teacher")
    assert table == {
        name: {"drafts per round": name, "2": "1.25", "4": "1.75"} for name in ("kd", "ce")
    }


def test_a_held_out_cache_gradients_and_tasks_have_their_tables(config: ReportConfig) -> None:
    scores = {
        "kd": make_scores(3.1, None, 0, seed=1, has_cache=True),
        "ce": make_scores(3.3, None, 0, seed=2, has_cache=True),
    }
    rows = [
        {"num_batches": 1, "num_positions": 1016, "angle_degrees": 31.26, "norm_ratio": 1.2},
        {"num_batches": 4, "num_positions": 4064, "angle_degrees": None, "norm_ratio": None},
    ]
    results = dataclasses.replace(
        write_eval(config.eval, scores),
        gradients={"inputs": {}, "caches": {"draws": rows[:1], "top|3": rows[1:]}},
        tasks={
            "inputs": {},
            "models": {
                "kd": {"quiz": {"acc": 0.5, "acc_stderr": 0.1}, "text": {"byte_perplexity": 3.25}},
                "ce": {"quiz": {"acc": 0.25, "acc_stderr": 0.1}},
            },
        },
    )
    results.save(config.eval)
    text = write_report(config).read_text()
    cached = table_of(text, "## Against the held-out cache")
    assert cached["kd"]["CE(cache, model)"] == "3.6000"
    assert cached["kd"]["KL(cache‖model)"] == "1.6000"
    assert "CE(cache, model) is 0.2000 ± 0.0000 nats per token lower" in text
    assert "| draws | 1,016 | 31.3 | 1.200 |" in text
    assert "| top\\|3 | 4,064 | – | – |" in text
    tasks = table_of(text, "## Zero-shot tasks")
    assert tasks["quiz, acc"] == {
        "task": "quiz, acc",
        "kd": "0.5000 ± 0.1000",
        "ce": "0.2500 ± 0.1000",
    }
    assert tasks["text, byte_perplexity"]["ce"] == "–"
    assert "## Drafting for the teacher" not in text


def test_figures_of_version_1_make_a_report_without_the_newer_ones(config: ReportConfig) -> None:
    values = json.loads(config.eval.read_text())
    newer = set(ModelScores.__dataclass_fields__) - VERSION_1_FIGURES
    for scores in values["scores"].values():
        for name in newer - {"sums"}:
            del scores[name]
    for newer_part in ("gradients", "tasks", "out_of_domain", "copying"):
        del values[newer_part]
    config.eval.write_text(json.dumps({**values, "version": 1}))
    text = write_report(config).read_text()
    assert table_of(text)["ce"]["ECE"] == table_of(text)["ce"]["acceptance"] == "–"
    assert table_of(text)["ce"]["KL(teacher‖model)"] == "0.6200"
    assert "reliability" not in text
    assert not (config.output_dir / "reliability.png").exists()


def test_figures_of_version_2_are_read_as_they_were(config: ReportConfig) -> None:
    now = EvalResults.load(config.eval)
    values = json.loads(config.eval.read_text())
    del values["out_of_domain"], values["copying"]
    config.eval.write_text(json.dumps({**values, "version": 2}))
    assert EvalResults.load(config.eval) == now


def test_another_text_and_copying_have_their_tables(config: ReportConfig) -> None:
    results = EvalResults.load(config.eval)
    elsewhere = EvalResults.of(
        {"kd": make_scores(4.5, 0.7, 0.4), "teacher": make_scores(4.0, 0.0, 1.0)},
        inputs={},
        software={},
        date="",
    )
    text = {"inputs": {}, "scores": elsewhere.scores, "paired": elsewhere.paired}
    found = {"first": 5.0, "repeated": 1.25, "repeated_standard_error": 0.5, "accuracy": 0.75}
    copying = {
        "inputs": {"num_sequences": 64, "length": 1024},
        "models": {"kd": {**found, "kl": 0.125}, "ce": {**found, "kl": None, "first": 1.0}},
    }
    dataclasses.replace(results, out_of_domain=text, copying=copying).save(config.eval)
    report = write_report(config).read_text()
    cells = table_of(report, "## Out of domain")
    assert cells["kd"]["CE"] == "4.5000" and cells["kd"]["KL(teacher‖model)"] == "0.7000"
    assert cells["teacher"]["CE"] == "4.0000"
    copied = table_of(report, "## Copying from context")
    assert copied["kd"]["CE, repeated"] == "1.2500 ± 0.5000"
    assert (copied["kd"]["difference"], copied["ce"]["difference"]) == ("-3.7500", "+0.2500")
    assert (copied["kd"]["copied"], copied["ce"]["KL, repeated"]) == ("75.0%", "–")
    assert "64 sequences of 1,024 different ids" in report


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
    folder = write_report(config).parent
    for name in ("loss.png", "reliability.png"):
        data = (folder / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") >= 1000


def test_the_reliability_diagram_shows_the_bins_that_have_positions() -> None:
    score = make_scores(3.0, None, 0).as_dict()
    axes, shown = FakeAxes(), score["reliability"]
    draw_diagram(axes, axes, {"kd": score, "old": {**score, "reliability": None}})
    assert shown["positions"] == [500, 0, 0, 0, 500]
    assert [line for line in axes.lines if line[0] != [0, 1]] == [([0.1, 0.9], [0.2, 0.7])]
    assert axes.labels == ["kd (ECE 15.0%)"]
    assert axes.steps == [([0.5, 0, 0, 0, 0.5], shown["bins"])]


class FakeAxes:
    """Remembers what is drawn."""

    def __init__(self) -> None:
        self.lines: list[tuple[list[float], list[float]]] = []
        self.labels: list[str] = []
        self.steps: list[tuple[list[float], list[float]]] = []

    def plot(self, x: list[float], y: list[float], *style: str, **options: object) -> None:
        self.lines.append((x, y))
        self.labels += [str(options["label"])] if "label" in options else []

    def stairs(self, values: list[float], edges: list[float], **options: object) -> None:
        self.steps.append((values, edges))


def test_nan_in_a_curve_still_makes_a_report(config: ReportConfig) -> None:
    path = config.runs["ce"] / "metrics.jsonl"
    record = json.loads(path.read_text().splitlines()[-1])
    path.write_text(json.dumps({**record, "step": 1, "ce": float("nan")}) + "\n")
    assert table_of(write_report(config).read_text())["ce"]["final train CE"] == "nan"


def with_score(values: dict, **changes: object) -> bytes:
    scores = {**values["scores"], "ce": {**values["scores"]["ce"], **changes}}
    return json.dumps({**values, "scores": scores}).encode()


def with_text(values: dict, **changes: object) -> dict:
    text = {"inputs": {}, "scores": values["scores"], "paired": values["paired"], **changes}
    return {**values, "out_of_domain": text}


def test_missing_and_damaged_inputs_are_named(config: ReportConfig, tmp_path: Path) -> None:
    runs = {**config.runs, "ce": tmp_path / "nowhere"}
    with pytest.raises(RunLogError, match="nowhere"):
        write_report(config.model_copy(update={"runs": runs}))
    whole = config.eval.read_bytes()
    values = json.loads(whole)
    damaged = [
        (whole[:-40], "no valid JSON"),
        (b"[]", "not a record of version 1 to 3"),
        (json.dumps({**values, "version": 4}).encode(), "not a record of version 1 to 3"),
        (json.dumps({**values, "gradients": {"inputs": {}}}).encode(), "gradients is incomplete"),
        (json.dumps({**values, "copying": {"inputs": {}}}).encode(), "copying is incomplete"),
        (json.dumps(with_text(values, scores={})).encode(), "no scores"),
        (json.dumps(with_text(values, paired={"kd": 1})).encode(), "paired"),
        (with_score(values, reliability={"bins": [0, 1]}), "damaged reliability diagram of ce"),
        (with_score(values, accepted_length={"2": "long"}), "no number of ce"),
        (json.dumps({k: v for k, v in values.items() if k != "scores"}).encode(), "scores"),
        (json.dumps({**values, "scores": {"ce": {"ce": 1}}}).encode(), "incomplete figures of ce"),
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
