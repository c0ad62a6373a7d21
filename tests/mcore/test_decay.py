"""How much of the rate's decay is left at a step, against what megatron-core's scheduler makes of the rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distill_pretrain.mcore.model.config import OptimizerConfig
from distill_pretrain.mcore.runtime.core import OptimizerParamScheduler

STEPS = 30
WSD = {"decay_style": "wsd", "wsd_decay_steps": 10}


@pytest.mark.parametrize(
    "settings",
    [
        {"decay_style": "linear"},
        {"decay_style": "cosine", "warmup_steps": 4},
        {"decay_style": "cosine", "decay_steps": 20},
        {"decay_style": "constant", "warmup_steps": 3},
        {**WSD, "warmup_steps": 5},
        {**WSD, "wsd_decay_style": "cosine", "decay_steps": 25},
        {**WSD, "wsd_decay_style": "minus_sqrt"},
        {"decay_style": "linear", "warmup_steps": STEPS},
    ],
)
def test_it_is_the_share_by_which_the_rate_is_above_its_least(settings: dict[str, Any]):
    config = OptimizerConfig(lr=3.0, min_lr=1.0, **settings)
    group: dict[str, Any] = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(config.decay_steps or STEPS, config.warmup_steps + 1),
        lr_decay_style="WSD" if config.decay_style == "wsd" else config.decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_steps,
        lr_wsd_decay_style=config.wsd_decay_style,
    )
    for step in range(1, STEPS + 5):
        scheduler.step(increment=1)
        found = config.decay_left(step, steps=STEPS)
        if step <= config.warmup_steps:
            assert found == 1.0
        else:
            assert found == pytest.approx((group["lr"] - 1.0) / 2.0, abs=1e-12)
