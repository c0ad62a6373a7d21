"""Moments of a transformer's components: the closed forms of DeepScaleLM (arXiv 2403.09635).

Mean, variance and token correlation of what a component makes of Gaussian input, and the variance of the gradient it
passes back.

A signal is one coordinate of a vector, over tokens, weights and data; the correlation is that of the same coordinate at
two tokens of a sequence. Weights are independent, N(0, std^2). Functions of `Moments` return `Moments`; functions named
`*_gradient` take and return the variance of a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import ConfigError

Array = npt.NDArray[np.float64]

QUADRATURE_POINTS = 201
HERMITE_TERMS = 40
NEGLIGIBLE = 1e-12
LAPLACE_RANGE = 20.0


@dataclass(frozen=True)
class Moments:
    """Mean, variance and token correlation of one coordinate."""

    mean: float
    variance: float
    correlation: float = 0.0

    @property
    def second(self) -> float:
        """The mean square E[x^2]."""
        return self.variance + self.mean**2

    @property
    def product(self) -> float:
        """The mean product E[x x'] over two tokens."""
        return self.variance * self.correlation + self.mean**2


def linear(x: Moments, *, fan_in: int, std: float) -> Moments:
    """Return the moments of W x: mean 0, variance fan_in std^2 E[x^2], correlation E[x x'] / E[x^2].

    A coordinate is sum_k W_k x_k of fan_in independent weights of mean 0: squares add up, and products of different
    weights average out, so that two tokens keep E[x x'] over E[x^2]. Row "linear" of the paper's component table.
    """
    return Moments(0.0, fan_in * std**2 * x.second, x.product / x.second)


def linear_gradient(gradient: float, *, fan_out: int, std: float) -> float:
    """Return the variance of W^T g: fan_out std^2 times that of g (row "linear" of the component table)."""
    return fan_out * std**2 * gradient


def embedding(*, std: float, tables: int = 1, repeats: float = 0.0) -> Moments:
    """Return the moments of the sum of a word vector and tables - 1 position vectors.

    Args:
        std: of every table's entries.
        tables: how many are added up.
        repeats: probability that two tokens of a sequence are the same word.
    """
    return Moments(0.0, tables * std**2, repeats / tables)


def dropout(x: Moments, p: float) -> Moments:
    """Return the moments of x after dropout: each element is kept with probability 1 - p and divided by it.

    The variance becomes (s2 + p mu^2) / (1 - p); the covariance of two tokens stays as it is, since they are dropped
    independently.
    """
    variance = (x.variance + p * x.mean**2) / (1 - p)
    return Moments(x.mean, variance, x.variance * x.correlation / variance if variance else 0.0)


def dropout_gradient(gradient: float, p: float) -> float:
    """Return the gradient's variance over 1 - p."""
    return gradient / (1 - p)


def layer_norm(x: Moments) -> Moments:
    """Return mean 0, variance 1 and the same correlation (LayerNorm, component table); exact for wide vectors."""
    return Moments(0.0, 1.0, x.correlation)


def norm_gradient(gradient: float, second: float) -> float:
    """Return the gradient's variance over that of the norm's input (LayerNorm; over E[x^2] for RMSNorm).

    The norm divides by sqrt(`second`), and so does its derivative; the components that it projects away, along the
    input and along ones, are one or two of many in a wide vector.
    """
    return gradient / second


def softmax(x: Moments, length: int) -> Moments:
    """Return the moments of one of `length` probabilities of a softmax: mean 1/L, variance (e^((1-r) s2) - 1) / L^2.

    r is the correlation of two logits of one row: what they share cancels in a softmax, so only v = (1 - r) s2 spreads
    them. Over many logits the denominator is its mean, L e^(v/2), and E[e^(2z)] = e^(2v): E[p^2] = e^v / L^2, from
    which the mean's square 1 / L^2 goes. Row "softmax" of the component table.
    """
    spread = math.exp((1 - x.correlation) * x.variance)
    return Moments(1 / length, (spread - 1) / length**2)


def softmax_gradient(gradient: float, x: Moments, length: int) -> float:
    """Return e^((1-r) s2) / L^2 times the gradient's variance (softmax, component table)."""
    return math.exp((1 - x.correlation) * x.variance) / length**2 * gradient


@dataclass(frozen=True)
class Activation:
    """A pointwise function of x, N(0, v), and y, N(0, v), of correlation r.

    Attributes:
        mean: v -> E[f(x)].
        second: v -> E[f(x)^2].
        product: (v, r) -> E[f(x) f(y)].
        slope: v -> E[f'(x)^2], the gain of a gradient's variance.
        slope_product: (v, r) -> E[f'(x) f'(y)].
    """

    mean: Callable[[float], float]
    second: Callable[[float], float]
    product: Callable[[float, Array], Array]
    slope: Callable[[float], float]
    slope_product: Callable[[float, Array], Array]

    def __call__(self, x: Moments) -> Moments:
        """Return the moments of f(x) for x of mean 0."""
        assert x.mean == 0.0
        mean = self.mean(x.variance)
        variance = self.second(x.variance) - mean**2
        product = float(self.product(x.variance, np.array(x.correlation)))
        return Moments(mean, variance, (product - mean**2) / variance)


def _relu() -> Activation:
    """Closed forms: mean s / sqrt(2 pi), E[f^2] s2 / 2, slope 1/2 (ReLU, component table); arc-cosine kernel."""

    def product(v: float, r: Array) -> Array:
        r = np.clip(r, -1, 1)
        result: Array = v / (2 * math.pi) * (np.sqrt(1 - r * r) + r * (math.pi - np.arccos(r)))
        return result

    def slope_product(v: float, r: Array) -> Array:
        result: Array = (math.pi - np.arccos(np.clip(r, -1, 1))) / (2 * math.pi)
        return result

    return Activation(
        mean=lambda v: math.sqrt(v / (2 * math.pi)),
        second=lambda v: v / 2,
        product=product,
        slope=lambda v: 0.5,
        slope_product=slope_product,
    )


def _gelu() -> Activation:
    """Closed forms of x Phi(x) (GELU, component table); E[f f'] by Stein's lemma; E[f' f'] by Mehler's series.

    With a = v / (1 + v): mean sqrt(v a / 2 pi), and
    E[f'^2] = 1/2 + (a (5 v + 3) / (1 + 2 v)^(3/2) - arccos a) / (2 pi).

    `product` is E[x y Phi(x) Phi(y)]. Stein's lemma, E[x g] = v E[dg/dx] + v r E[dg/dy], takes x away and leaves
    v E[y phi(x) Phi(y)] + v r (E[Phi(x) Phi(y)] + B), B = E[x phi(x) Phi(y)] (`one_sided`). Used again, with phi' =
    -x phi, it says E[y phi(x) Phi(y)] = v density - v r B, and B = v r density - v B.
    """

    def product(v: float, r: Array) -> Array:
        a = v * r / (1 + v)
        density = 1 / (2 * math.pi * np.sqrt((1 + v) ** 2 - (v * r) ** 2))  # E[phi(x) phi(y)]
        one_sided = v * r * density / (1 + v)  # E[x phi(x) Phi(y)]
        both = 0.25 + np.arcsin(a) / (2 * math.pi)  # E[Phi(x) Phi(y)]
        result: Array = v * (v * density - v * r * one_sided) + v * r * (both + one_sided)
        return result

    def slope(v: float) -> float:
        a = v / (1 + v)
        return 0.5 + (a * (5 * v + 3) / (1 + 2 * v) ** 1.5 - math.acos(a)) / (2 * math.pi)

    def derivative(x: Array) -> Array:
        result: Array = _normal_cdf(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return result

    return Activation(
        mean=lambda v: v / math.sqrt(2 * math.pi * (1 + v)),
        second=lambda v: float(product(v, np.array(1.0))),
        product=product,
        slope=slope,
        slope_product=_mehler(derivative),
    )


def _gelu_tanh() -> Activation:
    """The approximation x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of GELU, as `_silu`: by quadrature."""
    root = math.sqrt(2 / math.pi)

    def function(x: Array) -> Array:
        result: Array = 0.5 * x * (1 + np.tanh(root * (x + 0.044715 * x**3)))
        return result

    def derivative(x: Array) -> Array:
        tanh, inner = np.tanh(root * (x + 0.044715 * x**3)), root * (1 + 0.134145 * x**2)
        return np.asarray(0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner)

    return _by_quadrature(function, derivative)


def _silu() -> Activation:
    """The activation x sigmoid(x), by Gauss-Hermite quadrature and Mehler's series: it has no closed form."""

    def function(x: Array) -> Array:
        return x / (1 + np.exp(-x))

    def derivative(x: Array) -> Array:
        gate = 1 / (1 + np.exp(-x))
        result: Array = gate * (1 + x * (1 - gate))
        return result

    return _by_quadrature(function, derivative)


def _by_quadrature(
    function: Callable[[Array], Array], derivative: Callable[[Array], Array]
) -> Activation:
    return Activation(
        mean=lambda v: expectation(function, v),
        second=lambda v: expectation(lambda x: function(x) ** 2, v),
        product=_mehler(function),
        slope=lambda v: expectation(lambda x: derivative(x) ** 2, v),
        slope_product=_mehler(derivative),
    )


def expectation(function: Callable[[Array], Array], variance: float) -> float:
    """Compute E[f(x)] for x ~ N(0, variance)."""
    nodes, weights = _quadrature()
    return float((weights * function(math.sqrt(variance) * nodes)).sum())


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
    return nodes, weights / weights.sum()


def _mehler(function: Callable[[Array], Array]) -> Callable[[float, Array], Array]:
    """(v, r) -> E[f(x) f(y)] = sum_n c_n^2 r^n, c_n the coefficients of f in normalised Hermite polynomials."""

    @lru_cache
    def squares(v: float) -> Array:
        nodes, weights = _quadrature()
        values = weights * function(math.sqrt(v) * nodes)
        before, now = np.zeros_like(nodes), np.ones_like(nodes)
        found = []
        for n in range(HERMITE_TERMS):
            found.append(float((values * now).sum()) ** 2)
            before, now = now, (nodes * now - math.sqrt(n) * before) / math.sqrt(n + 1)
        left = np.cumsum(found[::-1])[::-1]  # of the sum, from each term on
        return np.array(found)[left > NEGLIGIBLE * left[0]]

    def product(v: float, r: Array) -> Array:
        return np.asarray(np.polynomial.polynomial.polyval(r, squares(v)), dtype=np.float64)

    return product


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in np.ravel(x)]))


_ACTIVATIONS = {"relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}


@lru_cache
def activation(name: str) -> Activation:
    """Return the moments of an activation; raise ConfigError for one that has not been derived."""
    if name not in _ACTIVATIONS:
        raise ConfigError(
            "the moments of this activation are not derived",
            found=name,
            expected=", ".join(_ACTIVATIONS),
            remedy="take another model.init, or add its moments",
        )
    return _ACTIVATIONS[name]()


def feed_forward_gain(name: str, *, gated: bool, variance: float = 1.0) -> float:
    """Return E[h^2] of a feed-forward block's hidden units for inner activations of this variance.

    Gated units are the product of an activation and an independent linear unit (SwiGLU): E[f^2] times the variance.
    """
    return activation(name).second(variance) * (variance if gated else 1.0)


def feed_forward(
    x: Moments, name: str, *, gated: bool, stds: tuple[float, float], sizes: tuple[int, int]
) -> Moments:
    """Return the moments of a feed-forward block's output (row "FFN" of the block table).

    The paper has the plain block; the gated one is derived here in the same way.

    Args:
        x: moments of its input, of mean 0.
        name: activation.
        gated: SwiGLU rather than a plain MLP.
        stds: of the first and second matrix.
        sizes: input width and inner width.
    """
    inner = linear(x, fan_in=sizes[0], std=stds[0])
    hidden = activation(name)(inner)
    if gated:
        product = hidden.product * inner.product
        second = hidden.second * inner.second
        hidden = Moments(0.0, second, product / second)
    return linear(hidden, fan_in=sizes[1], std=stds[1])


def feed_forward_gradient(
    gradient: float,
    name: str,
    *,
    gated: bool,
    variance: float,
    stds: tuple[float, float],
    sizes: tuple[int, int],
) -> float:
    """Return the variance of the gradient at a feed-forward block's input (row "FFN" of the block table).

    `variance` is the mean square of that input.
    """
    inner = sizes[0] * stds[0] ** 2 * variance
    found = activation(name)
    gain = found.slope(inner) * (inner if gated else 1.0)
    if gated:
        gain += found.second(inner)
    hidden = linear_gradient(gradient, fan_out=sizes[0], std=stds[1]) * gain
    return linear_gradient(hidden, fan_out=sizes[1], std=stds[0])


def same_token_weight(positions: Array, logit_variance: float) -> Array:
    """Return E[sum_j p_j^2] of a softmax over so many independent logits N(0, v): e^v / L for many (`softmax`).

    With S = sum e^z, E[sum p^2] = L E[e^(2z) / S^2], and 1 / S^2 is the integral over t of t e^(-t S): so it is L times
    the integral of t E[e^(2z - t e^z)] E[e^(-t e^z)]^(L - 1).

    Args:
        positions: float64[...], L.
        logit_variance: v.
    """
    nodes, weights = _quadrature()
    z = math.sqrt(logit_variance) * nodes
    log_t = np.linspace(-LAPLACE_RANGE, LAPLACE_RANGE, QUADRATURE_POINTS)
    damped = weights * np.exp(-np.exp(log_t[:, None] + z))
    once = np.log(np.maximum(damped.sum(1), np.finfo(np.float64).tiny))
    twice = np.exp(2 * log_t) * (damped * np.exp(2 * z)).sum(1) * (log_t[1] - log_t[0])
    lengths = np.asarray(positions, dtype=np.float64)[..., None]
    result: Array = (lengths * twice * np.exp((lengths - 1) * once)).sum(-1)
    return np.clip(result, 0.0, 1.0)


def shared_token_weight(positions: Array, logit_covariance: Array) -> Array:
    """Return E[sum_j p_j p'_j] of two rows: e^c / (L - 1 + e^c) over L tokens.

    c is the covariance of the two rows' logits at one token. The numerator is L terms E[e^(z_j + z'_j)] = e^(v + c);
    the product of the two denominators has those, and L (L - 1) terms e^v of two tokens. Its mean stands for it.
    """
    spread = np.exp(logit_covariance)
    result: Array = spread / (positions - 1 + spread)
    return result


def attention_context(x: Moments, *, length: int, logit_variance: float) -> Moments:
    """Return the moments of attention's output sum_j p_ij x_j under a causal mask, averaged over `length` positions.

    The variance is rho times that of x, rho = r + (1 - r) s (s: `same_token_weight`): for s = 0 the paper's r
    (attention, block table). Two contexts share the tokens up to the earlier one.
    """
    spread = logit_variance * (1 - x.correlation)
    positions = np.arange(1, length + 1, dtype=np.float64)
    r = x.correlation
    rho = r + (1 - r) * float(same_token_weight(positions, spread).mean())
    if length == 1:
        return Moments(0.0, x.variance, r)
    later = np.maximum.outer(positions, positions)
    # Logits of two rows at one token are correlated as the rows are.
    shared = shared_token_weight(later, np.array(spread * r))
    covariance = r + (1 - r) * shared
    others = (covariance.sum() - np.trace(covariance)) / (length * (length - 1))
    return Moments(0.0, x.variance * rho, float(others / rho))
