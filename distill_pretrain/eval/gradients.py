"""Mean distillation gradients under cached targets, against the one under the teacher's whole distribution (FullKD).

Unbiased targets add noise that averages out over more batches: the angle to FullKD falls. Truncated targets point
elsewhere: the angle stays (arXiv 2503.16870, section 3 and appendix).

Shapes: B sequences of a micro-batch, L positions, T labelled positions, K stored entries of a position, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from distill_pretrain.contracts import LogitsEngine, SparseTargets
from distill_pretrain.kernels.sparse_kd.settings import LossSettings, Residual
from distill_pretrain.losses.sparse_kd import sparse_kd_loss

_FULL = None
"""Stands for FullKD where caches have names."""


class DifferentiableModel(Protocol):
    """A student whose logits have gradients."""

    vocab_size: int
    """V: real vocabulary of the logits."""

    device: torch.device

    parameters: Sequence[torch.Tensor]
    """What the gradients are taken by."""

    def logits_with_grad(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute next-token logits, float32[B, L, V], for tokens int64[B, L], on the autograd tape."""
        ...


@dataclass(frozen=True, kw_only=True)
class GradientBatch:
    """One micro-batch with the targets of every cache.

    Attributes:
        tokens: int64[B, L].
        labels: int64[B, L], -100 where there is none.
        targets: name of the cache -> stored targets [B, L, K].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    targets: Mapping[str, SparseTargets]


def compare_gradients(
    student: DifferentiableModel,
    teacher: LogitsEngine,
    batches: Iterable[GradientBatch],
    *,
    num_batches: Sequence[int],
    residual: Residual = "drop",
    progress: Callable[[int], None] = lambda batches: None,
) -> dict[str, list[dict[str, Any]]]:
    """Compare every cache's mean gradient with FullKD's, in angle and size, over growing numbers of micro-batches.

    Both are gradients of the mean over the same labelled positions of KL(target || student), by all parameters; a row
    for n takes the first n micro-batches.

    Args:
        student: where the gradients are taken.
        teacher: its whole distribution is FullKD's target.
        batches: at least max(num_batches) of them, all with the same caches.
        num_batches: numbers of micro-batches to report at.
        residual: what becomes of the mass that a target lacks.
        progress: called with 1 after every micro-batch.

    Returns:
        Name of the cache -> rows {"num_batches", "num_positions", "angle_degrees", "norm_ratio"} by ascending number;
        norm_ratio is cache over FullKD; both are None where a gradient is zero.
    """
    wanted = sorted(set(num_batches))
    sums: dict[str | None, list[torch.Tensor]] = {}
    result: dict[str, list[dict[str, Any]]] = {}
    num_positions = 0
    for number, batch in enumerate(batches, start=1):
        num_positions += int((batch.labels >= 0).sum())
        for name, gradient in _gradients(student, teacher, batch, residual):
            _add(sums.setdefault(name, _zeros(student.parameters)), gradient)
        if number in wanted:
            for name in batch.targets:
                compared = _compare(sums[name], sums[_FULL])
                row = {"num_batches": number, "num_positions": num_positions, **compared}
                result.setdefault(name, []).append(row)
        progress(1)
        if number == wanted[-1]:
            return result
    raise AssertionError(f"fewer than {wanted[-1]} micro-batches")


def _gradients(
    student: DifferentiableModel, teacher: LogitsEngine, batch: GradientBatch, residual: Residual
) -> Iterator[tuple[str | None, Sequence[torch.Tensor | None]]]:
    """Name of the target and gradient of the summed KL by every parameter: FullKD's, then each cache's."""
    tokens, labels = batch.tokens.to(student.device), batch.labels.to(student.device)
    valid = labels >= 0
    logits = student.logits_with_grad(tokens)
    losses = _losses(student, teacher, tokens, labels, batch.targets, residual)
    for place, (name, loss) in enumerate(losses, start=1):
        leaf = logits.detach()[valid].requires_grad_()
        outer = torch.zeros_like(logits)
        outer[valid] = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
        # One forward pass serves all targets: only the gradient that enters at the logits differs.
        yield (
            name,
            torch.autograd.grad(
                logits,
                student.parameters,
                outer,
                retain_graph=place <= len(batch.targets),
                allow_unused=True,
            ),
        )


def _losses(
    student: DifferentiableModel,
    teacher: LogitsEngine,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    targets: Mapping[str, SparseTargets],
    residual: Residual,
) -> Iterator[tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]]:
    """Name of the target, and its loss fp32[T] as a function of logits [T, V], over the labelled positions."""
    valid = labels >= 0
    with torch.no_grad():
        teacher_logits = teacher.logits(tokens.to(teacher.device)).to(student.device)[valid]
    yield _FULL, partial(dense_kl, teacher_logits=teacher_logits)
    for name, stored in targets.items():
        kept = SparseTargets(
            ids=stored.ids.to(student.device)[valid], probs=stored.probs.to(student.device)[valid]
        )
        yield (
            name,
            partial(
                _sparse_kl,
                labels=labels[valid],
                targets=kept,
                vocab_size=student.vocab_size,
                residual=residual,
            ),
        )


def _zeros(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]


def _add(totals: Sequence[torch.Tensor], parts: Sequence[torch.Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total += part


def dense_kl(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Compute KL(teacher || student) per position, float32[T], from logits float32[T, V] of both."""
    log_t = torch.log_softmax(teacher_logits.float(), -1)
    log_p = torch.log_softmax(logits.float(), -1)
    return (log_t.exp() * (log_t - log_p)).sum(-1)


def _sparse_kl(
    logits: torch.Tensor,
    *,
    labels: torch.Tensor,
    targets: SparseTargets,
    vocab_size: int,
    residual: Residual,
) -> torch.Tensor:
    loss, _ = sparse_kd_loss(
        logits,
        labels,
        targets,
        LossSettings(ce_weight=0.0, kd_weight=1.0, residual=residual),
        vocab_size=vocab_size,
        tensor_group=None,
    )
    return loss


def _compare(
    found: Sequence[torch.Tensor], full: Sequence[torch.Tensor]
) -> dict[str, float | None]:
    """Angle in degrees and ratio of the norms of two gradients."""
    dot = _dot(found, full)
    norms = math.sqrt(_dot(found, found)), math.sqrt(_dot(full, full))
    if 0.0 in norms:
        return {"angle_degrees": None, "norm_ratio": None}
    cosine = max(-1.0, min(1.0, dot / (norms[0] * norms[1])))
    return {"angle_degrees": math.degrees(math.acos(cosine)), "norm_ratio": norms[0] / norms[1]}


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pairs)
