"""What a step's loss costs, in turns, and whether our loss is Megatron-LM's on the same targets.

Shapes: L positions, B sequences, T = B * L, V vocabulary, K entries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import choose_backend
from distill_pretrain.losses.sparse_kd import prepare_loss
from rivals.kept import Kept

ROUNDS = 7
Loss = Callable[[torch.Tensor], torch.Tensor]
"""fp32[T, V] logits, which it may overwrite, to a loss summed or per token."""


def cross_entropy(labels: torch.Tensor) -> Loss:
    """PyTorch's own, of int64[T] labels."""
    return lambda logits: torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def our_loss(kept: Kept | None, labels: torch.Tensor, residual: str) -> Loss:
    """The distillation term alone, as training takes it from a cache: without a look at the values.

    Rounding of stored logarithms, ours and theirs, may take a row's mass a little above 1. Without targets
    cross-entropy with the labels.
    """
    targets = kept and SparseTargets(
        ids=torch.from_numpy(kept.ids).long(), probs=torch.from_numpy(kept.probs).float()
    )
    settings = LossSettings(
        ce_weight=0.0 if kept else 1.0, kd_weight=1.0 if kept else 0.0, residual=residual
    )
    backend = choose_backend("auto", labels.device, None)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        columns = logits.size(-1)
        prepared = prepare_loss(
            labels,
            targets,
            settings,
            vocab_size=columns,
            num_columns=columns,
            tensor_group=None,
            backend=backend,
        )
        return sparse_kd(logits, prepared)[0]

    return loss


def with_gradient(loss: Loss, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Loss, its gradient fp32[T, V], and seconds of processor time of forward and backward."""
    leaf = logits.detach().clone().requires_grad_()
    # Losses may overwrite what they are given, as they do what a model's head made.
    given = leaf.clone()
    start = time.process_time()
    value = loss(given)
    value.sum().backward()
    seconds = time.process_time() - start
    assert leaf.grad is not None
    return value.detach(), leaf.grad, seconds


def costs(losses: Mapping[str, Loss], logits: torch.Tensor, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds per call: median, least and most of some rounds in turns, and the medians over the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name, loss in losses.items():
            taken = with_gradient(loss, logits)[2]
            if number:  # the first warms up
                seconds[name].append(taken)
    base = statistics.median(next(iter(seconds.values())))
    return {
        name: {
            "median_s": statistics.median(row),
            "least_s": min(row),
            "most_s": max(row),
            "ratio": statistics.median(row) / base,
        }
        for name, row in seconds.items()
    }


def difference(one: Loss, other: Loss, logits: torch.Tensor) -> dict[str, float]:
    """Largest difference of two losses per token, relative where they are above 1, and of their gradients."""
    mine, my_gradient, _ = with_gradient(one, logits)
    theirs, their_gradient, _ = with_gradient(other, logits)
    return {
        "loss": float(((mine - theirs.flatten()).abs() / mine.abs().clamp(min=1)).max()),
        "gradient": float((my_gradient - their_gradient).abs().max()),
    }
