"""How much each layer, head and channel does on a sample of text: one forward pass with hooks.

Shapes: B sequences of a micro-batch, L positions, n layers, H hidden_size, F ffn_hidden_size, h query heads.

Widths are scored as Minitron does (arXiv 2407.14679, section 2.2 and table 13): the magnitude of an activation, its
mean over the positions of a sequence, and the root of the sum of squares over the sequences. For hidden channels these
are what the layers' two branches read (all layers added up; of most families the outputs of norms), for feed-forward
channels the input of the down projection, for heads the Euclidean norm of their output. Depth is scored by block
influence (arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

_SIMILARITY_CHUNK = 256
_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
"""Norms over hidden channels that the layers of a family may have, before a branch or after it."""

Tokens = torch.Tensor
"""int64[B, L]."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a model, all float64 and on the CPU.

    Attributes:
        similarity: [n + 1, n + 1], mean cosine between the inputs of layers i and j; n is the output of the last one.
        heads: [n, h].
        ffn: [n, F].
        hidden: [H].
        norm_shares: name of an RMSNorm's weight -> a number for each of its channels, the mean of (x^2 + eps) / (mean
            square of x + eps), where x is its input. Norms of single heads, which stay whole, are left out.
    """

    similarity: torch.Tensor
    heads: torch.Tensor
    ffn: torch.Tensor
    hidden: torch.Tensor
    norm_shares: dict[str, torch.Tensor]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.heads)

    def block_influence(self, start: int, length: int = 1) -> float:
        """Return 1 - cosine between what goes into layer `start` and what comes out `length` layers later."""
        return 1.0 - float(self.similarity[start, start + length])

    def as_dict(self) -> dict[str, Any]:
        """Return the scores for a file, rounded to what float32 knows."""
        influence = [self.block_influence(i) for i in range(self.num_layers)]
        return {
            "block_influence": [float(f"{value:.7g}") for value in influence],
            **{
                name: [[float(f"{v:.7g}") for v in row] for row in getattr(self, name).tolist()]
                for name in ("similarity", "heads", "ffn")
            },
            "hidden": [float(f"{value:.7g}") for value in self.hidden.tolist()],
        }


@torch.no_grad()
def collect_scores(model: Any, batches: Iterable[Tokens]) -> Scores:
    """Score a causal LM of transformers, of a family that is pruned, on sequences without padding.

    Args:
        model: in evaluation mode, on its device; left as it was.
        batches: micro-batches of tokens.
    """
    collector = _Collector(model)
    with ExitStack() as hooks:
        for module, hook in collector.hooks():
            hooks.callback(module.register_forward_hook(hook).remove)
        for tokens in batches:
            model.model(input_ids=tokens.to(model.device), use_cache=False)
            collector.end_batch()
    return collector.scores()


class _Collector:
    """Sums over micro-batches; they live on the model's device, in float64."""

    def __init__(self, model: Any) -> None:
        self._trunk = model.model
        self._head_width = model.model.layers[0].self_attn.head_dim
        self._squares: dict[str, torch.Tensor] = {}
        self._shares: dict[str, torch.Tensor] = {}
        self._positions = 0
        self._points: list[torch.Tensor] = []
        self._similarity: torch.Tensor | float = 0.0

    def hooks(self) -> Iterable[tuple[torch.nn.Module, Any]]:
        """Yield modules and what is to be called after each; the order of calls is that of the model."""
        for number, layer in enumerate(self._trunk.layers):
            for name, norm in self._norms_of(layer):
                yield norm, self._norm_hook(f"model.layers.{number}.{name}.weight")
            attention = getattr(layer.self_attn, "qkv_proj", None) or layer.self_attn.q_proj
            yield attention, self._channels_hook(f"hidden.{number}.attention")
            gate = getattr(layer.mlp, "gate_up_proj", None) or layer.mlp.gate_proj
            yield gate, self._channels_hook(f"hidden.{number}.mlp")
            yield layer.self_attn.o_proj, self._heads_hook(f"heads.{number}")
            yield layer.mlp.down_proj, self._channels_hook(f"ffn.{number}")
            yield layer, self._point
        yield self._trunk.norm, self._norm_hook("model.norm.weight")
        yield self._trunk.norm, self._point

    def _norms_of(self, layer: Any) -> Iterable[tuple[str, Any]]:
        """A layer's norms whose channels may go: over the stream, and over all heads at once."""
        for name in _NORMS:
            if hasattr(layer, name):
                yield name, getattr(layer, name)
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name, None)
            if norm is not None and norm.weight.numel() > self._head_width:
                yield f"self_attn.{name}", norm

    def _add(self, name: str, magnitudes: torch.Tensor) -> None:
        """Add the mean of `magnitudes` [B, L, C] over L, squared and summed over B."""
        squares = magnitudes.mean(dim=1, dtype=torch.float64).square().sum(dim=0)
        self._squares[name] = self._squares.get(name, 0.0) + squares

    def _norm_hook(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            squares = inputs[0].float().square()
            # Gemma's norms call it eps.
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            shares = (squares + epsilon) / (squares.mean(dim=-1, keepdim=True) + epsilon)
            total = shares.sum(dim=(0, 1), dtype=torch.float64)
            self._shares[name] = self._shares.get(name, 0.0) + total

        return hook

    def _point(self, module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """Keep the residual stream as it entered a layer, or the final norm."""
        x = inputs[0].float()
        self._points.append(torch.nn.functional.normalize(x, dim=-1).flatten(0, 1))

    def _heads_hook(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            per_head = inputs[0].float().unflatten(-1, (-1, self._head_width))
            self._add(name, per_head.norm(dim=-1))

        return hook

    def _channels_hook(self, name: str) -> Any:
        return lambda module, inputs, output: self._add(name, inputs[0].abs())

    def end_batch(self) -> None:
        """Add up the cosines between all points of the residual stream, [n + 1] of [B x L, H]."""
        points, self._points = self._points, []
        self._positions += len(points[0])
        for start in range(0, len(points[0]), _SIMILARITY_CHUNK):
            part = torch.stack([p[start : start + _SIMILARITY_CHUNK] for p in points]).double()
            flat = part.flatten(1)
            self._similarity = self._similarity + flat @ flat.T

    def scores(self) -> Scores:
        """Return what was found."""
        found = {name: squares.sqrt().cpu() for name, squares in self._squares.items()}

        def stacked(kind: str) -> torch.Tensor:
            return torch.stack([v for name, v in found.items() if name.startswith(f"{kind}.")])

        assert isinstance(self._similarity, torch.Tensor), "no text"
        return Scores(
            similarity=(self._similarity / self._positions).cpu(),
            heads=torch.stack([found[f"heads.{i}"] for i in range(len(self._trunk.layers))]),
            ffn=torch.stack([found[f"ffn.{i}"] for i in range(len(self._trunk.layers))]),
            hidden=stacked("hidden").sum(dim=0),
            norm_shares={n: (s / self._positions).cpu() for n, s in self._shares.items()},
        )
