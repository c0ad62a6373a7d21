"""The recipe section `objective`: defaults, and what it refuses with which words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from distill_pretrain.losses.config import ObjectiveConfig


def test_the_default_is_cross_entropy():
    config = ObjectiveConfig()
    assert (config.ce_weight, config.kd_weight, config.peak_kd_weight) == (1.0, 0.0, 0.0)


def test_a_weight_that_is_above_zero_at_any_step_needs_targets():
    assert ObjectiveConfig(kd_weight=[[1, 0.0], [5, 0.5], [9, 0.0]]).peak_kd_weight == 0.5


def test_points_survive_a_dump():
    config = ObjectiveConfig(kd_weight=[[1, 0.5], [100, 0.0]], temperature=2)
    assert ObjectiveConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ce_weight": 0}, "nothing to learn"),
        ({"ce_weight": [[1, 0], [9, 0]]}, "nothing to learn"),
        ({"ce_weight": -1}, "at least 0"),
        ({"kd_weight": [[1, 1], [2, -0.1]]}, "at least 0"),
        ({"kd_weight": True}, "expected: a number"),
        ({"temperature": 0}, "more than 0"),
        ({"temperature": [[1, 1], [5, 0]]}, "more than 0"),
        ({"smoothing": 1}, "less than 1"),
        ({"smoothing": [[1, -0.5], [2, 0]]}, "at least 0"),
        ({"z_loss": -1}, "greater than or equal to 0"),
        ({"residual": "half"}, "renormalise"),
        ({"token_weighting": "student"}, "teacher_confidence"),
        ({"kd_weight": 1, "divergence": "reverse_kl"}, "no unbiased estimate"),
        ({"kd_weight": 1, "divergence": "jensen_shannon"}, "needs target: teacher"),
        ({"kd_weight": 1, "divergence": "reverse_kl", "residual": "decoupled"}, "residual: ghost"),
        (
            {"kd_weight": 1, "divergence": "reverse_kl", "residual": "ghost", "temperature": 2},
            "temperature 1",
        ),
        ({"kd_weight": 1, "tail_weight": 0.5, "residual": "ghost"}, "residual: decoupled"),
        ({"positions": "student_entropy"}, "nothing to choose"),
        ({"kd_weight": 1, "positions": "teacher_entropy", "temperature": 2}, "temperature 1"),
        ({"kd_weight": 1, "positions": "teacher_entropy", "smoothing": 0.1}, "no smoothing"),
        (
            {"kd_weight": 1, "positions": "student_entropy", "residual": "decoupled"},
            "another residual than decoupled",
        ),
        ({"kd_weight": 1, "positions": "student_entropy", "position_share": 0}, "greater than 0"),
        ({"kd_weight": 1, "target": "teacher", "residual": "decoupled"}, "no mass is missing"),
        ({"target": "teacher"}, "in vain"),
        ({"kd_weight": 1, "target": "teacher", "residual": "ghost"}, "no mass is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        ObjectiveConfig(**settings)
