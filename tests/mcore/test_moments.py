"""Closed forms against quadrature, and against simulation within twice the errors that the paper's authors publish."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.init import moments
from distill_pretrain.mcore.init.moments import Moments

TOKENS, SETTINGS = 1 << 19, 16
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

# Percent, at the median and the 90th percentile of the settings: forward variance, gradient variance.
PUBLISHED = {
    "linear": ((0.4, 1.4), (0.2, 1.0)),
    "relu": ((0.5, 1.9), (0.6, 1.5)),
    "gelu": ((0.2, 0.6), (0.2, 0.6)),
    "layer_norm": ((0.0, 0.0), (0.4, 1.5)),
    "dropout": ((0.1, 0.5), (0.1, 0.7)),
    "softmax": ((0.2, 0.9), (0.1, 0.6)),
    "attention": ((1.4, 4.1), (2.2, 13.3)),
}
SAMPLING_FLOOR = 0.05  # percent: what so many samples cannot resolve


class Sampler:
    """Inputs and incoming gradients of known moments."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.numpy = np.random.default_rng(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, count: int, width: int, x: Moments) -> torch.Tensor:
        """[count, 2, width]: two tokens of the moments' correlation."""
        common, own = self.normal(count, 1, width), self.normal(count, 2, width)
        unit = math.sqrt(x.correlation) * common + math.sqrt(1 - x.correlation) * own
        return (x.mean + math.sqrt(x.variance) * unit).requires_grad_()

    def moments(self, *, mean: bool = True) -> Moments:
        level = float(self.numpy.normal()) if mean else 0.0
        return Moments(
            level, float(self.numpy.uniform(0.2, 3)), float(self.numpy.uniform(0.05, 0.9))
        )


Outcome = tuple[float, float, float, float]
"""Forward variance measured and predicted, gradient variance measured and predicted."""


def passed_back(sample: Sampler, x: torch.Tensor, y: torch.Tensor) -> float:
    """Variance of the gradient at x for an incoming one of variance 1."""
    (gradient,) = torch.autograd.grad(y, x, sample.normal(*y.shape))
    return float(gradient.double().pow(2).mean())


def linear(sample: Sampler) -> Outcome:
    width, out = (int(n) for n in sample.numpy.integers(200, 700, 2))
    # A common mean would be seen by `out` rows of weights alone, too few for these errors.
    x, std = sample.moments(mean=False), float(sample.numpy.uniform(0.01, 0.1))
    tokens = sample.tokens(TOKENS // 1024, width, x)
    y = tokens @ (std * sample.normal(width, out))
    found = moments.linear(x, fan_in=width, std=std)
    assert float((y[:, 0] * y[:, 1]).detach().mean()) / found.variance == pytest.approx(
        found.correlation, abs=0.08
    )
    return (
        float(y.double().pow(2).mean()),
        found.variance,
        passed_back(sample, tokens, y),
        moments.linear_gradient(1.0, fan_out=out, std=std),
    )


def pointwise(name: str) -> Callable[[Sampler], Outcome]:
    def simulate(sample: Sampler) -> Outcome:
        x, kind = sample.moments(mean=False), moments.activation(name)
        tokens = sample.tokens(TOKENS, 1, x)
        y, found = FUNCTIONS[name](tokens), kind(x)
        measured = float(np.corrcoef(y.detach()[:, 0, 0], y.detach()[:, 1, 0])[0, 1])
        assert measured == pytest.approx(found.correlation, abs=0.01)
        assert float(y.mean()) == pytest.approx(found.mean, rel=0.01)
        return (
            float(y.double().var()),
            found.variance,
            passed_back(sample, tokens, y),
            kind.slope(x.variance),
        )

    return simulate


def layer_norm(sample: Sampler) -> Outcome:
    x, width = sample.moments(), 1024
    tokens = sample.tokens(TOKENS // width, width, x)
    y = F.layer_norm(tokens, (width,), eps=0.0)
    back = passed_back(sample, tokens, y)
    return float(y.double().var()), 1.0, back, moments.norm_gradient(1.0, x.variance)


def dropout(sample: Sampler) -> Outcome:
    x, p = sample.moments(), float(sample.numpy.uniform(0.05, 0.5))
    tokens = sample.tokens(TOKENS, 1, x)
    kept = torch.rand(tokens.shape, generator=sample.generator) >= p
    y, found = tokens * kept / (1 - p), moments.dropout(x, p)
    covariance = np.cov(y.detach()[:, 0, 0], y.detach()[:, 1, 0])[0, 1]
    assert covariance / found.variance == pytest.approx(found.correlation, abs=0.01)
    back = passed_back(sample, tokens, y)
    return float(y.double().var()), found.variance, back, moments.dropout_gradient(1.0, p)


def softmax(sample: Sampler) -> Outcome:
    length = int(sample.numpy.integers(800, 1500))
    x = Moments(0.0, float(sample.numpy.uniform(0.05, 0.8)), float(sample.numpy.uniform(0, 0.9)))
    rows = 2 * TOKENS // length
    logits = math.sqrt(x.variance) * (
        math.sqrt(x.correlation) * sample.normal(rows, 1)
        + math.sqrt(1 - x.correlation) * sample.normal(rows, length)
    )
    logits.requires_grad_()
    y = torch.softmax(logits, -1)
    return (
        float(y.double().var()),
        moments.softmax(x, length).variance,
        passed_back(sample, logits, y),
        moments.softmax_gradient(1.0, x, length),
    )


def attention(sample: Sampler) -> Outcome:
    """Causal averages of values by random queries and keys; the gradient is that of the values."""
    length, heads, width = 96, 24, 64
    x = Moments(0.0, 1.0, float(sample.numpy.uniform(0.0, 0.5)))
    common = math.sqrt(x.correlation) * sample.normal(3, heads, 1, width)
    drawn = common + math.sqrt(1 - x.correlation) * sample.normal(3, heads, length, width)
    # One input of all three projections, as in a model; independent projections make them independent.
    scale = float(sample.numpy.uniform(0.3, 1.0))
    q, k, v = scale * drawn[0], drawn[1], drawn[2].requires_grad_()
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = moments.attention_context(x, length=length, logit_variance=scale**2)
    own = moments.same_token_weight(
        np.arange(1.0, length + 1), scale**2 * (1 - x.correlation)
    ).mean()
    return float(y.double().pow(2).mean()), found.variance, passed_back(sample, v, y), float(own)


COMPONENTS: dict[str, Callable[[Sampler], Outcome]] = {
    "linear": linear,
    "relu": pointwise("relu"),
    "gelu": pointwise("gelu"),
    "gelu_tanh": pointwise("gelu_tanh"),
    "layer_norm": layer_norm,
    "dropout": dropout,
    "softmax": softmax,
    "attention": attention,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_simulation_agrees_within_twice_the_published_errors(name: str) -> None:
    outcomes = np.array([COMPONENTS[name](Sampler(seed)) for seed in range(SETTINGS)])
    errors = 100 * np.abs(outcomes[:, [0, 2]] / outcomes[:, [1, 3]] - 1)
    for column, limits in enumerate(PUBLISHED[name]):
        for quantile, limit in zip((0.5, 0.9), limits, strict=True):
            found = float(np.quantile(errors[:, column], quantile))
            assert found <= 2 * limit + SAMPLING_FLOOR, (column, quantile, errors[:, column])


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("variance", [0.01, 0.3, 1.0, 4.0])
def test_smooth_activations_equal_quadrature(name: str, variance: float) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(151)
    weights = weights / weights.sum()
    kind, s = moments.activation(name), math.sqrt(variance)

    def value_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = torch.from_numpy(x).requires_grad_()
        y = FUNCTIONS[name](z)
        (slope,) = torch.autograd.grad(y.sum(), z)
        return y.detach().numpy(), slope.numpy()

    value, slope = value_and_slope(s * nodes)
    expected: dict[str, Any] = {
        "mean": (weights * value).sum(),
        "second": (weights * value**2).sum(),
        "slope": (weights * slope**2).sum(),
    }
    for moment, number in expected.items():
        assert getattr(kind, moment)(variance) == pytest.approx(number, rel=1e-9), moment
    for r in (0.0, 0.4, 0.9):
        other, other_slope = value_and_slope(
            s * (r * nodes[:, None] + math.sqrt(1 - r * r) * nodes)
        )
        pairs = np.multiply.outer(weights, weights)
        product, slopes = (
            (pairs * value[:, None] * other).sum(),
            (pairs * slope[:, None] * other_slope).sum(),
        )
        assert float(kind.product(variance, np.array(r))) == pytest.approx(product, rel=1e-8)
        # The series is cut off; at variance 4 and correlation 0.9 the rest is largest.
        assert float(kind.slope_product(variance, np.array(r))) == pytest.approx(slopes, rel=1e-6)


def test_an_underived_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match="not derived; found: tanh"):
        moments.activation("tanh")


def test_the_weight_of_one_token_is_exact_for_short_rows() -> None:
    logits = np.random.default_rng(0).normal(size=(400_000, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    lengths = np.array([1.0, 5.0, 1e5])
    own = moments.same_token_weight(lengths, 1.0)
    assert own[0] == pytest.approx(1.0, rel=1e-6)
    assert own[1] == pytest.approx((p**2).sum(1).mean(), rel=2e-3)
    assert own[2] == pytest.approx(math.e / 1e5, rel=1e-3)


@pytest.mark.parametrize(("name", "gated"), [("silu", True), ("gelu", False), ("relu", False)])
def test_feed_forward_block(name: str, gated: bool) -> None:
    """Variance, correlation and gradient of a whole block; SwiGLU's gradient grows by about 2 at unit forward gain."""
    d, inner, count = 512, 1024, 256
    sample, x = Sampler(3), Moments(0.0, 1.0, 0.5)
    stds = (1 / math.sqrt(d), 1 / math.sqrt(inner * moments.feed_forward_gain(name, gated=gated)))
    tokens = sample.tokens(count, d, x)
    hidden = FUNCTIONS[name](tokens @ (stds[0] * sample.normal(d, inner)))
    if gated:
        hidden = hidden * (tokens @ (stds[0] * sample.normal(d, inner)))
    y = hidden @ (stds[1] * sample.normal(inner, d))
    found = moments.feed_forward(x, name, gated=gated, stds=stds, sizes=(d, inner))
    assert found.variance == pytest.approx(1.0)
    assert float(y.pow(2).mean()) == pytest.approx(found.variance, rel=0.06)
    assert float((y[:, 0] * y[:, 1]).mean()) == pytest.approx(found.correlation, abs=0.05)
    back = moments.feed_forward_gradient(
        1.0, name, gated=gated, variance=1.0, stds=stds, sizes=(d, inner)
    )
    assert passed_back(sample, tokens, y) == pytest.approx(back, rel=0.05)
    assert back == pytest.approx({"silu": 2.07, "gelu": 1.07, "relu": 1.0}[name], abs=0.01)
