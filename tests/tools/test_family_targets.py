"""The share of positions whose targets move between the engines: captured by the real verb, counted by hand."""

from __future__ import annotations

import pytest

from tests.checkpoint.test_families import save_random
from tools import family_targets
from tools.reporting import kept_rows, write_json

ENGINES = {"engines": ("hf fp32", "megatron fp32")}


@pytest.mark.parametrize("config", ["Qwen3Config", "Gemma3TextConfig"])
def test_few_targets_of_a_captured_family_move_between_the_engines(config, tmp_path):
    save_random(config, tmp_path / "model")
    family_targets.write_corpus(tmp_path / "train", 8)
    found = family_targets.measure(tmp_path / "train", tmp_path / "model", tmp_path, ENGINES)
    counts = found["engines"]
    # The last position of the only document has no next token.
    assert counts["positions"] == 8 * family_targets.SEQ_LEN
    assert counts["draws"] == 50 * counts["positions"]
    assert counts["moved"] <= 5 and counts["draws_moved"] <= 10


def test_a_draw_that_goes_to_another_id_is_one(monkeypatch):
    stored = {
        "one": [[(3, 2), (5, 1)], [(1, 3)], []],
        "other": [[(3, 1), (4, 1), (5, 1)], [(1, 3)], []],
    }
    monkeypatch.setattr(family_targets, "positions", lambda tokens, cache: stored[cache])
    found = family_targets.moved("tokens", "one", "other")  # type: ignore[arg-type]
    assert found == {"positions": 2, "moved": 1, "draws": 6, "draws_moved": 1}
    row = {"config": "Some", **dict.fromkeys(family_targets.PAIRS, found)}
    assert family_targets.table([row]).splitlines()[2].startswith("| `Some` | 50.00% (16.667%) |")


def test_rows_of_other_families_stay_where_they_were_measured_alike(tmp_path):
    rows = [{"config": "Qwen2Config"}, {"config": "Qwen3Config"}]
    report = {"environment": {"torch": "1", "date": "today"}, "num_draws": 50}
    asked = {"config": ["Qwen3Config"]}, ["torch"]
    file = tmp_path / "targets.json"
    assert kept_rows(file, report, *asked) == []
    write_json(file, {**report, "rows": rows})
    later = {"environment": {"torch": "1", "date": "tomorrow"}, "num_draws": 50}
    assert kept_rows(file, later, *asked) == rows[:1]
    assert kept_rows(file, {**report, "num_draws": 1}, *asked) == []
    assert kept_rows(file, {**report, "environment": {"torch": "2"}}, *asked) == []
