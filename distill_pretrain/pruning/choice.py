"""What of a model is kept in a smaller shape, by its scores. Ties go to what comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distill_pretrain.pruning.scores import Scores
from distill_pretrain.pruning.shapes import Shape

LossWithout = Callable[[tuple[int, ...]], float]
"""Loss of the model with some layers left out."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Numbers of what is kept, ascending.

    Attributes:
        layers: of the source.
        hidden: channels of the residual stream.
        groups: of every kept layer its key/value heads.
        heads: of every kept layer its query heads, group by group.
        ffn: of every kept layer its feed-forward channels.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return dict(vars(self))


def choose(scores: Scores, source: Shape, shape: Shape, layers: tuple[int, ...]) -> Kept:
    """Choose the best channels and heads for a shape.

    Args:
        scores: of the source.
        source: its shape.
        shape: what is wanted; reachable.
        layers: that are kept, see `choose_layers`.
    """
    assert len(layers) == shape.num_layers
    attention = [_choose_heads(scores.heads[layer], source, shape) for layer in layers]
    return Kept(
        layers=layers,
        hidden=_best(scores.hidden, shape.hidden_size),
        groups=tuple(groups for groups, _ in attention),
        heads=tuple(heads for _, heads in attention),
        ffn=tuple(_best(scores.ffn[layer], shape.ffn_hidden_size) for layer in layers),
    )


def _best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Return the numbers of the highest scores, ascending."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def _choose_heads(
    scores: torch.Tensor, source: Shape, shape: Shape
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose groups by what their best query heads score together, and these heads; `scores` [h]."""
    width = source.heads_per_group
    by_group = scores.view(source.num_query_groups, width)
    best = torch.sort(by_group, dim=1, descending=True, stable=True)
    worth = best.values[:, : shape.heads_per_group].square().sum(dim=1)
    groups = _best(worth, shape.num_query_groups)
    heads = [
        group * width + head
        for group in groups
        for head in sorted(best.indices[group, : shape.heads_per_group].tolist())
    ]
    return groups, tuple(heads)


def choose_layers(
    scores: Scores,
    num_layers: int,
    *,
    contiguous: bool = False,
    loss_without: LossWithout | None = None,
) -> tuple[int, ...]:
    """Choose the layers to keep.

    Args:
        scores: of the source.
        num_layers: to keep.
        contiguous: remove one block of neighbours.
        loss_without: score by this loss; None means by block influence.
    """
    total = scores.num_layers
    removed = total - num_layers
    if not removed:
        return tuple(range(total))

    def cost(start: int, length: int) -> float:
        if loss_without is not None:
            return loss_without(tuple(range(start, start + length)))
        return scores.block_influence(start, length)

    if contiguous:
        costs = [cost(start, removed) for start in range(num_layers + 1)]
        first = min(range(len(costs)), key=costs.__getitem__)
        gone = set(range(first, first + removed))
    else:
        costs = [cost(layer, 1) for layer in range(total)]
        gone = set(sorted(range(total), key=costs.__getitem__)[:removed])
    return tuple(layer for layer in range(total) if layer not in gone)
