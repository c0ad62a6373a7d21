"""Per-parameter learning rate, weight decay and epsilon of `init: completep` (arXiv 2505.01618, table 1, alpha = 1).

With the width multiplier m_N = hidden / base hidden and the depth multiplier m_L = layers / base layers:

    matrices of the layers     lr / m_N, weight decay * m_N, epsilon / (m_N m_L)
    their norms and biases     lr, no weight decay, epsilon / (m_N m_L)
    embeddings, final norm     lr, epsilon / m_N
    head                       lr / m_N, weight decay * m_N, epsilon

Rates would also go with m_L^(alpha - 1), which is 1. The paper divides the logits by m_N and has the embedding's rules
for the head; dividing the head's weights and learning rate by m_N instead is the same run. The authors' published code
agrees, but for one epsilon / (m_N m_L) for all parameters, which at Adam's usual epsilon makes no difference. It also
scales attention logits by 1 / head width; here they keep 1 / sqrt(head width), so transfer over width needs heads of
one width (set kv_channels), not one number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig
from distill_pretrain.mcore.runtime.core import ParamKey, ParamWithNamePredicate


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors on the optimizer section's values for one parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    epsilon: float = 1.0


def multipliers(
    model: ModelConfig, name: str, dim: int, *, decay_embeddings: bool = True
) -> Multipliers:
    """Return the factors for a parameter by its name and number of dimensions.

    All are 1 but for completep and for what does not decay.
    """
    decays = float(dim > 1 and not name.endswith(".bias"))
    if not decay_embeddings and _is_embedding(model, name):
        decays = 0.0
    if model.init != "completep":
        return Multipliers(weight_decay=decays)
    wide = model.hidden_size / (model.base_hidden_size or model.hidden_size)
    deep = model.num_layers / model.base_num_layers
    if "decoder.layers." in name:
        width = wide if decays else 1.0
        return Multipliers(lr=1 / width, weight_decay=decays * width, epsilon=1 / (wide * deep))
    if name.endswith("output_layer.weight"):
        return Multipliers(lr=1 / wide, weight_decay=wide)
    return Multipliers(weight_decay=decays, epsilon=1 / wide)


def _is_embedding(model: ModelConfig, name: str) -> bool:
    """Whether a parameter is one; the last pipeline stage holds a tied one as its head."""
    tied_head = model.tie_embeddings and name.endswith("output_layer.weight")
    return tied_head or name.endswith(("word_embeddings.weight", "position_embeddings.weight"))


def config_overrides(
    model: ModelConfig, optimizer: OptimizerConfig
) -> dict[ParamKey, dict[str, float]] | None:
    """Return what `get_megatron_optimizer` takes as `config_overrides`; None leaves megatron-core's groups alone."""
    if model.init != "completep" and optimizer.decay_embeddings:
        return None
    factors_of = partial(multipliers, model, decay_embeddings=optimizer.decay_embeddings)

    def override(factors: Multipliers) -> dict[str, float]:
        return {
            "wd_mult": factors.weight_decay,
            "max_lr": optimizer.lr * factors.lr,
            "min_lr": optimizer.min_lr * factors.lr,
            "eps": optimizer.epsilon * factors.epsilon,
            # Not read by the schedule: a checkpoint tells groups apart by wd_mult and this.
            "lr_mult": factors.lr * factors.epsilon,
        }

    def key(factors: Multipliers) -> ParamKey:
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=repr(factors),
                fn=lambda parameter, name: factors_of(name, parameter.dim()) == factors,
            )
        )

    kinds = (
        ("decoder.layers.0.mlp.linear_fc1.weight", 2),
        ("decoder.layers.0.input_layernorm.weight", 1),
        ("embedding.word_embeddings.weight", 2),
        ("decoder.final_layernorm.weight", 1),
        ("output_layer.weight", 2),
    )
    found = {factors_of(name, dim) for name, dim in kinds}
    return {key(factors): override(factors) for factors in sorted(found, key=repr)}
