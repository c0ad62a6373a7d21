from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from distill_pretrain.reports.comparison.config import (
    CellConfig,
    CompareConfig,
    default_cells,
    default_sets,
)
from distill_pretrain.reports.comparison.journal import Stage, read_stages
from distill_pretrain.reports.comparison.orderings import (
    Ordering,
    decided_at,
    orderings,
    own_orderings,
)
from distill_pretrain.reports.comparison.report import write_comparison
from distill_pretrain.reports.comparison.results import CellResults, CellSpec, Comparison, Mean
from distill_pretrain.reports.curves import FIELDS, TrainingCurve
from distill_pretrain.reports.results import EvalResults

SEEDS = (1, 2, 3)
# The paper's losses: 300M student, 3B teacher.
PAPER = {"ce": 2.81, "full-kd": 2.75, "topk-3": 3.04, "topk-50": 2.80, "systematic-12": 2.75}
NOISE = {1: -0.01, 2: 0.0, 3: 0.01}


def reliability() -> dict[str, list]:
    return {
        "bins": [0.0, 0.5, 1.0],
        "positions": [10, 20],
        "confidence": [0.3, 0.8],
        "accuracy": [0.3, 0.7],
    }


def make_cell(
    name: str, ce: float, *, ece: float = 0.01, own_noise: float = 0.0, **spec: object
) -> CellResults:
    """A cell whose seeds differ by NOISE, common to all cells, and a little of its own."""
    own = {1: own_noise, 2: -own_noise, 3: 0.0}
    scores = {
        seed: {
            "ce": ce + NOISE[seed] + own[seed],
            "kl": ce - 2.7 + own[seed],
            "ece": ece,
            "acceptance": 0.6,
            "reliability": reliability(),
            "num_positions": 30,
        }
        for seed in SEEDS
    }
    columns = {field: np.array([1.0, 2.0]) for field in FIELDS}
    curves = {seed: TrainingCurve(columns=columns, cut_off=False) for seed in SEEDS}
    cache = spec.get("sampler") and name
    return CellResults(
        spec=CellSpec(name=name, cache=cache, runs={}, **spec),
        scores=scores,
        curves=curves,
        unique_ids=None if cache is None else float(name.split("-")[1]),
        bytes_per_token=None if cache is None else 2 * float(name.split("-")[1]),
    )


def paper(**changed: float) -> Comparison:
    losses = {**PAPER, **changed}
    topk = {"sampler": "topk", "residual": "renormalise"}
    cells = (
        make_cell("ce", losses["ce"], own_noise=0.001),
        make_cell("full-kd", losses["full-kd"], online=True),
        make_cell("topk-3", losses["topk-3"], ece=0.1, num_draws=3, **topk),
        make_cell("topk-50", losses["topk-50"], ece=0.02, num_draws=50, **topk),
        make_cell("systematic-12", losses["systematic-12"], sampler="systematic", num_draws=12),
    )
    evaluations = dict.fromkeys(SEEDS)
    return Comparison(cells=cells, teacher=cells[1].scores[1], evaluations=evaluations)


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {ordering.claim: ordering.verdict for ordering in orderings(comparison)}


def test_a_mean_has_the_spread_and_error_of_its_seeds():
    mean = Mean.of([1.0, 2.0, 4.0])
    assert mean.value == pytest.approx(7 / 3)
    assert mean.spread == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert mean.error == pytest.approx(mean.spread / math.sqrt(3))
    assert Mean.of([1.0]) == Mean(1.0, None, None, 1)


def test_differences_are_paired_by_seed():
    comparison = paper()
    gap = comparison.full.minus(comparison.text_only, "ce")
    assert gap.value == pytest.approx(-0.06)
    # The seeds' common noise, 0.01, cancels: what is left is CE's own 0.001.
    assert gap.error == pytest.approx(0.001 / math.sqrt(3))
    assert comparison.full.mean("ce").spread == pytest.approx(0.01)


@pytest.mark.parametrize(("ce", "gain"), [(2.81, 0.0), (2.75, 1.0), (2.78, 0.5), (3.04, -23 / 6)])
def test_gain_is_the_share_of_the_way_from_ce_to_full_kd(ce, gain):
    comparison = paper(**{"topk-50": ce})
    assert comparison.gain(comparison.cells[3]) == pytest.approx(gain, abs=1e-9)


def test_the_papers_figures_give_the_papers_orderings():
    found = verdicts(paper())
    assert found["FullKD is better than CE"] == "yes"
    assert found["the smallest Top-K is worse than CE"] == "yes"
    assert found["systematic-12 is better calibrated than the smallest Top-K"] == "yes"
    assert found["a sample with at most as many unique ids is better than Top-K"] == "yes"


def test_reversed_figures_reverse_the_verdict():
    assert verdicts(paper(**{"full-kd": 2.9}))["FullKD is better than CE"] == "no"


def test_a_difference_within_its_error_is_not_resolved():
    assert verdicts(paper(**{"full-kd": 2.8095}))["FullKD is better than CE"] == "not resolved"


def test_a_sample_is_only_held_against_top_k_with_at_least_its_ids():
    rivals = [o for o in orderings(paper()) if o.claim.startswith("a sample with at most")]
    assert [(o.low, o.high) for o in rivals] == [("systematic-12", "topk-50")]


def test_systematic_is_held_against_multinomial_at_equal_draws():
    comparison = paper()
    other = make_cell("multinomial-11", 2.77, sampler="multinomial", num_draws=12)
    more = Comparison(
        cells=(*comparison.cells, other),
        teacher=comparison.teacher,
        evaluations=comparison.evaluations,
    )
    assert own_orderings(comparison) == []
    (claim,) = own_orderings(more)
    assert (claim.low, claim.high, claim.verdict) == ("systematic-12", "multinomial-11", "yes")
    assert claim.gap.value == pytest.approx(0.02)


def test_the_report_has_the_figures_and_the_pictures(tmp_path):
    stage = Stage.now("train ce, seed 1", 61.0, processes=2)
    path = write_comparison(
        paper(), tmp_path, title="Targets", command="distill-pretrain compare x", stages=[stage]
    )
    text = path.read_text()
    assert "| topk-3 | 3.00 | 6.0 | 3.0400 ± 0.0100 | -383 |" in text
    assert "| full-kd | all | – | 2.7500 ± 0.0100 | 100 |" in text
    assert "-0.0600 ± 0.0006" in text
    assert "FullKD is better than CE: **yes**; held-out CE of `ce` minus `full-kd`: +0.0600" in text
    assert "equal in every cell of a seed" in text
    assert "`distill-pretrain compare x`" in text and "1 min 1 s" in text
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {
        "loss_unique_ids.png",
        "loss_bytes.png",
        "kl_unique_ids.png",
        "reliability.png",
    }
    for name in pictures:
        assert f"({name})" in text


def test_other_text_and_copying_have_a_table_with_the_teacher(tmp_path):
    whole = paper()
    text = {seed: {"ce": 4 + NOISE[seed], "kl": 1.5, "ece": 0.02} for seed in SEEDS}
    copies = {seed: {"first": 6.0, "repeated": 2.25, "accuracy": 0.5} for seed in SEEDS}
    cells = (whole.cells[0], replace(whole.cells[1], elsewhere=text, copying=copies))
    teacher = {"ce": 3.5, "kl": 0.0, "ece": 0.01}
    results = EvalResults(
        inputs={},
        scores={},
        paired={},
        software={},
        date="",
        out_of_domain={"scores": {"teacher": teacher}},
        copying={"models": {"teacher": {"first": 7.0, "repeated": 0.5, "accuracy": 0.875}}},
    )
    more = replace(whole, cells=cells, evaluations=dict.fromkeys(SEEDS, results))
    report = write_comparison(more, tmp_path, title="T", command="c", stages=[]).read_text()
    assert "| teacher | 3.5000 | 0.0000 | 1.00 | 7.0000 | 0.5000 | 87.50 |" in report
    assert (
        "| full-kd | 4.0000 ± 0.0100 | 1.5000 ± 0.0000 | 2.00 ± 0.00 | 6.0000 ± 0.0000 |" in report
    )
    assert "| ce | – | – | – | – | – | – |" in report


def test_unequal_starts_are_said_aloud(tmp_path):
    comparison = paper()
    comparison.cells[0].curves[2].columns["ce"] = np.array([1.5, 2.0])
    assert comparison.first_step_gap() == 0.5
    path = write_comparison(comparison, tmp_path, title="T", command="c", stages=[])
    assert "**not equal**" in path.read_text()


def test_one_seed_has_no_error_and_says_so():
    whole = paper()
    alone = Comparison(
        cells=tuple(
            CellResults(
                spec=cell.spec,
                scores={1: cell.scores[1]},
                curves={1: cell.curves[1]},
                unique_ids=cell.unique_ids,
                bytes_per_token=cell.bytes_per_token,
            )
            for cell in whole.cells
        ),
        teacher=whole.teacher,
        evaluations={1: None},
    )
    assert "one seed: no error" in orderings(alone)[0].line()


def test_stages_are_read_back_and_a_torn_line_is_left_out(tmp_path):
    stages = [Stage.now(f"train {n}", 1.0, processes=1) for n in range(2)]
    for stage in stages:
        stage.append_to(tmp_path)
    with (tmp_path / "stages.jsonl").open("a") as file:
        file.write('{"name": "tr')
    assert read_stages(tmp_path) == stages
    assert read_stages(tmp_path / "nowhere") == []


def test_default_cells_cover_every_set_and_every_fix():
    sets = default_sets(topk=(3, 12, 50), draws=(5, 50))
    assert sets["systematic-5"] == {"sampler": "systematic", "num_draws": 5}
    cells = default_cells({name: kept["sampler"] for name, kept in sets.items()})
    assert list(cells) == [
        *("ce", "full-kd", "topk-3", "topk-12"),
        *("topk-12-drop", "topk-12-label", "topk-12-ghost", "topk-12-uniform"),
        *("topk-50", "multinomial-5", "multinomial-50", "systematic-5", "systematic-50"),
    ]
    assert cells["topk-12"].objective["residual"] == "renormalise"
    assert "residual" not in cells["systematic-5"].objective
    assert cells["full-kd"] == CellConfig(
        objective={"ce_weight": 0.0, "kd_weight": 1.0, "target": "teacher"}
    )
    assert "topk-3-ghost" in default_cells({"topk-3": "topk", "topk-9": "topk"}, fixes_at="topk-3")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seeds": [1, 1]}, "different numbers"),
        ({"cells": {"a/b": {}}}, "a/b"),
        ({"cells": {}}, "no cell"),
        ({"eval": {"output": "x"}}, "output"),
    ],
)
def test_a_section_that_cannot_be_is_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        CompareConfig(output_dir=Path("x"), **keys)


@pytest.mark.parametrize(("gap", "verdict"), [(3.0, "not resolved"), (5.0, "yes"), (-5.0, "no")])
def test_three_seeds_need_more_than_two_standard_errors(gap, verdict):
    mean = Mean(value=gap * 0.01, spread=0.01 * 3**0.5, error=0.01, n=3)
    ordering = Ordering(claim="a below b", field="ce", low="a", high="b", gap=mean)
    assert ordering.verdict == verdict


def test_the_threshold_is_students_two_sided_95_percent_quantile():
    for seeds in (2, 3, 5, 10):
        assert decided_at(seeds) == pytest.approx(stats.t.ppf(0.975, seeds - 1), abs=0.006)
    assert decided_at(40) == pytest.approx(stats.t.ppf(0.975, 39), abs=0.03)
