"""Initial weights and residual scaling of a model section: what `model.init` means, in numbers.

A sublayer (attention or feed-forward; S = 2 num_layers of them, attention even) adds its branch to the residual stream.
DeepScaleLM (arXiv 2403.09635) and DeepNorm (arXiv 2203.00555) also scale the stream,

    x <- lambda x + beta F(norm(x))  (pre)        x <- norm(lambda x + beta F(x))  (post).

A norm does not see the scale of its input, so the stream can be left alone: with y_l = x_l / lambda^l,

    y <- y + c_l F(norm(y)), c_l = beta / lambda^(l+1)  (pre)        y <- norm(y + c F(y)), c = beta / lambda  (post)

is the same model. This branch-only form is what runs: in deep models lambda is so close to 1 that bf16 rounds it to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.init.moments import feed_forward_gain
from distill_pretrain.mcore.model.config import ModelConfig

FORM = "branch-only"


@dataclass(frozen=True, kw_only=True)
class ResidualScaling:
    """How branches join the residual stream.

    Attributes:
        skip: lambda.
        branch: beta.
        placement: "pre" or "post" norms.
    """

    skip: float
    branch: float
    placement: str

    @property
    def is_plain(self) -> bool:
        """Whether branches are added as they are."""
        return self.skip == self.branch == 1.0

    def coefficient(self, sublayer: int) -> float:
        """Return c_l of the branch-only form, for the sublayer's number from 0."""
        return self.branch / self.skip ** (sublayer + 1 if self.placement == "pre" else 1)

    def stream_scale(self, sublayers: int) -> float:
        """Return lambda^l, the factor that turns the stream y after so many sublayers into x."""
        return float(self.skip**sublayers) if self.placement == "pre" else 1.0


def residual_scaling(model: ModelConfig) -> ResidualScaling:
    """Return lambda and beta of a model: (1, 1) but for deepscale, completep and deepnorm.

    - deepscale: beta^2 = k / S, lambda^2 = 1 - beta^2 (arXiv 2403.09635, section 4).
    - completep: beta = base layers / layers (arXiv 2505.01618, table 1, alpha = 1).
    - deepnorm: lambda = (2 layers)^(1/4) (arXiv 2203.00555, decoder only).
    """
    skip = branch = 1.0
    if model.init == "deepscale":
        share = model.residual_k / (2 * model.num_layers)
        skip, branch = math.sqrt(1 - share), math.sqrt(share)
    elif model.init == "completep":
        branch = model.base_num_layers / model.num_layers
    elif model.init == "deepnorm":
        skip = (2 * model.num_layers) ** 0.25
    return ResidualScaling(skip=skip, branch=branch, placement=model.norm_placement)


def residual_identity(model: ModelConfig) -> dict[str, Any]:
    """Return what a checkpoint records of its residual scaling; its weights mean another function under any other.

    Empty for a model without any.
    """
    scaling = residual_scaling(model)
    if scaling.is_plain:
        return {}
    return {
        "residual": {
            "init": model.init,
            "form": FORM,
            "sublayers": 2 * model.num_layers,
            "lambda": scaling.skip,
            "beta": scaling.branch,
        }
    }


def require_residual(identity: dict[str, Any], model: ModelConfig, where: object) -> None:
    """Raise CheckpointError naming both if a checkpoint's residual scaling is not this model's.

    Args:
        identity: of the checkpoint.
        model: that its weights are to be loaded into.
        where: the checkpoint.
    """
    found, expected = identity.get("residual"), residual_identity(model).get("residual")
    if found != expected:
        raise CheckpointError(
            "the checkpoint's residual scaling is not this model's",
            where=where,
            found=_in_words(found),
            expected=_in_words(expected),
            remedy="load it with the model section, and the version of this project, that trained it",
        )


def _in_words(record: dict[str, Any] | None) -> str:
    if record is None:
        return "none (lambda 1, beta 1)"
    return (
        f"{record.get('init')}, {record.get('form')} form, lambda {record.get('lambda')}, beta {record.get('beta')} "
        f"over {record.get('sublayers')} sublayers"
    )


@dataclass(frozen=True, kw_only=True)
class Stds:
    """Standard deviations of a model's initial matrices, and the gain of its final norm.

    Attributes:
        word: word embedding.
        position: learned positions.
        query: query projection.
        key: key projection.
        value: value projection.
        attention_output: projection that writes attention to the stream.
        inner: first feed-forward matrix (gate and up).
        outer: second feed-forward matrix.
        head: untied LM head; what `word` is, times `final_gain`, for a tied one.
        final_gain: initial gain of the final norm.
    """

    word: float
    position: float
    query: float
    key: float
    value: float
    attention_output: float
    inner: float
    outer: float
    head: float
    final_gain: float = 1.0


def initial_stds(model: ModelConfig) -> Stds:
    """Compute the standard deviations that `model.init` stands for."""
    return _RULES[model.init](model)


def _widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """Widths of the stream, the queries, the keys (the values have the same), and the feed-forward block."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return (
        model.hidden_size,
        head * model.num_attention_heads,
        head * groups,
        model.ffn_hidden_size,
    )


def _megatron(model: ModelConfig) -> Stds:
    """One std, output projections over sqrt(S) (GPT-2; arXiv 1909.08053)."""
    std, output = model.init_std, model.init_std / math.sqrt(2 * model.num_layers)
    return Stds(
        word=std,
        position=std,
        query=std,
        key=std,
        value=std,
        attention_output=output,
        inner=std,
        outer=output,
        head=std,
    )


def _xavier(model: ModelConfig) -> Stds:
    """sqrt(2 / (fan in + fan out)) (Glorot and Bengio 2010); embeddings and head 1 / sqrt(hidden)."""
    d, queries, keys, inner = _widths(model)
    vector = 1 / math.sqrt(d)
    return Stds(
        word=vector,
        position=vector,
        query=math.sqrt(2 / (d + queries)),
        key=math.sqrt(2 / (d + keys)),
        value=math.sqrt(2 / (d + keys)),
        attention_output=math.sqrt(2 / (d + queries)),
        inner=math.sqrt(2 / (d + inner)),
        outer=math.sqrt(2 / (d + inner)),
        head=vector,
    )


def _deepnorm(model: ModelConfig) -> Stds:
    """Xavier with gain (8 layers)^(-1/4) on values, outputs and the feed-forward block (arXiv 2203.00555, figure 2).

    Embeddings have std 1 here, as the stream has between the norms.
    """
    base, gain = _xavier(model), (8 * model.num_layers) ** -0.25
    return Stds(
        word=_embedding_std(model),
        position=_embedding_std(model),
        query=base.query,
        key=base.key,
        value=gain * base.value,
        attention_output=gain * base.attention_output,
        inner=gain * base.inner,
        outer=gain * base.outer,
        head=base.head,
    )


def _embedding_std(model: ModelConfig) -> float:
    """Standard deviation with which the sum of the embeddings has variance 1 after dropout."""
    tables = 1 if model.arch == "llama" else 2
    return math.sqrt((1 - model.dropout) / tables)


def _final_gain(model: ModelConfig, word: float) -> float:
    """Gain of the final norm with which logits have variance 1.

    A tied head has the embedding's standard deviation, not 1 / sqrt(hidden), and the gain makes up for it.
    """
    return 1 / (word * math.sqrt(model.hidden_size)) if model.tie_embeddings else 1.0


def _fan_in(model: ModelConfig) -> Stds:
    """Unit embeddings, 1 / sqrt(fan in), output projections over sqrt(S): the strong plain baseline."""
    d, queries, _, inner = _widths(model)
    vector, depth = 1 / math.sqrt(d), math.sqrt(2 * model.num_layers)
    word = _embedding_std(model)
    return Stds(
        word=word,
        position=word,
        query=vector,
        key=vector,
        value=vector,
        attention_output=1 / math.sqrt(queries) / depth,
        inner=vector,
        outer=1 / math.sqrt(inner) / depth,
        head=vector,
        final_gain=_final_gain(model, word),
    )


def _deepscale(model: ModelConfig) -> Stds:
    """Every block makes variance 1 of variance 1 (arXiv 2403.09635, section 4).

    Attention multiplies the variance by std_v^2 hidden, then by std_o^2 queries, and its dropout divides by 1 - p: each
    matrix gives sqrt(1 - p). The feed-forward block has E[h^2] of its hidden units in between (`feed_forward_gain`).
    But for rho = 1 in std_v^2 hidden = std_o^2 queries = sqrt((1 - p) / rho): causal attention averages over few tokens
    at first and over correlated ones later, and its rho (`moments.attention_context`) would amplify what tokens share.
    """
    d, queries, _, inner = _widths(model)
    vector, keep = 1 / math.sqrt(d), 1 - model.dropout
    gated, name = activation_of(model)
    word = _embedding_std(model)
    return Stds(
        word=word,
        position=word,
        query=vector,
        key=vector,
        value=keep**0.25 * vector,
        attention_output=keep**0.25 / math.sqrt(queries),
        inner=vector,
        outer=math.sqrt(keep / (inner * feed_forward_gain(name, gated=gated))),
        head=vector,
        final_gain=_final_gain(model, word),
    )


def _completep(model: ModelConfig) -> Stds:
    """Fan-in stds and unit embeddings (arXiv 2505.01618, table 1).

    The paper divides logits by the width multiplier m = hidden / base hidden; here the head's std, learning rate and
    epsilon carry it (`deep_groups`). At m = 1 logits start with variance 1.
    """
    d, queries, _, inner = _widths(model)
    vector = 1 / math.sqrt(d)
    word = _embedding_std(model)
    return Stds(
        word=word,
        position=word,
        query=vector,
        key=vector,
        value=vector,
        attention_output=1 / math.sqrt(queries),
        inner=vector,
        outer=1 / math.sqrt(inner),
        head=math.sqrt(model.base_hidden_size or d) / d,
    )


def activation_of(model: ModelConfig) -> tuple[bool, str]:
    """Return whether the feed-forward block is gated, and its activation."""
    gated, usual = {"llama": (True, "silu"), "gpt2": (False, "gelu")}[model.arch]
    return gated, model.activation or usual


_RULES = {
    "megatron": _megatron,
    "xavier": _xavier,
    "fan_in": _fan_in,
    "deepscale": _deepscale,
    "completep": _completep,
    "deepnorm": _deepnorm,
}


def row_stds(model: ModelConfig, name: str) -> list[tuple[int, float]]:
    """Runs of rows of a full matrix with one std each: (rows, std), repeated over the matrix.

    Args:
        model: architecture.
        name: of the parameter, as megatron-core has it. The query, key and value projection is laid out as
            [query heads of a group | its key | its value] per group.
    """
    stds = initial_stds(model)
    if name.endswith("linear_qkv.weight"):
        _, queries, keys, _ = _widths(model)
        groups = model.num_query_groups or model.num_attention_heads
        width = keys // groups
        return [(queries // groups, stds.query), (width, stds.key), (width, stds.value)]
    for suffix, std in (
        ("word_embeddings.weight", stds.word),
        ("position_embeddings.weight", stds.position),
        ("linear_proj.weight", stds.attention_output),
        ("linear_fc1.weight", stds.inner),
        ("linear_fc2.weight", stds.outer),
        ("output_layer.weight", stds.head),
        ("router.weight", model.init_std),
    ):
        if name.endswith(suffix):
            return [(1, std)]
    raise AssertionError(f"no initial std for {name}")
