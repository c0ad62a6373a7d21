from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_pretrain.reports import picture
from distill_pretrain.reports.curves import FILE_NAME, RunLogError, TrainingCurve
from distill_pretrain.reports.picture import smooth


def record(step: float, **changes: object) -> str:
    fields = {
        "step": step,
        "loss": 2.0 + step,
        "ce": 3.0 + step,
        "kl": None,
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens": 64 * step,
        "tokens_per_second": 100.0,
        "seconds": 0.64,
        "applied": True,
    }
    return json.dumps({**fields, **changes}) + "\n"


def load(tmp_path: Path, text: str) -> TrainingCurve:
    (tmp_path / FILE_NAME).write_text(text)
    return TrainingCurve.load(tmp_path)


def test_columns_and_nulls(tmp_path: Path) -> None:
    curve = load(tmp_path, record(1) + record(2, kl=0.5))
    assert curve["ce"].tolist() == [4.0, 5.0]
    assert np.isnan(curve["kl"][0])
    assert curve["kl"][1] == 0.5
    assert curve.has_kl
    assert not curve.cut_off
    assert not load(tmp_path, record(1)).has_kl


def test_a_number_that_only_some_lines_have_is_a_column(tmp_path: Path) -> None:
    curve = load(tmp_path, record(1, held_out_ce=3.5) + record(2) + record(3, scale=8.0)[:-1])
    assert curve["held_out_ce"][0] == 3.5
    assert np.isnan(curve["held_out_ce"][1:]).all()
    assert curve["scale"][2] == 8.0


def test_a_cut_off_last_line_is_left_out(tmp_path: Path) -> None:
    for cut in range(1, len(record(3)) - 1):
        curve = load(tmp_path, record(1) + record(2) + record(3)[:cut])
        assert curve["step"].tolist() == [1.0, 2.0]
        assert curve.cut_off
    whole_but_newline = load(tmp_path, record(1) + record(2)[:-1])
    assert whole_but_newline["step"].tolist() == [1.0, 2.0]
    assert not whole_but_newline.cut_off


def test_a_repeated_step_counts_as_last_written(tmp_path: Path) -> None:
    curve = load(tmp_path, record(1) + record(2) + record(3) + record(2, ce=7.0))
    assert curve["step"].tolist() == [1.0, 2.0, 3.0]
    assert curve["ce"][1] == 7.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no complete line"),
        (record(1)[:9], "no complete line"),
        (record(1)[:9] + "\n" + record(2), "metrics.jsonl:1; found: no valid JSON"),
        (record(1) + "[]\n", "metrics.jsonl:2; found: no JSON object"),
        (record(1, lr=None), "lr is null"),
        (record(1, ce="x"), 'ce is "x"'),
        (record(1, tokens=True), "tokens is true"),
        (record(1.5), "whole number"),
        (record(float("nan")), "whole number"),
        (record(1, ce=10**400), "ce is too large"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RunLogError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_undecodable_bytes_are_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(record(1).encode() + b"\xff\xfe\n")
    with pytest.raises(RunLogError, match=r"metrics\.jsonl:2"):
        TrainingCurve.load(tmp_path)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="No such file") as caught:
        TrainingCurve.load(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / FILE_NAME) in str(caught.value)


def test_smoothing_keeps_a_line_and_skips_nan() -> None:
    line = np.arange(50.0)
    assert smooth(line, 5)[:45] == pytest.approx(line[:45])
    assert smooth(np.full(9, 2.5), 3).tolist() == [2.5] * 9
    assert smooth(np.array([1.0, np.nan, 3.0]), 1)[1] == 2.0
    assert smooth(np.array([4.0]), 7).tolist() == [4.0]
    assert smooth(np.arange(4.0), 0).tolist() == [0, 1, 2, 3]


def test_the_picture_has_the_held_out_figures_of_a_run_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(picture, "_png", lambda figure: figures.append(figure) or b"")
    text = record(1) + record(2, held_out_ce=3.5) + record(3) + record(4, held_out_ce=3.25)
    for log in (text, record(1) + record(2)):
        picture.draw_curves({"run": load(tmp_path, log)}, held_out={})
    scored, plain = (figure.axes[0] for figure in figures)
    drawn = [(line.get_xdata(), line.get_ydata()) for line in scored.lines]
    assert any(list(x) == [2, 4] and list(y) == [3.5, 3.25] for x, y in drawn)
    assert "held-out CE, while training" in [text.get_text() for text in scored.get_legend().texts]
    assert len(plain.lines) == 2
