"""Layers of a model: Transformer Engine's, or megatron-core's local ones with what those lack.

The local spec has no norms that allow sequence parallelism, and no attention that allows context parallelism.

Shapes: s positions of this rank, S = s * c of the sequence over c context-parallel ranks, b sequences, n heads, g query
groups, h head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.init.deep import ResidualScaling
from distill_pretrain.mcore.init.layers import (
    DeepLayer,
    PostNormLayer,
    ReorderedLayer,
    SandwichLayer,
)
from distill_pretrain.mcore.model.capped_attention import capped_attention
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.experts import use_experts
from distill_pretrain.mcore.model.layout import require_spec
from distill_pretrain.mcore.model.norms import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from distill_pretrain.mcore.model.own_attention import (
    OwnAttention,
    Sinks,
    rotaries_of,
    with_bias,
)
from distill_pretrain.mcore.runtime.core import (
    MegatronModule,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    parallel_state,
    tensor_parallel,
    transformer_engine_norm,
)
from distill_pretrain.processes.context import context_spans

LayerSpec = tuple[Any, Any]
"""Megatron-core's ModuleSpec of every layer, and the class of the final norm; None for a model without one."""


def require_documents_apart(layers: Iterable[torch.nn.Module]) -> None:
    """Refuse layers that would carry something from one document into the next one of a sequence.

    Args:
        layers: of this rank's part of a model that is to keep documents separate.

    Raises:
        ConfigError: see above.
    """
    for layer in layers:
        attention = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if not isinstance(attention, SDPAttention):
            mixer = layer if attention is None else attention
            raise ConfigError(
                "this model's layers do not keep documents apart",
                where="data.documents, model.spec",
                found=f"separate, and {type(mixer).__module__}.{type(mixer).__name__}",
                expected=f"attention of {SDPAttention.__name__}",
                remedy="set model.spec=local and model.implementation=gpt, or data.documents=joined",
            )


class SDPAttention(MegatronModule):
    """Causal core attention on `torch.nn.functional.scaled_dot_product_attention`.

    Context-parallel ranks gather each other's keys and values; the backward pass scatters the sums of their gradients.

    Attributes:
        model: architecture, of subclasses for models whose attention has pieces of its own (`attention_of`).
        window: places that a query of this layer sees, its own included; None for all before.
        sinks: of a model with attention_sinks.
    """

    model: ModelConfig | None = None
    window: int | None = None
    sinks: Sinks | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if self.model is not None and self.model.attention_of(layer_number - 1) == "w":
            self.window = self.model.sliding_window
        has_sinks = self.model is not None and self.model.attention_sinks
        self.sinks = Sinks(config) if has_sinks else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend: query [s, b, n, h], key and value [s, b, g, h] -> [s, b, n * h].

        Where documents are separate, `attention_mask` is `TokenBatch.pieces`.
        """
        assert attention_bias is None and packed_seq_params is None
        s, b, n, h = query.shape
        size = self.config.context_parallel_size
        if size > 1:
            key, value = _gathered_over_context(torch.stack((key, value), dim=1), size).unbind(1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        groups = k.size(1)
        if groups != n and q.dtype == torch.float32:
            # On GPUs grouped heads in fp32 have no fused kernel and would make [s, s] matrices.
            k, v = (x.repeat_interleave(n // groups, dim=1) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        # Heads on different tensor-parallel ranks need masks of their own, as in megatron-core's attention.
        own_stream = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_stream else nullcontext():
            if attention_mask is None:
                out = self._attend(q, k, v, dropout)
            else:
                out = self._attend_within(attention_mask, q, k, v, dropout)
        return out.permute(2, 0, 1, 3).reshape(s, b, n * h)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Queries [b, n, s, h] of this rank's places, keys and values [b, ., S, h] of all of them -> [b, n, s, h]."""
        spans = self._spans(k.size(2))
        outputs = [
            self._attend_to_all_before(own, k[:, :, :stop], v[:, :, :stop], dropout)
            for (_, stop), own in zip(
                spans, q.split([stop - start for start, stop in spans], dim=2), strict=True
            )
        ]
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _spans(self, num_keys: int) -> list[tuple[int, int]]:
        """Where this rank's queries are among the positions of a sequence."""
        size = self.config.context_parallel_size
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        return context_spans(num_keys, rank, size)

    def _attend_to_all_before(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Queries at the last of the places of the keys, each to its own place and those before.

        The first key is at position 0 of its document, or of the sequence where documents are joined.
        """
        num_queries, num_keys = q.size(2), k.size(2)
        if self.model is not None and self.model.attention_temperature is not None:
            q = q * self._temperatures(self.model, num_keys - num_queries, num_keys).to(q)
        if self.model is not None and self.model.attention_logit_cap is not None:
            cap, scale = self.model.attention_logit_cap, self.softmax_scale
            return capped_attention(
                q, k, v, cap=cap, scale=scale, window=self.window, dropout=dropout
            )
        if self.window is not None and self.window < num_keys:
            return self._attend_in_window(q, k, v, dropout, self.window)
        return self._product(q, k, v, None, dropout)

    def _product(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attend under a mask bool[queries, keys]; None for each query to its own place and those before."""
        width, scale = q.size(3), self.softmax_scale
        if self.sinks is not None:
            scale = scale or width**-0.5
            q, k, v = self.sinks(q, k, v, scale)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        num_queries, num_keys = q.size(2), k.size(2)
        causal = mask is None and num_queries == num_keys
        if mask is None and not causal:
            mask = _lower_right(num_queries, num_keys)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out[..., :width]

    @staticmethod
    def _temperatures(model: ModelConfig, start: int, stop: int) -> torch.Tensor:
        """Factors on queries at positions start to stop, float32[stop - start, 1]."""
        assert model.attention_temperature and model.attention_temperature_positions
        far = torch.floor(torch.arange(start, stop) / model.attention_temperature_positions)
        return (1 + model.attention_temperature * torch.log(1 + far))[:, None]

    def _attend_in_window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, window: int
    ) -> torch.Tensor:
        """The same where a query sees so many places, its own included: a window of queries at a time."""
        first = k.size(2) - q.size(2)
        outputs = []
        for own in q.split(window, dim=2):
            last = first + own.size(2)
            start = max(0, first - window + 1)
            places = torch.arange(start, last, device=q.device)
            back = torch.arange(first, last, device=q.device)[:, None] - places
            mask = (back >= 0) & (back < window)
            keys, values = k[:, :, start:last], v[:, :, start:last]
            outputs.append(self._product(own, keys, values, mask, dropout))
            first = last
        return torch.cat(outputs, dim=2)

    def _attend_within(
        self,
        pieces: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        """The same within documents, one by one: each has the kernel that a whole sequence has, and no mask."""
        rows: list[list[torch.Tensor]] = [[] for _ in q]
        shift = 0
        for begin, end in self._spans(k.size(2)):
            # Queries of this rank in front of the span, less places of the sequence in front of it.
            shift -= begin
            for row, start, stop in pieces.tolist():
                first, last = max(start, begin), min(stop, end)
                if first < last:
                    own = q[row : row + 1, :, first + shift : last + shift]
                    keys, values = (x[row : row + 1, :, start:last] for x in (k, v))
                    rows[row].append(self._attend_to_all_before(own, keys, values, dropout))
            shift += end
        return torch.cat([torch.cat(parts, dim=2) for parts in rows])


def attention_of(model: ModelConfig) -> type[SDPAttention]:
    """Return the core attention of a model."""
    own = ("attention_temperature", "attention_logit_cap", "attention_sinks")
    if "w" not in model.attention_layers and not any(getattr(model, name) for name in own):
        return SDPAttention

    class Attention(SDPAttention):
        pass

    Attention.model = model
    return Attention


def _lower_right(num_queries: int, num_keys: int) -> torch.Tensor:
    """The last queries of a sequence under causal attention: a name for the kernels, without a matrix on GPUs."""
    # Brings torch's compiler, of which nothing else here has a use on a CPU.
    from torch.nn.attention.bias import causal_lower_right

    # A mode that watches operations, such as a counter of memory, cannot make a tensor of this subclass.
    with _disable_current_modes():
        return causal_lower_right(num_queries, num_keys)


def _gathered_over_context(x: torch.Tensor, size: int) -> torch.Tensor:
    """[s, ...] of every context-parallel rank -> [S, ...] in the order of the sequence."""
    whole = tensor_parallel.gather_from_sequence_parallel_region(
        x, group=parallel_state.get_context_parallel_group()
    )
    chunks = whole.unflatten(0, (2 * size, -1))
    # Rank r holds chunks r and 2 * size - 1 - r.
    places = [2 * r for r in range(size)] + [2 * r + 1 for r in reversed(range(size))]
    return chunks[places].flatten(0, 1)


def return_copied_bias(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """Return a block's output and a copy of its bias, which is added later: a hook of recomputed feed-forward blocks.

    Megatron-core's recomputation makes what a block returns its own result: the parameter would be one for ever, and
    its backward pass would call itself.
    """
    x, bias = output
    return x, None if bias is None else bias.clone()


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Tell whether `model.spec` means Transformer Engine's layers in this process.

    Raises:
        MissingDependency: they are asked for, and not installed.
        ConfigError: they are asked for, and there is no GPU.
    """
    require_spec(model)
    if model.spec == "te" and not torch.cuda.is_available():
        raise ConfigError(
            "the layers of Transformer Engine run on GPUs alone",
            where="model.spec",
            found="te, and no CUDA device",
            remedy="set model.spec: local, or auto",
        )
    if model.spec != "auto":
        return model.spec == "te"
    plain = model.norm_placement == "pre" and not model.own_modules and model.experts is None
    possible = plain and torch.cuda.is_available()
    return possible and importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_layer(
    config: TransformerConfig, scaling: ResidualScaling, model: ModelConfig
) -> LayerSpec:
    """Return a layer, and the final norm, of Transformer Engine's modules (Pre-LN)."""
    assert scaling.placement == "pre" and not model.own_modules
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return _scaled(layer, transformer_engine_norm(), scaling)


def local_layer(
    config: TransformerConfig, scaling: ResidualScaling, model: ModelConfig
) -> LayerSpec:
    """Return a layer, and the final norm of a model that has one, from the modules above."""
    norm: type = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    if model.zero_centred_norms:
        norm = ZeroCentredRMSNorm
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization=config.normalization, qk_layernorm=False
    )
    if model.experts is not None:
        use_experts(layer, model.experts)
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = norm
        layer.submodules.self_attention.submodules.k_layernorm = norm
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = attention_of(model)
    if model.own_modules:
        attention.module = OwnAttention
        attention.params |= {"model": model, "rotaries": rotaries_of(model, config)}
    if model.attention_output_bias:
        attention.submodules.linear_proj = with_bias(attention.submodules.linear_proj)
    if model.mlp_bias:
        mlp = layer.submodules.mlp
        # A partial function from megatron-core 0.17 on.
        linears = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        linears.linear_fc1 = with_bias(linears.linear_fc1)
        linears.linear_fc2 = with_bias(linears.linear_fc2)
    return _scaled(layer, norm, scaling)


_PLACED = {"post": PostNormLayer, "reordered": ReorderedLayer, "sandwich": SandwichLayer}


def _scaled(layer: Any, norm: Any, scaling: ResidualScaling) -> LayerSpec:
    """A layer whose branches are normed and scaled, and the final norm of a model that has one."""
    placed = _PLACED.get(scaling.placement)
    if placed is not None or not scaling.is_plain:
        layer.module = placed or DeepLayer
        layer.params = {"scaling": scaling}
    return layer, None if scaling.placement == "post" else norm
