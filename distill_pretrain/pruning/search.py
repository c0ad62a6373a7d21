"""Sizes for a number of parameters: what each size alone costs is measured, and the best combinations are, too.

A loss without training says little of the loss after it, but it tells a bad shape from a good one (arXiv 2407.14679
trains candidates for 300 steps before it chooses; `train` with several targets does that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.config import TargetConfig
from distill_pretrain.pruning.shapes import (
    Shape,
    fixed_sizes,
    num_parameters,
    shape_of,
    why_not_computed,
    with_shape,
)

LEAST_SHARE = 0.25
"""A size that is searched for stays at least this share of the source's."""
TOLERANCE = 0.02
"""Shapes with fewer parameters than the target's by more than this share are taken only where none has more."""
_POINTS = (0.25, 0.4, 0.55, 0.7, 0.85)
_STEPS = 16
_MOST_HEADS = 4

LossOf = Callable[[Shape], float]
"""Measured loss of the source cut to a shape."""
Heads = tuple[int, int]
"""Query heads and key/value heads."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Measured loss of the source with one size alone made smaller.

    Attributes:
        whole: loss of the source.
        sizes: "num_layers", "hidden_size", "ffn_hidden_size" -> {size: loss}, the source's own size included.
        heads: {(query heads, groups): loss}.

    What no class computes alone is left out, and foreseen to cost nothing.
    """

    whole: float
    sizes: dict[str, dict[int, float]]
    heads: dict[Heads, float]

    def predicted(self, shape: Shape) -> float:
        """Predict the loss of a shape as if what its sizes cost added up; between measured sizes in a straight line."""
        total = self.heads.get((shape.num_attention_heads, shape.num_query_groups), self.whole)
        for name, losses in self.sizes.items():
            at = sorted(losses)
            alone = float(np.interp(getattr(shape, name), at, [losses[size] for size in at]))
            total += alone - self.whole
        return total


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search.

    Attributes:
        shape: the best.
        losses: of the candidates, measured, the most promising first.
    """

    shape: Shape
    losses: dict[Shape, float]


def grid_step(size: int) -> int:
    """Return the power of two in multiples of which sizes are searched: a sixteenth of the source's, or less."""
    return 1 << max(0, (size // _STEPS).bit_length() - 1)


def require_findable(
    targets: Mapping[str, TargetConfig], source: ModelConfig, *, vocab_size: int
) -> None:
    """Refuse numbers of parameters that no shape within the search has; nothing is measured.

    Raises:
        ConfigError: names the first such target.
    """
    for name, target in targets.items():
        if target.parameters is not None:
            _shapes(name, target, source, vocab_size)


def measure(
    source: Shape,
    target: TargetConfig,
    loss_of: LossOf,
    *,
    is_computed: Callable[[Shape], bool] = lambda shape: True,
) -> Sensitivity:
    """Measure what each size that a target searches for costs alone, and what those cost that it names.

    Shapes that are not `is_computed` are not measured.
    """
    whole = loss_of(source)
    free, fixed = _free(target, source), fixed_sizes(target, source)
    sizes: dict[str, dict[int, float]] = {}
    for name in ("num_layers", "hidden_size", "ffn_hidden_size"):
        own = getattr(source, name)
        wanted = _points(own) if name in free else {fixed.get(name, own)}
        sizes[name] = {
            size: whole if size == own else loss_of(replace(source, **{name: size}))
            for size in sorted(wanted | {own})
            if size == own or is_computed(replace(source, **{name: size}))
        }
    heads = {
        (query, groups): loss_of(shape)
        for query, groups in _heads(target, source)
        if is_computed(shape := replace(source, num_attention_heads=query, num_query_groups=groups))
    }
    return Sensitivity(whole=whole, sizes=sizes, heads=heads)


def search(
    name: str,
    target: TargetConfig,
    source: ModelConfig,
    *,
    vocab_size: int,
    loss_of: LossOf,
    candidates: int,
) -> Found:
    """Find the shape of a target with `parameters`; sizes are measured alone only where too many shapes fit.

    Args:
        name: of the target, for messages.
        target: what is asked for.
        source: architecture.
        vocab_size: rows of its embedding.
        loss_of: measures a shape.
        candidates: how many are measured.
    """
    shapes = _shapes(name, target, source, vocab_size)
    order = list(shapes)
    if len(order) > candidates:
        sensitivity = measure(
            Shape.of(source),
            target,
            loss_of,
            is_computed=lambda shape: why_not_computed(source, shape) is None,
        )
        # Equal predictions: the larger model first.
        order.sort(key=lambda shape: (sensitivity.predicted(shape), -shapes[shape]))
    losses = {shape: loss_of(shape) for shape in order[:candidates]}
    return Found(shape=min(losses, key=losses.__getitem__), losses=losses)


def _free(target: TargetConfig, source: Shape) -> set[str]:
    """Return the sizes that a target lets the search change."""
    if target.parameters is None:
        return set()
    searched = {
        "depth": {"num_layers"},
        "width": set(vars(source)) - {"num_layers"},
        "both": set(vars(source)),
    }[target.search]
    return searched - fixed_sizes(target, source).keys()


def _points(size: int) -> set[int]:
    """Return the sizes at which the loss is measured, the smallest that is searched among them."""
    step = grid_step(size)
    return {max(_least(size), round(share * size / step) * step) for share in _POINTS}


def _least(size: int) -> int:
    """Return the smallest size that is searched."""
    step = grid_step(size)
    return min(size, -(-int(LEAST_SHARE * size) // step) * step or step)


def _values(size: int) -> list[int]:
    step = grid_step(size)
    return sorted({*range(_least(size), size, step), size})


def _heads(target: TargetConfig, source: Shape) -> list[Heads]:
    """List the numbers of query heads and groups that are tried: fewer heads in every group, or fewer groups."""
    fixed, free = fixed_sizes(target, source), _free(target, source)
    groups = fixed.get("num_query_groups", source.num_query_groups)
    heads = fixed.get("num_attention_heads", source.num_attention_heads)
    if not {"num_query_groups", "num_attention_heads"} & free:
        return [(heads, groups)]
    found = {(heads, groups)} if heads % groups == 0 else set()
    if "num_attention_heads" in free:
        found |= {(groups * width, groups) for width in _few(source.heads_per_group)}
    if "num_query_groups" in free:
        ratio = source.heads_per_group
        found |= {
            (fixed.get("num_attention_heads", fewer * ratio), fewer)
            for fewer in _few(source.num_query_groups)
        }
    return sorted((h, g) for h, g in found if h % g == 0 and h // g <= source.heads_per_group)


def _few(size: int) -> set[int]:
    """Return a few numbers up to a size, evenly spread, the size among them."""
    least = max(1, round(LEAST_SHARE * size))
    return {round(value) for value in np.linspace(least, size, min(_MOST_HEADS, size - least + 1))}


def _shapes(
    name: str, target: TargetConfig, source: ModelConfig, vocab_size: int
) -> dict[Shape, int]:
    """Return shapes that have nearly the target's number of parameters, and no more.

    Raises:
        ConfigError: the smallest has more, all have far fewer, or no class of transformers computes any.
    """
    assert target.parameters is not None
    every = dict(_fitting(target, source, vocab_size))
    if not every:
        raise ConfigError(
            "no class of transformers computes any shape within the search",
            where=f"prune.targets.{name}",
            found=why_not_computed(source, shape_of(target, Shape.of(source))),
            remedy="give other sizes, or let the search change more of them (search: both)",
        )
    fitting = {shape: n for shape, n in every.items() if n <= target.parameters}
    if not fitting:
        raise ConfigError(
            "no shape within the search has so few parameters",
            where=f"prune.targets.{name}.parameters",
            found=f"{target.parameters:,}",
            expected=f"at least {min(every.values()):,}: sizes that are searched for stay at least a quarter of the "
            "source's",
            remedy="raise it, give the sizes themselves, or let the search change more of them (search: both)",
        )
    close = {n for n in fitting.values() if n >= (1 - TOLERANCE) * target.parameters}
    wanted = close or {max(fitting.values())}
    return {shape: n for shape, n in fitting.items() if n in wanted}


def _fitting(
    target: TargetConfig, model: ModelConfig, vocab_size: int
) -> Iterator[tuple[Shape, int]]:
    """Yield, for every choice of the other sizes, the most feed-forward channels that fit, and the parameters."""
    assert target.parameters is not None
    source = Shape.of(model)
    fixed, free = fixed_sizes(target, source), _free(target, source)

    def values(name: str) -> list[int]:
        own = getattr(source, name)
        return _values(own) if name in free else [fixed.get(name, own)]

    ffn = values("ffn_hidden_size")
    for layers, hidden, (heads, groups) in product(
        values("num_layers"), values("hidden_size"), _heads(target, source)
    ):
        shape = Shape(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn[0],
            num_attention_heads=heads,
            num_query_groups=groups,
        )
        if why_not_computed(model, shape) is not None:
            continue
        least = num_parameters(with_shape(model, shape), vocab_size=vocab_size)
        # A channel has a row of gate, a row of up and a column of down.
        each = 3 * hidden * layers
        fits = [size for size in ffn if least + (size - ffn[0]) * each <= target.parameters]
        best = fits[-1] if fits else ffn[0]
        yield replace(shape, ffn_hidden_size=best), least + (best - ffn[0]) * each
