"""The loss has one record of settings: what a recipe or a call says arrives in it, and from there at the kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from distill_pretrain.kernels.sparse_kd.settings import TERMS, LossKeywords, LossSettings
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.terms import Objective

NAMES = [field.name for field in fields(LossSettings)]
DEFAULT = LossSettings(ce_weight=1.0, kd_weight=1.0)


def another(name):
    """A value that is not the default's."""
    value = getattr(DEFAULT, name)
    words = {
        "residual": "label",
        "token_weighting": "teacher_confidence",
        "divergence": "reverse_kl",
    }
    if isinstance(value, bool):
        return not value
    return words[name] if isinstance(value, str) else (value + 0.25) / 2


def test_every_setting_is_a_keyword_of_the_public_functions():
    assert get_type_hints(LossKeywords) == get_type_hints(LossSettings)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logit_cap"])
def test_every_setting_is_a_key_of_the_recipe_and_arrives(name):
    # Some settings mean something beside another one alone.
    beside = {"divergence": {"residual": "ghost"}, "tail_weight": {"residual": "decoupled"}}
    given = {"ce_weight": 1.0, "kd_weight": 1.0, **beside.get(name, {}), name: another(name)}
    found = ObjectiveConfig(**given).at(7)
    assert getattr(found, name) == another(name) != getattr(DEFAULT, name)
    differing = [n for n in NAMES if getattr(found, n) != getattr(DEFAULT, n)]
    assert sorted(differing) == sorted([name, *beside.get(name, {})])


def test_the_cap_of_the_logits_is_the_model_s_and_arrives_at_every_step():
    objective = Objective(ObjectiveConfig(), vocab_size=8, tensor_group=None, logit_cap=30.0)
    assert objective.settings == replace(ObjectiveConfig().at(1), logit_cap=30.0)
    objective.begin_step(2)
    assert objective.settings.logit_cap == 30.0


def test_every_number_and_switch_passes_through_the_operations_of_torch():
    numbers = [name for name in NAMES if type(getattr(DEFAULT, name)) in (float, bool)]
    settings = LossSettings(**{name: another(name) for name in numbers})
    passed = LossSettings.of_numbers(settings.numbers)
    assert {name: getattr(passed, name) for name in numbers} == {
        name: another(name) for name in numbers
    }


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_reported_where_it_is_trained(term):
    def names(**settings):
        return Objective(ObjectiveConfig(**settings), vocab_size=8, tensor_group=None).term_names

    assert names()[:3] == ("loss", "ce", "kl")
    assert term in names(**{TERMS[term]: 0.1})
