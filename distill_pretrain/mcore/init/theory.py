"""What a model's signal should be at initialisation: variance, token correlation and gradients, layer by layer.

The mean-field composition of the components in `moments` (arXiv 2403.09635, block and model tables), for causal
attention of finite length and gated feed-forward blocks too. What is followed is not one variance but the covariance
of one coordinate at every two tokens of the batch: causal attention treats early tokens otherwise than late ones, and
which words repeat decides how gradients add up. Wide layers, independent weights and a gradient independent of them
are assumed.

Shapes: B sequences of T positions, N = B * T tokens; a covariance is float64[N, N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.init.deep import activation_of, initial_stds, residual_scaling
from distill_pretrain.mcore.init.moments import (
    Array,
    activation,
    same_token_weight,
    shared_token_weight,
)
from distill_pretrain.mcore.model.config import OF_BRANCHES, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Per point of the residual stream, n = num_layers: after the embedding and after every layer; and per layer.

    With scaled residuals the stream is x of `deep` (skip lambda, branch beta), not y.

    Attributes:
        variance: float64[n + 1], mean square of a coordinate.
        correlation: float64[n + 1], of two tokens of a sequence: mean product over mean square.
        gradient: float64[n + 1], mean square of the mean loss's derivative by a coordinate.
        weight_gradient: float64[n], norm of the mean loss's gradient by a layer's matrices.
    """

    variance: Array
    correlation: Array
    gradient: Array
    weight_gradient: Array

    @property
    def gradient_span(self) -> float:
        """The largest norm of the stream's gradient over the smallest."""
        return math.sqrt(float(self.gradient.max() / self.gradient.min()))


def predict(
    model: ModelConfig,
    tokens: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    *,
    vocab_size: int,
) -> Signal:
    """Compute the signal that is expected of fresh weights.

    Args:
        model: architecture and initialisation.
        tokens: int64[B, T].
        labels: int64[B, T], negative where there is none.
        vocab_size: V.

    Raises:
        ConfigError: the signal of such a model is not derived.
    """
    pieces = [
        name
        for name in (
            "sliding_window",
            "yarn",
            "attention_temperature",
            "attention_scale_width",
            "attention_logit_cap",
            "logit_cap",
            "qk_norm_whole",
            "embedding_scale",
            "zero_centred_norms",
            "experts",
            "attention_sinks",
        )
        if getattr(model, name)
    ]
    if model.norm_placement in OF_BRANCHES:
        pieces.append(f"norm_placement: {model.norm_placement}")
    if pieces:
        raise ConfigError(
            "the signal of fresh weights is not derived for this model",
            where=", ".join(f"model.{name}" for name in pieces),
            found=", ".join(f"{name}: {getattr(model, name.partition(':')[0])}" for name in pieces),
            expected="full attention with plain rotary embeddings, and norms at the branches' inputs or after the sum",
            remedy="leave these keys out for the prediction",
        )
    return _Recursion(model, tokens, labels, vocab_size).run()


class _Recursion:
    """Forward through the sublayers, keeping what they saw, and back."""

    def __init__(
        self,
        model: ModelConfig,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        vocab_size: int,
    ) -> None:
        self.model = model
        self.stds = initial_stds(model)
        self.scaling = residual_scaling(model)
        self.gated, name = activation_of(model)
        self.activation = activation(name)
        self.pre = model.norm_placement == "pre"
        self.keep = 1 - model.dropout
        self.vocab_size = vocab_size
        self.words, self.labels = tokens.ravel(), labels.ravel()
        self.attention = _Attention(*tokens.shape, dropout=model.dropout)
        d = self.d = model.hidden_size
        self.queries = model.num_attention_heads * (
            model.kv_channels or d // model.num_attention_heads
        )
        # Of a norm's gradient: the direction of its input, and for LayerNorm the mean.
        self.left = 1 - (1 if model.arch == "llama" else 2) / d
        self.query_gain = d * self.stds.query**2
        # Of q k / sqrt(head width); a norm of queries and keys makes it 1.
        self.logit_variance = 1.0 if model.qk_norm else self.query_gain * d * self.stds.key**2
        self.value_gain = d * self.stds.value**2
        self.output_gain = self.queries * self.stds.attention_output**2
        self.inner_gain = d * self.stds.inner**2
        self.outer_gain = model.ffn_hidden_size * self.stds.outer**2

    def run(self) -> Signal:
        num_layers = self.model.num_layers
        x = self._dropped(self._embedding())
        points = [_figures(x, self.attention)]
        # Norms see the stream (pre) or the sum (post); branches see what a norm made of the stream.
        seen: list[tuple[npt.NDArray[np.float32], Array]] = []
        for sublayer in range(2 * num_layers):
            branch = self._attend if sublayer % 2 == 0 else self._feed_forward
            unit = _correlation(x) if self.pre else x
            share = self.scaling.coefficient(sublayer) ** 2
            total = x + share * self._dropped(branch(unit))
            seen.append((unit.astype(np.float32), np.diagonal(x if self.pre else total).copy()))
            x = total if self.pre else _correlation(total)
            if sublayer % 2:
                points.append(_figures(x, self.attention))
        gradient = self._loss_gradient(x)
        gradients, weights = [gradient.trace()], np.zeros(2 * num_layers)
        for sublayer in reversed(range(2 * num_layers)):
            rounded, squares = seen.pop()
            back = self._attend_back if sublayer % 2 == 0 else self._feed_forward_back
            if not self.pre:
                is_top = sublayer == 2 * num_layers - 1
                gradient = self._norm_back(gradient, squares, left=None if is_top else squares)
            share = self.scaling.coefficient(sublayer) ** 2
            through, weights[sublayer] = back(
                rounded.astype(np.float64), share * self._dropped(gradient)
            )
            gradient = gradient + (self._norm_back(through, squares) if self.pre else through)
            if sublayer % 2 == 0:
                gradients.append(gradient.trace())
        scale = np.array([self.scaling.stream_scale(2 * n) ** 2 for n in range(num_layers + 1)])
        variance, correlation = np.array(points).T
        return Signal(
            variance=variance * scale,
            correlation=correlation,
            gradient=np.array(gradients[::-1]) / len(x) / scale,
            weight_gradient=np.sqrt(weights.reshape(num_layers, 2).sum(1)),
        )

    def _embedding(self) -> Array:
        result: Array = self.stds.word**2 * _equal(self.words)
        if self.model.arch == "gpt2":
            result += self.stds.position**2 * _equal(self.attention.positions)
        return result

    def _dropped(self, covariance: Array) -> Array:
        """Return a signal's or a gradient's covariance after dropout: masks of different tokens are independent."""
        if self.keep == 1:
            return covariance
        result = covariance.copy()
        _diagonal(result)[...] /= self.keep
        return result

    def _attend(self, unit: Array) -> Array:
        return self.value_gain * self.output_gain * self._context(unit)

    def _context(self, unit: Array) -> Array:
        return self.attention.context(unit, self.attention.weights(unit, self.logit_variance))

    def _attend_back(self, unit: Array, gradient: Array) -> tuple[Array, float]:
        """Return the gradient at the input, through values, queries and keys, and the matrices' squared gradients."""
        weights = self.attention.weights(unit, self.logit_variance)
        # A gain is fan in times std^2; on the way back the fan is the other side of the matrix.
        context = self.output_gain * self.d / self.queries * gradient
        values = self.attention.values_back(context, weights)
        logits = (
            self.logit_variance
            * self.value_gain
            * self.attention.logits_back(unit, context, weights)
        )
        back = self.value_gain * self.queries / self.d * values
        _diagonal(back)[...] += self.queries / self.d * logits
        # A matrix's gradient is sum_i g_i x_i^T over tokens: an element of it has the mean square
        # sum_ik E[g_i g_k] E[x_i x_k], and there are d * queries of them. In turn: output, values, queries and keys.
        squares = (
            self.value_gain * (self.attention.context(unit, weights) * gradient).sum()
            + (unit * values).sum()
            + logits.sum() / self.query_gain
        )
        return back, float(self.d * self.queries * squares)

    def _hidden(self, unit: Array) -> Array:
        """E[h h'] of the feed-forward block's hidden units."""
        product = self.activation.product(self.inner_gain, unit)
        return product * self.inner_gain * unit if self.gated else product

    def _feed_forward(self, unit: Array) -> Array:
        return self.outer_gain * self._hidden(unit)

    def _feed_forward_back(self, unit: Array, gradient: Array) -> tuple[Array, float]:
        width = self.model.ffn_hidden_size
        hidden = self.outer_gain * self.d / width * gradient
        inner = hidden * self.activation.slope_product(self.inner_gain, unit)
        if self.gated:
            inner *= self.inner_gain * unit
            inner += hidden * self.activation.product(self.inner_gain, unit)
        back = self.inner_gain * width / self.d * inner
        squares = (self._hidden(unit) * gradient).sum() + (unit * inner).sum()
        return back, float(self.d * width * squares)

    def _norm_back(self, gradient: Array, squares: Array, left: Array | None = None) -> Array:
        """Take a gradient back through a norm whose input has these mean squares.

        Args:
            gradient: at the norm's output.
            squares: float64[N].
            left: for a norm below another in a Post-LN stream, mean squares of stream plus branch for a stream of 1:
                the norm above has removed its direction, all but the branch's share, already.
        """
        root = np.sqrt(squares)
        kept = self.left if left is None else 1 - (1 - 1 / float(left.mean())) / self.d
        return gradient * kept / np.multiply.outer(root, root)

    def _loss_gradient(self, x: Array) -> Array:
        """Return the loss's gradient at the stream's end: through p - y, the head and, for Pre-LN, the last norm."""
        tied = self.model.tie_embeddings
        std = (self.stds.word if tied else self.stds.head) * self.stds.final_gain
        spread = self.d * std**2
        # sum_v (p_v - y_v) (p'_v - y'_v), for logits of variance `spread` that do not know the labels: sum p p' is
        # e^c / V (`shared_token_weight` of many ids), p at the other's label 1 / V twice, y y' 1 for equal ones.
        error = _equal(self.labels) + (np.exp(spread * _correlation(x)) - 2) / self.vocab_size
        known = self.labels >= 0
        error *= np.multiply.outer(known, known)
        gradient = std**2 / known.sum() ** 2 * error
        return self._norm_back(gradient, np.diagonal(x)) if self.pre else gradient


@dataclass(frozen=True)
class _Weights:
    """Second moments of causal attention's probabilities p_ij with random logits.

    Attributes:
        own: float64[T], E[sum_j p_ij^2] by position.
        shared: float64[B, T, T], E[sum_j p_ij p_kj] of rows i and k of a sequence; own, after dropout, for i = k.
        apart: 1 minus the correlation of two tokens of a sequence.
    """

    own: Array
    shared: Array
    apart: float


class _Attention:
    """Causal averaging of B sequences of T tokens; covariances are seen as float64[B, T, B, T]."""

    def __init__(self, num_sequences: int, length: int, *, dropout: float) -> None:
        self.shape = (num_sequences, length, num_sequences, length)
        self.keep = 1 - dropout
        self.counts = np.arange(1, length + 1, dtype=np.float64)
        self.positions = np.tile(np.arange(length), num_sequences)
        self.pairs = np.multiply.outer(self.counts, self.counts)
        self.earlier = np.minimum.outer(self.counts, self.counts)
        self.later = np.maximum.outer(self.counts, self.counts)

    def within(self, matrix: Array) -> Array:
        """The part of one sequence: float64[B, T, T], a copy."""
        every = np.arange(self.shape[0])
        return matrix.reshape(self.shape)[every, :, every, :]

    def correlation(self, covariance: Array) -> float:
        """Mean product of two tokens of a sequence over the mean square."""
        length = self.shape[1]
        trace = float(covariance.trace())
        return (float(self.within(covariance).sum()) - trace) / max(1, length - 1) / trace

    def weights(self, unit: Array, logit_variance: float) -> _Weights:
        """Attention's weights for rows of this token correlation.

        Logits of one row differ less where its tokens are alike.
        """
        apart = 1 - max(0.0, self.correlation(unit))
        spread = logit_variance * apart
        own = same_token_weight(self.counts, spread)
        shared = shared_token_weight(self.later, spread * self.within(unit))
        for matrix in shared:
            _diagonal(matrix)[...] = np.minimum(1.0, own / self.keep)
        return _Weights(own, shared, apart)

    def context(self, unit: Array, weights: _Weights) -> Array:
        """Return the covariance of sum_j p_ij x_j."""
        # Tokens of two sequences: every pair of seen tokens counts alike. In one sequence a token may meet itself, with
        # the weight E[sum_j p_ij p_kj]; what is left of it goes to pairs of different tokens.
        sums = unit.reshape(self.shape).cumsum(1).cumsum(3)
        result = sums / self.pairs[:, None, :]
        every = np.arange(self.shape[0])
        within = sums[every, :, every, :]
        squares = np.diagonal(unit).reshape(self.shape[:2]).cumsum(1)
        same = squares[:, (self.earlier - 1).astype(int)]
        others = (within - same) / np.maximum(self.pairs - self.earlier, 1)
        result[every, :, every, :] = (
            weights.shared * same / self.earlier + (1 - weights.shared) * others
        )
        return result.reshape(unit.shape)

    def values_back(self, context: Array, weights: _Weights) -> Array:
        """Return the covariance of sum_i p_ij g_i, g the gradient at the context."""
        result = _sums_of_later(context.reshape(self.shape) / self.pairs[:, None, :])
        level = np.diagonal(context).reshape(self.shape[:2])
        # Two probabilities of one row are not 1 / i^2 on average, nor are those of one token in two rows.
        others = (1 - weights.own) / np.maximum(self.counts * (self.counts - 1), 1)
        one_row = ((others - self.counts**-2.0) * level)[:, ::-1].cumsum(1)[:, ::-1]
        every = np.arange(self.shape[0])
        result[every, :, every, :] += one_row[:, (self.later - 1).astype(int)]
        result = result.reshape(context.shape)
        _diagonal(result)[...] = self._per_token(
            self.within(context) * weights.shared / self.earlier
        )
        return result

    def logits_back(self, unit: Array, context: Array, weights: _Weights) -> Array:
        """Float64[N]: squared gradient through the logits, times a key (for the query) and a query (for the key).

        For unit gains: what a row's values differ by, and rows of one key add up as far as they are alike.
        """
        level = np.diagonal(context).reshape(self.shape[:2])
        differing = weights.apart * (1 - weights.own)
        queries = weights.apart * differing * weights.own * level
        rows = self.within(context) * self.within(unit) * weights.shared / self.earlier
        return queries.ravel() + self._per_token(differing[:, None] * rows)

    def _per_token(self, rows: Array) -> Array:
        """Sums over pairs of rows i, k >= j of one sequence, float64[B, T, T] -> float64[B * T] by j."""
        sums = rows[:, ::-1, ::-1].cumsum(1).cumsum(2)[:, ::-1, ::-1]
        return np.diagonal(sums, axis1=1, axis2=2).ravel()


def _sums_of_later(matrix: Array) -> Array:
    """Sum float64[B, T, B, T] over i >= j and k >= l."""
    return matrix[:, ::-1, :, ::-1].cumsum(1).cumsum(3)[:, ::-1, :, ::-1].copy()


def _equal(ids: npt.NDArray[np.int64]) -> Array:
    return np.equal.outer(ids, ids).astype(np.float64)


def _diagonal(matrix: Array) -> Array:
    """A writable view."""
    result: Array = np.einsum("ii->i", matrix)
    return result


def _correlation(covariance: Array) -> Array:
    """Return the correlation, which is a covariance after a norm; rounding must not leave [-1, 1]."""
    root = np.sqrt(np.diagonal(covariance))
    return np.clip(covariance / np.multiply.outer(root, root), -1, 1)


def _figures(covariance: Array, attention: _Attention) -> tuple[float, float]:
    return float(np.diagonal(covariance).mean()), attention.correlation(covariance)
