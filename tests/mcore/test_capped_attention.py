"""Soft-capped attention against its definition in float64, whatever the blocks of queries, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from distill_pretrain.mcore.model import capped_attention as module
from distill_pretrain.mcore.model.capped_attention import capped_attention
from tests.support.live_memory import LiveMemory

CAP, SCALE = 2.0, 0.4


def inputs(queries=13, keys=17, groups=2, width=8):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, width), (2, groups, keys, width), (2, groups, keys, width))
    return [torch.randn(shape, generator=g).mul_(2).requires_grad_() for shape in shapes]


def definition(q, k, v, window):
    """One query after the other, float64."""
    q, k, v = q.double(), k.double(), v.double()
    ratio, behind = q.size(1) // k.size(1), k.size(2) - q.size(2)
    rows = []
    for head in range(q.size(1)):
        own = []
        for at in range(q.size(2)):
            last = behind + at + 1
            places = slice(0 if window is None else max(0, last - window), last)
            keys, values = (x[:, head // ratio, places] for x in (k, v))
            scores = (keys @ q[:, head, at, :, None])[..., 0] * SCALE
            weights = (CAP * torch.tanh(scores / CAP)).softmax(-1)
            own.append((weights[:, None] @ values)[:, 0])
        rows.append(torch.stack(own, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("elements", [1, 500, 1 << 24])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_and_its_gradients_are_those_of_the_definition(window, elements, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    for groups, queries in ((2, 13), (4, 17)):
        own = inputs(queries=queries, groups=groups)
        exact = [x.detach().double().requires_grad_() for x in own]
        expected = definition(*exact, window)
        weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1))
        (expected * weights).sum().backward()
        found = capped_attention(*own, cap=CAP, scale=SCALE, window=window)
        (found * weights).sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(own, exact, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            again = capped_attention(*own, cap=CAP, scale=SCALE, window=window)
        assert torch.equal(again, found)


def test_without_a_scale_it_is_that_of_the_width_and_a_high_cap_is_none():
    q, k, v = inputs(queries=17, groups=4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(capped_attention(q, k, v, cap=1e4), plain, rtol=1e-4, atol=1e-5)


def test_dropped_weights_are_the_same_when_they_are_computed_again(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 500)
    grads = []
    for recomputes in (True, False):
        own = inputs()
        if not recomputes:
            monkeypatch.setattr(module, "checkpoint", lambda f, *args, **_: f(*args))
        torch.manual_seed(7)
        found = capped_attention(*own, cap=CAP, dropout=0.5)
        found.square().sum().backward()
        grads.append([found.detach(), *(x.grad for x in own)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scores_of_all_queries_are_never_there_at_once(monkeypatch):
    length = 512
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 14)
    own = inputs(queries=length, keys=length, groups=4)
    with LiveMemory() as memory:
        capped_attention(*own, cap=CAP).square().sum().backward()
    assert memory.peak < 0.5 * 2 * 4 * length**2 * 4
    assert math.isfinite(float(own[0].grad.sum()))
