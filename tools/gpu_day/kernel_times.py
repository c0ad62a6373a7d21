"""The loss's kernels on this GPU: errors against float64, then milliseconds beside the ones that were predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_kernels import make_loss, make_targets, timed
from figures import end_without_gpu, is_tiny, record
from kernel_budget import SHAPES, STAGES, Card, predicted_ms

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.sparse_kd import stages

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED_ROWS, ROUNDS = 64, 20


def expected(
    logits: torch.Tensor, labels: torch.Tensor, targets: SparseTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.3 CE + 0.7 KL of each row, and the gradient of their sum, in float64."""
    z = logits.double().requires_grad_()
    log_p = z.log_softmax(-1)
    probs = targets.probs.double()
    cross = (probs * log_p.gather(1, targets.ids.long())).sum(-1)
    kl = torch.special.xlogy(probs, probs).sum(-1) - cross
    losses = 0.7 * kl - 0.3 * log_p.gather(1, labels[:, None])[:, 0]
    losses.sum().backward()
    assert z.grad is not None
    return losses.detach(), z.grad


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def errors(dtype: torch.dtype, rows: int, columns: int, **how: Any) -> dict[str, dict[str, float]]:
    """Relative distances from float64: of the three stages, and of all in one pass.

    `how` goes to the makers: `device`, and `backend` of the loss.
    """
    torch.manual_seed(1)
    labels, targets = make_targets(rows, columns, how["device"])
    logits = (torch.randn(rows, columns, device=how["device"]) * 3).to(dtype)
    loss = make_loss(labels, targets, columns, how["backend"])
    losses, gradient = expected(logits, labels, targets)

    in_stages = logits.clone()
    seen = stages.forward(in_stages, loss)
    stages.gradient_(in_stages, loss, seen.saved, torch.ones_like(seen.losses))
    in_one = logits.clone()
    fused_losses, _ = stages.loss_and_gradient_(in_one, loss)
    return {
        "stages": {
            "loss_error": distance(seen.losses, losses),
            "gradient_error": distance(in_stages, gradient),
        },
        "fused": {
            "loss_error": distance(fused_losses, losses),
            "gradient_error": distance(in_one, gradient),
        },
    }


def times(rows: int, columns: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Milliseconds of a copy and of each stage, in turns, each after a copy that is not measured."""
    original = (torch.randn(rows, columns, device="cuda") * 3).to(dtype)
    logits = torch.empty_like(original)
    labels, targets = make_targets(rows, columns)
    loss = make_loss(labels, targets, columns)
    saved = stages.forward(original, loss).saved
    ones = torch.ones(rows, device="cuda")
    actions: dict[str, Callable[[], Any]] = {
        "copy": lambda: logits.copy_(original),
        "row_statistics": lambda: stages.forward(logits, loss),
        "gradient": lambda: stages.gradient_(logits, loss, saved, ones),
        "fused": lambda: stages.loss_and_gradient_(logits, loss),
    }
    found: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(ROUNDS + 3):
        for name, action in actions.items():
            logits.copy_(original)
            ms = timed(action)
            if number >= 3:
                found[name].append(ms)
    return found


def record_times(dtype_name: str, rows: int, columns: int, card: Card | None) -> None:
    found = times(rows, columns, DTYPES[dtype_name])
    size = DTYPES[dtype_name].itemsize
    copied = 2 * rows * columns * size / statistics.median(found["copy"]) / 1e6
    shape = {"dtype": dtype_name, "rows": rows, "columns": columns}
    record("copy", gb_per_s=round(copied), **shape)
    for kernel in STAGES:
        ms = statistics.median(found[kernel])
        record(
            "kernel",
            kernel=kernel,
            **shape,
            ms=round(ms, 4),
            fastest_ms=round(min(found[kernel]), 4),
            predicted_ms=predicted_ms(kernel, dtype_name, rows, columns, card),
            gb_per_s=round(STAGES[kernel] * rows * columns * size / ms / 1e6),
        )


def main() -> None:
    shapes = ((64, 1000),) if is_tiny() else SHAPES
    end_without_gpu()
    card = Card.named(torch.cuda.get_device_name())
    for name, dtype in DTYPES.items():
        for _, columns in shapes:
            of = errors(dtype, CHECKED_ROWS, columns, device="cuda", backend="cuda")
            for way, found in of.items():
                record("error", kernel=way, dtype=name, columns=columns, **found)
    for name in DTYPES:
        for rows, columns in shapes:
            record_times(name, rows, columns, card)


if __name__ == "__main__":
    main()
