"""NaN and spikes follow the policy, and never enter the statistics that judge the next step."""

from __future__ import annotations

import math

import pytest

from distill_pretrain.errors import TrainingStopped
from distill_pretrain.train.config import BadStepsConfig
from distill_pretrain.train.guard import StepGuard, Verdict

LEVEL = [3.0, 3.1, 2.9, 3.05]


def guard(**settings) -> StepGuard:
    return StepGuard(BadStepsConfig(window=4, **settings), LEVEL)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)]
)
def test_what_is_not_finite_is_skipped_and_forgotten(loss, norm):
    judge = guard()
    assert judge.judge(5, loss, norm) is Verdict.SKIP
    assert judge.reason and judge.recent == LEVEL
    assert judge.judge(6, 3.0, 1.0) is Verdict.APPLY
    assert judge.reason is None and judge.recent == [*LEVEL[1:], 3.0]


def test_a_spike_is_one_against_the_recent_steps_only():
    judge = guard(spike="skip", spike_deviations=8)
    limit = sum(LEVEL) / 4 + 8 * (sum((x - sum(LEVEL) / 4) ** 2 for x in LEVEL) / 4) ** 0.5
    assert judge.judge(5, limit + 1e-9, 1.0) is Verdict.SKIP
    assert judge.recent == LEVEL
    assert judge.judge(6, limit - 1e-9, 1.0) is Verdict.APPLY
    assert (
        StepGuard(BadStepsConfig(window=4, spike="skip"), LEVEL[1:]).judge(4, 99.0, 1.0)
        is Verdict.APPLY
    )
    assert guard().judge(5, 99.0, 1.0) is Verdict.APPLY


def test_stop_says_where_and_why():
    with pytest.raises(TrainingStopped, match=r"(?s)step 7.*loss is nan"):
        guard(nonfinite="stop").judge(7, math.nan, 1.0)


def test_bad_steps_without_end_stop_the_job():
    judge = guard(most_in_a_row=2)
    assert [judge.judge(n, math.nan, 1.0) for n in (1, 2)] == [Verdict.SKIP] * 2
    assert judge.judge(3, 3.0, 1.0) is Verdict.APPLY
    assert [judge.judge(n, math.nan, 1.0) for n in (4, 5)] == [Verdict.SKIP] * 2
    with pytest.raises(TrainingStopped, match="3 in a row"):
        judge.judge(6, math.nan, 1.0)


def test_rollbacks_are_counted_and_take_the_statistics_back():
    judge = guard(spike="rollback", most_rollbacks=1)
    judge.judge(5, 3.2, 1.0)
    assert judge.judge(6, 99.0, 1.0) is Verdict.ROLL_BACK
    judge.go_back(LEVEL)
    assert judge.recent == LEVEL
    judge.judge(6, 3.0, 1.0)
    with pytest.raises(TrainingStopped, match="after 1 rollbacks"):
        judge.judge(7, 99.0, 1.0)
