"""Mixtures of experts: router, experts, and the two losses that keep a router balanced and its logits small.

Megatron-core dispatches tokens to the ranks that hold their experts, over any layout. Its own losses of a router are
another number under another layout (0.16 divides them by the ranks that share a sequence), so they are computed here.

Shapes: s positions of this rank, b sequences, N = s * b, E experts of a layer, k of a token, H hidden, F width of an
expert, e experts of this rank, M tokens that are theirs, each as often as it has one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from distill_pretrain.errors import LayoutError
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.expert_names import LOCAL, is_of_expert
from distill_pretrain.mcore.model.own_attention import with_bias
from distill_pretrain.mcore.model.parts import ExpertsConfig
from distill_pretrain.mcore.runtime.core import (
    MLPSubmodules,
    SequentialMLP,
    TopKRouter,
    parallel_state,
    tensor_parallel,
    topk_routing_with_score_function,
)

_GROUPED_ALIGNMENT = 8
"""Multiple of both widths of an expert in bf16 that the grouped product asks for (16 bytes)."""
ROUTER_LOSSES = ("load_balancing_loss", "router_z_loss")
"""Names of what a router notes, as metrics have them."""


def experts_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of megatron-core's TransformerConfig for the experts of a model; none without experts.

    Each expert is whole on its rank, under tensor parallelism too.

    Raises:
        LayoutError: the ranks cannot share them out.
    """
    if model.experts is None:
        return {}
    if model.experts.number % parallel.expert:
        raise LayoutError(
            "the ranks cannot share out the experts of the model",
            where="parallel.expert (where a model only scores: its tensor-parallel size)",
            found=f"{model.experts.number} experts, {parallel.expert} ranks",
            expected="a number of ranks that divides that of the experts",
        )
    return {
        "num_moe_experts": model.experts.number,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.experts.per_token,
        "moe_router_pre_softmax": not model.experts.weights_of_chosen,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        **_clamped_swiglu(model.experts),
    }


def _clamped_swiglu(experts: ExpertsConfig) -> dict[str, Any]:
    """The fields for gpt-oss's feed-forward block."""
    if experts.swiglu_limit is None:
        return {}
    return {
        "activation_func": partial(_swish, experts.swiglu_alpha),
        "activation_func_clamp_value": experts.swiglu_limit,
    }


def _swish(alpha: float, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(alpha * x)


class _WithLosses(torch.autograd.Function):
    """Weights of experts as they are; on the way back the losses' gradients begin, and the losses are noted.

    A layer that is computed twice (recomputation) goes back once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        losses: torch.Tensor,
        factors: torch.Tensor,
        noted: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(losses.detach(), factors)
        ctx.noted = noted
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        losses, factors = ctx.saved_tensors
        ctx.noted += losses
        return gradient, factors, None, None


class Router(TopKRouter):
    """Megatron-core's router with losses that are the same under any layout.

    Args:
        experts: numbers, and coefficients of the losses.

    Attributes:
        noted: float64[2], this rank's part of both losses, summed over sequences since they were last taken.
    """

    def __init__(self, *args: Any, experts: ExpertsConfig, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._experts = experts
        if experts.biases:
            self.bias = torch.nn.Parameter(self.weight.detach().new_zeros(experts.number))
            self.bias.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.noted: torch.Tensor | None = None

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Compute logits in fp32, [s, b, E] of [s, b, H]; megatron-core's own needs Transformer Engine (0.16)."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts by logits [s, b, E]: weights [N, E], 0 where an expert is not chosen, and bool[N, E]."""
        assert padding_mask is None
        weights, chosen = topk_routing_with_score_function(
            logits.flatten(0, 1), self.topk, use_pre_softmax=not self._experts.weights_of_chosen
        )
        if self.training and torch.is_grad_enabled():
            weights = self._with_losses(weights, logits, chosen)
        return weights, chosen

    def _with_losses(
        self, weights: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """Attach both losses, each a sum over sequences; ranks that share a sequence each have their part of it.

        Load balancing: E times the sum over experts of (share of choices) * (mean probability), 1 in balance. A
        sequence weighs as much as all its positions: gradients are later divided by the positions of a batch.
        """
        number, ranks = self._experts.number, self.tp_cp_group.size()
        choices = chosen.view_as(logits).sum(0, dtype=torch.float32)
        if ranks > 1:
            dist.all_reduce(choices, group=self.tp_cp_group)
        length = len(logits) * ranks
        logits = logits.float()
        probabilities = logits.softmax(-1).sum(0)
        balance = (probabilities * choices).sum() * (number / (self.topk * length**2))
        squares = logits.logsumexp(-1).square().sum() / length
        coefficients = (self._experts.load_balancing, self._experts.z_loss)
        factors = logits.new_tensor(coefficients) * length
        if self.noted is None:
            self.noted = torch.zeros(2, dtype=torch.float64, device=logits.device)
        result: torch.Tensor = _WithLosses.apply(
            weights, torch.stack((balance, squares)), factors, self.noted
        )
        return result


def router_losses(chunks: Sequence[torch.nn.Module], sequences: int) -> torch.Tensor:
    """Return means of what the routers have noted, fp64[2] in the order of ROUTER_LOSSES, and let them begin anew.

    Every rank calls it; without experts it returns fp64[0].

    Args:
        chunks: of this rank.
        sequences: that all ranks together have gone back through.
    """
    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Router)]
    if not routers:
        return torch.zeros(0, dtype=torch.float64)
    noted = [router.noted for router in routers if router.noted is not None]
    total = torch.stack(noted).sum(0)
    for each in noted:
        each.zero_()
    dist.all_reduce(total)
    return total / (routers[0].config.num_layers * sequences)


class Experts(SequentialMLP):
    """The experts of this rank: megatron-core's, computed one after another, or in grouped products where these run.

    Megatron-core's own order cannot add biases where an expert is whole: it adds them in place, to a view.

    Args:
        submodules: linear layers of an expert.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        *,
        submodules: Any,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Compute the outputs, times their weights, of tokens [M, H] in the order of the experts."""
        groups = can_group(tokens, self.config.moe_ffn_hidden_size, self.num_local_experts)
        return self.computed(tokens, tokens_per_expert, weights, grouped=groups), None

    def computed(
        self,
        tokens: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        weights: torch.Tensor,
        *,
        grouped: bool,
    ) -> torch.Tensor:
        """Do the same, in two products over all experts of this rank or in two for each."""
        counts = tokens_per_expert.to(tokens.device)
        multiply = self._grouped if grouped else self._one_by_one
        inner = self._with_biases("linear_fc1", multiply("linear_fc1", tokens, counts), counts)
        gate, up = inner.chunk(2, dim=-1)
        limit = self.config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        hidden = (self.config.activation_func(gate) * up * weights[:, None]).to(tokens.dtype)
        outer = multiply("linear_fc2", hidden, counts)
        return self._with_biases("linear_fc2", outer, counts, weights)

    def _grouped(self, linear: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """All experts' products in one."""
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, self._stacked(linear, "weight").mT, offs=ends)

    def _one_by_one(self, linear: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Products of one expert after another."""
        parts = x.split(counts.tolist())
        layers = [getattr(expert, linear) for expert in self.local_experts]
        return torch.cat([layer(part)[0] for layer, part in zip(layers, parts, strict=True)])

    def _with_biases(
        self,
        linear: str,
        x: torch.Tensor,
        counts: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add each expert's bias, where they have any, times the weights of its tokens."""
        if getattr(self.local_experts[0], linear).bias is None:
            return x
        biases = self._stacked(linear, "bias").repeat_interleave(counts, 0)
        return x + (biases if weights is None else (biases * weights[:, None]).to(x.dtype))

    def _stacked(self, linear: str, kind: str) -> torch.Tensor:
        """Parameters of all experts of this rank: [e, ...]."""
        return torch.stack([getattr(getattr(x, linear), kind) for x in self.local_experts])


def can_group(tokens: torch.Tensor, width: int, num_experts: int) -> bool:
    """Say whether grouped products run, and are worth it: bf16 on GPUs from compute capability 8.0 on."""
    return (
        tokens.is_cuda
        and tokens.dtype == torch.bfloat16
        and num_experts > 1
        and len(tokens) > 0
        and tokens.size(1) % _GROUPED_ALIGNMENT == width % _GROUPED_ALIGNMENT == 0
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(tokens.device) >= (8, 0)
    )


def use_experts(layer: Any, experts: ExpertsConfig) -> None:
    """Let a layer of megatron-core's local spec, made for experts, have those of this module."""
    mlp = layer.submodules.mlp
    # A partial function from megatron-core 0.17 on.
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    first, second = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
    if experts.biases:
        first, second = with_bias(first), with_bias(second)
    linears = MLPSubmodules(linear_fc1=first, linear_fc2=second)
    submodules.experts = _class_with(Experts, submodules=linears)
    submodules.router = _class_with(Router, experts=experts)


def _class_with(base: type, **own: Any) -> type:
    """A class that has some arguments already: megatron-core builds classes, and takes partial functions for built."""

    class Known(base):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings, **own)

    Known.__name__ = Known.__qualname__ = base.__name__
    return Known


def global_expert_name(name: str, experts: int) -> str:
    """Return the name of an expert's parameter with the expert's number in the layer, not that on this rank.

    Args:
        name: on this rank.
        experts: of a layer.
    """
    before, local, rest = name.partition(LOCAL)
    number, _, tail = rest.partition(".")
    size = parallel_state.get_expert_model_parallel_world_size()
    first = experts // size * parallel_state.get_expert_model_parallel_rank()
    return f"{before}{local}{first + int(number)}.{tail}"


def mark_experts(gpt: torch.nn.Module) -> None:
    """Mark the parameters of experts: their gradients are summed over the ranks that hold the same experts.

    Megatron-core does so only for an expert-parallel size above 1; here one rank with all experts is no other case.
    """
    for name, parameter in gpt.named_parameters():
        if is_of_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            # No copy of another tensor-parallel rank's, which would not count in the gradient norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
