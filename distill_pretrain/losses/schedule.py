"""Settings that change with the step: a number, or [step, value] points."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

Schedule = float | tuple[tuple[float, float], ...]
"""How a setting changes with the optimizer step: a constant, or (step, value) points with ascending steps."""


def value_at(schedule: Schedule, step: int) -> float:
    """Return the value at optimizer step `step` (1 is the first): linear between the points, constant outside them."""
    if not isinstance(schedule, tuple):
        return schedule
    # numpy is not imported with the recipe's sections, which every --help reads.
    import numpy as np

    steps, values = zip(*schedule, strict=True)
    return float(np.interp(step, steps, values))


def extremes(schedule: Schedule) -> tuple[float, float]:
    """Return the least and the largest value over all steps."""
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
        ValueError: it is neither a number nor a list of points.
    """
    try:
        if not isinstance(value, list | tuple):
            return _number(value)
        points = tuple((_number(step), _number(at)) for step, at in value)
        steps = [step for step, _ in points]
        if not points or any(step < 0 or step % 1 for step in steps) or steps != sorted({*steps}):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"found: {value}; expected: a number, or a list of [step, value] points with whole, "
            "ascending steps"
        ) from None
    return points


Scheduled = Annotated[Schedule, BeforeValidator(parse_schedule)]
"""The type of a recipe key that takes a schedule."""
