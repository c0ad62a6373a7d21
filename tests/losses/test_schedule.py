"""Settings that change with the step."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.schedule import WithDecay, extremes, parse_schedule, value_at


def test_points_are_joined_by_lines_and_constant_outside():
    points = parse_schedule([[10, 1.0], [20, 0.0], [40, 0.5]])
    steps = [0, 1, 10, 12, 15, 20, 30, 40, 1000]
    expected = [1.0, 1.0, 1.0, 0.8, 0.5, 0.0, 0.25, 0.5, 0.5]
    assert [value_at(points, step, 0.5) for step in steps] == pytest.approx(expected)
    assert extremes(points) == (0.0, 1.0)


def test_a_number_is_the_value_of_every_step():
    assert (
        value_at(parse_schedule(0.3), 1, 0.5) == value_at(parse_schedule("3e-1"), 10**9, 0) == 0.3
    )


@pytest.mark.parametrize(
    "value",
    [
        *([], [1, 2], [[1, 2, 3]], {"1": 2}, True, "x", None),
        *(
            [[2, 1], [1, 1]],
            [[1, 1], [1, 2]],
            [[1.5, 1]],
            [[-1, 1]],
            [[1, True]],
            [[1, float("nan")]],
        ),
        *({"stable": 1}, {"stable": 1, "decayed": "x"}, {"stable": 1, "decayed": True}),
        {"stable": 1, "decayed": 0, "steps": 3},
    ],
)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="points with whole, ascending steps"):
        parse_schedule(value)


def test_a_value_goes_with_the_decay_of_the_rate_and_is_exact_at_both_ends():
    schedule = parse_schedule({"stable": 0.7, "decayed": "1e-1"})
    assert schedule == WithDecay(0.7, 0.1) == parse_schedule(schedule)
    assert [value_at(schedule, 9, left) for left in (1.0, 0.0)] == [0.7, 0.1]
    assert value_at(schedule, 9, 0.25) == pytest.approx(0.1 + 0.25 * 0.6)
    assert extremes(schedule) == (0.1, 0.7) == extremes(WithDecay(0.1, 0.7))


def test_a_weight_that_goes_with_the_decay_survives_a_dump_and_is_checked_at_both_ends():
    config = ObjectiveConfig(kd_weight={"stable": 0, "decayed": 0.5}, smoothing=[[1, 0.1]])
    assert ObjectiveConfig(**config.model_dump(mode="json")) == config
    assert config.peak_kd_weight == 0.5
    assert (config.with_decay, config.moving) == (("kd_weight",), ("kd_weight", "smoothing"))
    assert config.at(3, 0.5).kd_weight == 0.25
    for key, value, words in (("kd_weight", -1, "at least 0"), ("temperature", 0, "more than 0")):
        with pytest.raises(ValidationError, match=words):
            ObjectiveConfig(**{key: {"stable": 1, "decayed": value}})


def test_every_weight_follows_its_own_points():
    config = ObjectiveConfig(
        ce_weight=((1, 0.0), (11, 1.0)),
        kd_weight=((1, 1.0), (11, 0.0)),
        temperature=((1, 1.0), (11, 3.0)),
        smoothing=((1, 0.0), (11, 0.2)),
        z_loss=0.1,
    )
    settings = config.at(6)
    found = (settings.ce_weight, settings.kd_weight, settings.temperature, settings.smoothing)
    assert found == pytest.approx((0.5, 0.5, 2.0, 0.1))
    assert settings.kd_scale == pytest.approx(0.5 * 4.0)
