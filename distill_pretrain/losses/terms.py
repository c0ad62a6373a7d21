"""What the objectives share: settings at a step, reported terms, this rank's columns.

Shapes: B sequences, L positions, T = L * B tokens, V real vocabulary, V_pad padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.kernels.sparse_kd.settings import ALWAYS_REPORTED, TERMS
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.schedule import extremes


def column_slice(
    logits: torch.Tensor, vocab_size: int, tensor_group: dist.ProcessGroup | None
) -> slice[int]:
    """Return the global ids of this rank's real columns; an empty slice where it holds padding alone."""
    rank = dist.get_rank(tensor_group) if tensor_group is not None else 0
    first = rank * logits.size(-1)
    return slice(first, max(first, min(first + logits.size(-1), vocab_size)))


def sequence_first(x: torch.Tensor) -> torch.Tensor:
    """Reorder [B, L, ...] to [T, ...], in the order of megatron-core's logits [L, B, V/tp]."""
    return x.transpose(0, 1).flatten(0, 1)


class Objective:
    """What the model's last stage computes from its logits [L, B, V_pad / tp] and a batch [B, L].

    Calling it gives the sums over the micro-batch's tokens of the terms that `term_names` lists, each times the token's
    weight (`TokenBatch.weights`), fp32; the first is differentiable, the others are reported.

    Args:
        config: of the loss at every step.
        vocab_size: V.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        decay_left: of the learning rate, by step; see `value_at`. None: the rate does not decay.
        logit_cap: the model's logits are this times tanh(z / this) of the z that come in; None for z themselves.
    """

    TERMS = ("loss", *ALWAYS_REPORTED)
    """Reported always: the loss as weighted, the unweighted cross-entropy and divergence."""

    takes_hidden = False
    """Whether `from_hidden` is to be called, without logits."""

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
        decay_left: Callable[[int], float] | None = None,
        logit_cap: float | None = None,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.tensor_group = tensor_group
        self.decay_left = decay_left or (lambda step: 1.0)
        self.logit_cap = logit_cap or 0.0
        self.begin_step(1)

    def begin_step(self, step: int) -> None:
        """Take the settings of optimizer step `step`, counted from 1 over the whole run, resumed or not."""
        settings = self.config.at(step, self.decay_left(step))
        self.settings = replace(settings, logit_cap=self.logit_cap)

    @property
    def moving(self) -> dict[str, float]:
        """The settings of this step that are not those of every step, by their key in a recipe."""
        return {name: getattr(self.settings, name) for name in self.config.moving}

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of the terms: `TERMS`, and what else is trained, such as `z`."""
        trained = (
            term
            for term, weight in TERMS.items()
            if term not in ALWAYS_REPORTED and extremes(getattr(self.config, weight))[1]
        )
        return (*self.TERMS, *trained)

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of the terms over the tokens of one micro-batch."""
        raise NotImplementedError

    def summed(
        self, loss: torch.Tensor, terms: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Add up the terms: the loss, fp32[T] or summed with its weights, and all other ones, fp32[3, T].

        `weights` fp32[T] are those of the tokens; None is 1.
        """
        if weights is not None:
            terms = terms * weights
            if loss.ndim:
                loss = loss * weights
        every = dict(zip(TERMS, terms.unbind(0), strict=True))
        wanted = torch.stack([every[name] for name in self.term_names[1:]])
        return torch.cat((loss.sum().reshape(1), wanted.sum(dim=1)))
