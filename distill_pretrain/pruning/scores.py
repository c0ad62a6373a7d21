"""How much each layer, head and channel does on a sample of text: one forward pass with hooks.

Shapes: B sequences of a micro-batch, L positions, n layers, H hidden_size, F ffn_hidden_size, h query heads.

Widths are scored as Minitron does (arXiv 2407.14679, section 2.2 and table 13): the magnitude of an activation, its
mean over the positions of a sequence, and the root of the sum of squares over the sequences. For hidden channels these
are the outputs of the layers' norms (all layers added up), for feed-forward channels the input of the down projection,
for heads the Euclidean norm of their output. Depth is scored by block influence (arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

_SIMILARITY_CHUNK = 256
_NORMS = ("input_layernorm", "post_attention_layernorm")

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
        norm_shares: name of an RMSNorm's weight -> [H], the mean of (x^2 + eps) / (mean square of x + eps), where x is
            its input.
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
    """Score a causal LM of transformers (llama, mistral, qwen2, qwen3) on sequences without padding.

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
            for norm in _NORMS:
                yield (
                    getattr(layer, norm),
                    self._norm_hook(
                        f"model.layers.{number}.{norm}.weight", is_point=norm == _NORMS[0]
                    ),
                )
            yield layer.self_attn.o_proj, self._heads_hook(f"heads.{number}")
            yield layer.mlp.down_proj, self._ffn_hook(f"ffn.{number}")
        yield self._trunk.norm, self._norm_hook("model.norm.weight", is_point=True, is_scored=False)

    def _add(self, name: str, magnitudes: torch.Tensor) -> None:
        """Add the mean of `magnitudes` [B, L, C] over L, squared and summed over B."""
        squares = magnitudes.mean(dim=1, dtype=torch.float64).square().sum(dim=0)
        self._squares[name] = self._squares.get(name, 0.0) + squares

    def _norm_hook(self, name: str, *, is_point: bool, is_scored: bool = True) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].float()
            squares, epsilon = x.square(), module.variance_epsilon
            shares = (squares + epsilon) / (squares.mean(dim=-1, keepdim=True) + epsilon)
            total = shares.sum(dim=(0, 1), dtype=torch.float64)
            self._shares[name] = self._shares.get(name, 0.0) + total
            if is_scored:
                self._add(f"hidden.{name}", output.abs())
            if is_point:
                # A layer's first norm sees the residual stream as it enters the layer.
                self._points.append(torch.nn.functional.normalize(x, dim=-1).flatten(0, 1))

        return hook

    def _heads_hook(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            per_head = inputs[0].float().unflatten(-1, (-1, self._head_width))
            self._add(name, per_head.norm(dim=-1))

        return hook

    def _ffn_hook(self, name: str) -> Any:
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
