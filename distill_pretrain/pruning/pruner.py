"""One source, cut to several shapes by the scores of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.choice import Kept, choose, choose_layers
from distill_pretrain.pruning.config import PruneConfig, TargetConfig
from distill_pretrain.pruning.folder import Source
from distill_pretrain.pruning.model import Batch, build_model, load_model, mean_loss, without_layers
from distill_pretrain.pruning.scores import Scores, collect_scores
from distill_pretrain.pruning.search import Found, search
from distill_pretrain.pruning.shapes import Shape, num_parameters, shape_of, with_shape
from distill_pretrain.pruning.slicing import Cut, cuts


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A smaller model.

    Attributes:
        model: its architecture.
        parameters: how many it has.
        kept: what of the source it has.
        cuts: its tensors.
        loss: cross-entropy in nats per token, before any training.
        search: how its shape was found, where it was searched for.
    """

    model: ModelConfig
    parameters: int
    kept: Kept
    cuts: list[Cut]
    loss: float
    search: Found | None

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return Shape.of(self.model)


class Pruner:
    """Scores a source and cuts models out of it.

    Args:
        source: opened and checked.
        config: settings; its targets are not used.
        scored: micro-batches of whole sequences, for scores and for losses while searching.
        reported: micro-batches for the losses that are reported.
        vocab_size: V of the corpus.
        device: to compute on.
        told: called with what is being done, again and again.

    Raises:
        ConfigError: no token is part of the loss.

    Attributes:
        scores: of the source.
        shape: of the source.
        loss: of the source on `reported`.
    """

    def __init__(
        self,
        source: Source,
        config: PruneConfig,
        *,
        scored: Sequence[Batch],
        reported: Sequence[Batch],
        vocab_size: int,
        device: torch.device,
        told: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.source = source
        self.shape = Shape.of(source.model)
        self._config, self._device, self._told = config, device, told
        self._reported, self._vocab_size = reported, vocab_size
        self._sample = _first(scored, config.loss_sequences)
        for batches in (self._sample, reported):
            _require_labels(batches)
        self._model = load_model(source.folder, config.dtype, device)
        told("scores")
        self.scores: Scores = collect_scores(self._model, (tokens for tokens, _ in scored))
        self._without: dict[tuple[int, ...], float] = {}
        self._measured: dict[tuple[Shape, str, bool], float] = {}
        self.loss = self._loss(self._model, reported)

    @property
    def loss_without(self) -> dict[tuple[int, ...], float]:
        """Losses with layers left out that were measured, by the layers."""
        return dict(self._without)

    def prune(self, name: str, target: TargetConfig) -> PrunedModel:
        """Make the smaller model of a target, and measure it.

        Args:
            name: of the target, for messages.
            target: reachable and, with `parameters`, findable.
        """
        found = None
        shape = shape_of(target, self.shape)
        if target.parameters is not None:
            found = self._search(name, target)
            shape = found.shape
        kept = self._kept(shape, target)
        model = with_shape(self.source.model, shape, kept.layers)
        tensors = self._cuts(model, kept)
        return PrunedModel(
            model=model,
            parameters=num_parameters(model, vocab_size=self.source.vocab_size),
            kept=kept,
            cuts=tensors,
            loss=self._loss(self._built(model, tensors), self._reported),
            search=found,
        )

    def _search(self, name: str, target: TargetConfig) -> Found:
        def loss_of(shape: Shape) -> float:
            key = (shape, target.layer_score, target.contiguous)
            if key not in self._measured:
                self._told("shapes")
                kept = self._kept(shape, target)
                model = with_shape(self.source.model, shape, kept.layers)
                tensors = self._cuts(model, kept)
                self._measured[key] = self._loss(self._built(model, tensors), self._sample)
            return self._measured[key]

        return search(
            name,
            target,
            self.source.model,
            vocab_size=self.source.vocab_size,
            loss_of=loss_of,
            candidates=self._config.candidates,
        )

    def _kept(self, shape: Shape, target: TargetConfig) -> Kept:
        layers = choose_layers(
            self.scores,
            shape.num_layers,
            contiguous=target.contiguous,
            loss_without=self._loss_without if target.layer_score == "loss" else None,
        )
        return choose(self.scores, self.shape, shape, layers)

    def _loss_without(self, layers: tuple[int, ...]) -> float:
        if layers not in self._without:
            self._told("layers left out")
            with without_layers(self._model, layers):
                self._without[layers] = self._loss(self._model, self._sample)
        return self._without[layers]

    def _cuts(self, model: ModelConfig, kept: Kept) -> list[Cut]:
        shares = self.scores.norm_shares if self._config.rescale_norms else None
        return list(
            cuts(
                model,
                kept,
                source=self.source.model,
                vocab_size=self.source.vocab_size,
                norm_shares=shares,
                family=self.source.config["model_type"],
            )
        )

    def _built(self, model: ModelConfig, tensors: Sequence[Cut]) -> Any:
        weights = {cut.name: cut.read(self.source.files) for cut in tensors}
        config = self.source.config_of(model)
        return build_model(config, weights, self._config.dtype, self._device)

    def _loss(self, model: Any, batches: Sequence[Batch]) -> float:
        return mean_loss(model, batches, vocab_size=self._vocab_size)


def _require_labels(batches: Sequence[Batch]) -> None:
    """Raise ConfigError where the loss of batches would be a mean over nothing."""
    if not any(bool((labels != IGNORED_LABEL).any()) for _, labels in batches):
        raise ConfigError(
            "no token of the sequences whose loss is measured is part of the loss: the corpus leaves all of them out",
            where="prune.loss_sequences",
            found=f"{sum(len(tokens) for tokens, _ in batches)} sequences without a label",
            expected="at least one token with a label",
            remedy="raise it (and prune.num_sequences), set another prune.seed, or name a corpus without loss weights",
        )


def _first(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first sequences of micro-batches."""
    found: list[Batch] = []
    for tokens, labels in batches:
        if count > 0:
            found.append((tokens[:count], labels[:count]))
            count -= len(tokens)
    return found
