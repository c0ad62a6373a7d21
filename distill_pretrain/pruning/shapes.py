"""The sizes of a model that pruning changes, what may become of them, and how many parameters they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill_pretrain.checkpoint.hf.family import shortest_pattern
from distill_pretrain.checkpoint.hf.registry import correspondence, family_of
from distill_pretrain.errors import CheckpointError, ConfigError
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.config import TargetConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes, named as in the section model; the width of a head is not one of them, since it stays."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int

    @classmethod
    def of(cls, model: ModelConfig) -> Shape:
        """Take the sizes of a model."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_query_groups

    def text(self) -> str:
        """Say the sizes in a line."""
        heads = f"{self.num_attention_heads} heads in {self.num_query_groups} groups"
        return f"{self.num_layers} layers x {self.hidden_size}, ffn {self.ffn_hidden_size}, {heads}"


def with_shape(
    model: ModelConfig, shape: Shape, layers: Sequence[int] | None = None
) -> ModelConfig:
    """Return the architecture of a model in other sizes.

    Args:
        model: the source's.
        shape: other sizes.
        layers: of the source that are kept, which keep their kind of attention; None takes the first ones.
    """
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    kept = range(shape.num_layers) if layers is None else layers
    kinds = shortest_pattern([model.attention_of(layer) for layer in kept])
    update = {**vars(shape), "kv_channels": width, "attention_layers": kinds}
    if "w" not in kinds:
        update["sliding_window"] = None
    if model.embedding_scale is not None:
        # What every class that scales its embedding takes.
        update["embedding_scale"] = float(shape.hidden_size) ** 0.5
    return model.model_copy(update=update)


def why_not_computed(model: ModelConfig, shape: Shape) -> str | None:
    """Say why no class of transformers computes a model in a shape; None where one does."""
    try:
        family_of(with_shape(model, shape))
    except CheckpointError as error:
        return f"{error.found}"
    return None


def num_parameters(model: ModelConfig, *, vocab_size: int) -> int:
    """Count the parameters of a llama model's folder: a tied head counts once, and nothing is padded."""

    def count(layers: int) -> int:
        alike = model.model_copy(update={"num_layers": layers})
        # Only gpt2 models have learned positions.
        shapes = correspondence(alike, vocab_size=vocab_size, max_positions=0).shapes()
        return sum(map(math.prod, shapes.values()))

    # All layers are alike, and a search asks for thousands of shapes.
    one = count(1)
    return one + (model.num_layers - 1) * (count(2) - one)


def fixed_sizes(target: TargetConfig, source: Shape) -> dict[str, int]:
    """Return the sizes that a target names, and the query heads that go with their groups."""
    sizes = target.sizes
    if "num_query_groups" in sizes and "num_attention_heads" not in sizes:
        sizes["num_attention_heads"] = sizes["num_query_groups"] * source.heads_per_group
    return sizes


def shape_of(target: TargetConfig, source: Shape) -> Shape:
    """Return the shape that a target names: its sizes, and the source's for the others."""
    return replace(source, **fixed_sizes(target, source))


def require_reachable(
    targets: Mapping[str, TargetConfig], source: ModelConfig, *, vocab_size: int, where: Path
) -> None:
    """Refuse targets that no pruning of the source can reach.

    Args:
        targets: by name.
        source: architecture.
        vocab_size: rows of its embedding.
        where: its folder, for the message.

    Raises:
        ConfigError: lists all that is wrong with all of them.
    """
    whole = Shape.of(source)
    total = num_parameters(source, vocab_size=vocab_size)
    problems = []
    for name, target in targets.items():
        found = _problems(target, whole)
        if target.parameters is None and not found:
            reason = why_not_computed(source, shape_of(target, whole))
            found += [] if reason is None else [reason]
        if target.parameters is not None and target.parameters >= total:
            found.append(f"parameters: {target.parameters:,}; the source has {total:,}")
        elif target.parameters is None and not found and shape_of(target, whole) == whole:
            found.append("every size is the source's: nothing would be removed")
        problems += [f"prune.targets.{name}: {problem}" for problem in found]
    if problems:
        raise ConfigError(
            "no pruning of the source gives these models:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            where=where,
            found=f"a model of {whole.text()}, {total:,} parameters",
            expected="sizes that are at most the source's, and equally many query heads in every group",
            remedy="correct prune.targets",
        )


def _problems(target: TargetConfig, source: Shape) -> list[str]:
    problems = [
        f"{name}: {size}; the source has {getattr(source, name)}"
        for name, size in target.sizes.items()
        if size > getattr(source, name)
    ]
    if problems:
        return problems
    wanted = shape_of(target, source)
    heads, groups = wanted.num_attention_heads, wanted.num_query_groups
    if heads % groups:
        return [f"num_attention_heads: {heads} is no multiple of num_query_groups: {groups}"]
    if wanted.heads_per_group > source.heads_per_group:
        return [
            f"{wanted.heads_per_group} query heads in each of {groups} groups; in the source "
            f"{source.heads_per_group} share a key/value head"
        ]
    return []
