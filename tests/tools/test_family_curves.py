"""Curves of a family's student under layouts, beside one process: the tool's own way, with few steps."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.checkpoint.test_hf_conversion import family_configs
from tools import family_curves


def test_every_family_of_a_student_is_measured():
    from distill_pretrain.checkpoint.hf.registry import families

    of_names = {family_configs()[name].model_type for name in family_curves.NAMES}
    assert of_names == set(families())


def test_a_row_may_have_another_limit_of_its_clamp():
    clamped, published = (family_curves.section(name) for name in ("gpt_oss", "gpt_oss-limit-7"))
    assert clamped["experts"].pop("swiglu_limit") == 0.3
    assert published["experts"].pop("swiglu_limit") == 7.0
    assert clamped == published


@pytest.mark.slow
def test_a_family_with_experts_learns_alike_under_expert_and_pipeline_parallelism():
    row = family_curves.measure("qwen3_moe", ["PP2", "EP2"], 4)
    assert set(row["differences"]) == {"PP2", "EP2"}
    assert max(row["differences"].values()) < 1e-5
    assert row["last_loss"] < row["first_loss"]
    assert "| `qwen3_moe` |" in family_curves.table([row])


def test_the_worst_step_counts_and_dense_families_have_no_cell_of_experts(monkeypatch):
    curves = {"one": [3.0, 2.0, 1.0], "TP2": [3.0, 2.5, 1.25]}

    def trained(cases, **_):
        return {name: {"loss": curves[name]} for name in cases}

    monkeypatch.setattr(family_curves, "run_cases", lambda cases: trained(cases))
    monkeypatch.setattr(
        family_curves, "run_distributed", lambda function, processes, cases: trained(cases)
    )
    row = family_curves.measure("qwen2", ["TP2", "EP2"], 3)
    assert row["differences"] == {"TP2": 0.5}
    line = family_curves.table([row]).splitlines()[-1]
    assert line == "| `qwen2` | 3.000 to 1.000 | 5.0e-01 |  |  |  |"
