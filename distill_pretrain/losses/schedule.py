"""Settings that change with the step: a number, [step, value] points, or what goes with the decay of the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator


@dataclass(frozen=True)
class WithDecay:
    """A value that goes with the learning rate's decay.

    Attributes:
        stable: the value until the decay begins, the warm-up included.
        decayed: the value at its end, and behind it.
    """

    stable: float
    decayed: float


Schedule = float | tuple[tuple[float, float], ...] | WithDecay
"""How a setting changes with the optimizer step: a constant, (step, value) points of ascending steps, `WithDecay`."""


def value_at(schedule: Schedule, step: int, decay_left: float) -> float:
    """Return the value at an optimizer step.

    Args:
        schedule: linear between its points, constant outside them.
        step: 1 is the first.
        decay_left: of the learning rate at this step: 1 until its decay begins, 0 from its end.
    """
    if isinstance(schedule, WithDecay):
        # Exact at both ends: a decay that branches off goes on from the stable value itself.
        return decay_left * schedule.stable + (1 - decay_left) * schedule.decayed
    if not isinstance(schedule, tuple):
        return schedule
    # numpy is not imported with the recipe's sections, which every --help reads.
    import numpy as np

    steps, values = zip(*schedule, strict=True)
    return float(np.interp(step, steps, values))


def extremes(schedule: Schedule) -> tuple[float, float]:
    """Return the least and the largest value over all steps."""
    if isinstance(schedule, WithDecay):
        values = [schedule.stable, schedule.decayed]
    else:
        values = [value for _, value in schedule] if isinstance(schedule, tuple) else [schedule]
    return min(values), max(values)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def parse_schedule(value: object) -> Schedule:
    """Parse a recipe's value as a schedule.

    Raises:
        ValueError: it is neither a number, a list of points, nor `WithDecay` or a mapping of its fields.
    """
    if isinstance(value, WithDecay):
        return value
    try:
        if isinstance(value, dict):
            return WithDecay(**{f"{name}": _number(at) for name, at in value.items()})
        if not isinstance(value, list | tuple):
            return _number(value)
        points = tuple((_number(step), _number(at)) for step, at in value)
        steps = [step for step, _ in points]
        if not points or any(step < 0 or step % 1 for step in steps) or steps != sorted({*steps}):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"found: {value}; expected: a number, a list of [step, value] points with whole, ascending steps, or "
            "{stable: number, decayed: number}"
        ) from None
    return points


Scheduled = Annotated[Schedule, BeforeValidator(parse_schedule)]
"""The type of a recipe key that takes a schedule."""
