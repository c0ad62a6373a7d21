"""Our AdamW takes the steps of torch's."""

from __future__ import annotations

import torch

from distill_pretrain.mcore.runtime.adam import GroupStepAdamW


def test_updates_equal_torchs_adamw_in_float64():
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    optimizers = (GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings))
    for _ in range(20):
        grads = [torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2)]
        for params in (ours, theirs):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert optimizers[0].param_groups[0]["step"] == 20
    assert "step" not in optimizers[0].state[ours[0]]
