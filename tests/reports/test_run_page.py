"""The page of a run shows what its log says, needs nothing from elsewhere, and stays small."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.reports.curves import TrainingCurve
from distill_pretrain.reports.run_page import write_run_page
from distill_pretrain.reports.run_plot import Mark, draw, log_ticks, tick_label, ticks

MORE = {"tflops_per_device": 1.25, "mfu": None, "data_wait": 0.02, "cache_mb_per_s": None}
MEMORY = {"rss_peak_gb": 0.5, "gpu_peak_gb": None}


def write_log(folder: Path, steps: int, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        ce = 2 + 5 / step
        record = {
            "step": step,
            "loss": ce,
            "ce": ce,
            "kl": None,
            "z": 0.5,
            "grad_norm": 1.0 + step % 3,
            "lr": 1e-3 * step,
            "tokens": 64 * step,
            "tokens_per_second": 320.0,
            "seconds": 0.2,
            "applied": step != 7,
            "time": 1e9 + step,
        }
        lines.append(json.dumps({**record, **more}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def write_events(folder: Path, *events: dict[str, Any]) -> None:
    lines = [json.dumps({"time": 1e9, **event}) + "\n" for event in events]
    (folder / "events.jsonl").write_text("".join(lines) + '{"event": "sav')  # a torn end


class Resources(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag in ("script", "link", "img", "iframe", "object") or names & {"src", "href"}:
            self.found.append(tag)


def figures(page: str) -> dict[str, ElementTree.Element]:
    """SVG by caption; raises where one is no XML."""
    found = re.findall(r"<figcaption>(.*?)(?:<span.*?)?</figcaption>(<svg.*?</svg>)", page)
    return {caption: ElementTree.fromstring(svg) for caption, svg in found}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_log(tmp_path / "kd & <b>", 60, **MORE, **MEMORY)
    write_events(
        folder,
        {"event": "started", "step": 0, "num_processes": 2},
        {"event": "bad_step", "step": 7, "reason": "the loss is nan", "verdict": "skip"},
        {"event": "saved", "step": 20, "seconds": 1.5},
        {"event": "started", "step": 20, "num_processes": 4},
        {"event": "repeating", "step": 20, "steps": 13},
        {"event": "finished", "step": 60},
    )
    (folder / "recipe.yaml").write_text("train: {steps: 60}  # <script>\n")
    return folder


def test_the_page_says_what_the_run_went_through(run: Path) -> None:
    page = write_run_page(run).read_text()
    assert "Finished at step 60; started 2 times." in page
    assert "kd &amp; &lt;b&gt;" in page and "&lt;script&gt;" in page and "<script" not in page
    assert "the loss is nan" in page and "num processes 4" in page
    assert "13 steps were done again" in page and "1 checkpoints saved, 1.50 s each" in page
    tiles = dict(re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", page))
    shown = {what: value for value, what in tiles.items()}
    assert shown["tokens seen"] == "3,840" and shown["of the time waiting for data"] == "10.00%"
    assert shown["z, final"] == "0.5000" and shown["updates left out"] == "1"
    assert "model FLOPs utilisation" not in shown, "unknown figures are not shown"
    parser = Resources()
    parser.feed(page)
    assert parser.found == []


def test_the_page_is_read_by_keyboard_and_by_voice(run: Path) -> None:
    page = write_run_page(run).read_text()
    # What axe-core asks for: text within a landmark, and what scrolls can have the focus.
    assert page.index("<main>") < page.index("<h1>") < page.index("</main>")
    assert '<pre tabindex="0" role="region" aria-label="Recipe">' in page


def test_every_known_column_has_a_picture_and_no_other(run: Path) -> None:
    found = figures(write_run_page(run).read_text())
    assert list(found) == [
        "loss (nats per token)",
        "ce (nats per token)",
        "z (nats per token)",
        "learning rate",
        "gradient norm before clipping",
        "tokens per second",
        "model TFLOP/s per device",
        "waiting for data, share of a step",
        "peak memory of a process, GB",
    ]
    marks = [line.get("class") for line in found["ce (nats per token)"].iter("line")]
    assert marks.count("bad") == 1 and marks.count("start") == 1


def test_the_line_goes_through_the_values_and_marks_stand_at_their_step() -> None:
    steps = np.arange(1, 12, dtype=np.float64)
    values = np.full(11, 3.0)
    values[5], values[8] = 5.0, np.nan
    mark = Mark(step=6, text="here", kind="bad")
    svg = ElementTree.fromstring(
        draw(steps, {"a": values}, y_label="<y>", marks=[mark], smoothed=False)
    )
    line = next(svg.iter("polyline")).get("points") or ""
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert len(places) == 10, "a gap is left out"
    xs, ys = zip(*places, strict=True)
    assert ys.index(min(ys)) == 5 and len({y for y in ys if y != min(ys)}) == 1
    assert xs[5] == float(next(m for m in svg.iter("line") if m.get("class") == "bad").get("x1"))


def test_a_long_run_stays_small_and_keeps_its_extremes() -> None:
    steps = np.arange(200_000, dtype=np.float64)
    values = np.sin(steps / 3e4) + 10
    values[150_001] = 11.5
    svg = draw(steps, {"a": values}, y_label="y")
    assert len(svg) < 60_000
    outline = next(ElementTree.fromstring(svg).iter("polygon")).get("points") or ""
    tops = [float(place.split(",")[1]) for place in outline.split()]
    assert min(tops) < np.quantile(tops, 0.05) - 20


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    assert [10**tick for tick in log_ticks(-0.5, 1.1)] == pytest.approx([0.5, 1, 2, 5, 10])
    assert [tick_label(v) for v in (25000, 1.5e6, 0.002, 3e-5)] == ["25k", "1.5M", "0.002", "3e-05"]


def test_further_columns_are_read_and_missing_ones_are_unknown(tmp_path: Path) -> None:
    log = write_log(tmp_path, 2) / "metrics.jsonl"
    first, second = log.read_text().splitlines()
    log.write_text(first + "\n" + json.dumps({**json.loads(second), "new": 4.0}) + "\n")
    curve = TrainingCurve.load(tmp_path)
    assert np.isnan(curve["new"][0]) and curve["new"][1] == 4.0
    assert curve["applied"].tolist() == [1.0, 1.0]


def test_the_verb_takes_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A run of an earlier version: fewer fields, no events, no recipe.
    run = write_log(tmp_path / "run", 3)
    assert main(["report", str(run)]) == 0
    assert str(run / "run.html") in capsys.readouterr().out
    assert main(["report", str(run), "--html", str(tmp_path / "deep/page.html")]) == 0
    assert "recipe.yaml is not in the run folder" in (tmp_path / "deep/page.html").read_text()
    assert main(["report", str(run), "report.title=x"]) == 2
    assert "report.title=x" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("{}")
    assert main(["report", str(tmp_path / "r.yaml"), "--html", "x.html"]) == 2
    assert "a run folder in place of the recipe" in capsys.readouterr().err
