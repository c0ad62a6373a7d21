"""Cross-entropy + sparse KL on vocab-parallel logits: one autograd function, two small all-reduces.

Shapes: T tokens, K kept entries, V real vocabulary, V_pad padded vocabulary.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.sparse_kd import reference
from distill_pretrain.kernels.sparse_kd.targets import (
    Residual,
    RowTargets,
    confidence,
    prepare_targets,
)
from distill_pretrain.losses.terms import (
    Objective,
    TokenWeighting,
    Weights,
    column_slice,
    sequence_first,
)


class _SparseKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        targets: RowTargets | None,
        kd_weight: torch.Tensor | float,
        weights: Weights,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = column_slice(logits, vocab_size, tensor_group)
        picks = reference.pick_columns(
            labels,
            targets,
            first_column=columns.start,
            num_columns=columns.stop - columns.start,
        )
        real = logits[:, : columns.stop - columns.start]
        maxima = reference.row_max(real)
        if tensor_group is not None:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tensor_group)
        base, sums = reference.row_sums(
            real,
            maxima,
            picks,
            temperature=weights.temperature,
            outside=targets is not None and targets.bucket is not None,
            total=targets is not None and targets.floor is not None,
        )
        if tensor_group is not None:
            dist.all_reduce(sums, group=tensor_group)
        ce, lse = reference.label_terms(sums, maxima, labels)
        kl = torch.zeros_like(ce)
        if targets is not None:
            kl = reference.sparse_kl(
                sums, targets, temperature=weights.temperature, vocab_size=vocab_size
            )
        scalars = reference.row_scalars(
            sums,
            labels,
            lse,
            targets,
            ce_weight=weights.ce_weight,
            kd_weight=kd_weight,
            z_loss=weights.z_loss,
            temperature=weights.temperature,
            vocab_size=vocab_size,
        )
        ctx.save_for_backward(
            base,
            sums,
            *(getattr(picks, field.name) for field in fields(picks)),
            *(getattr(scalars, field.name) for field in fields(scalars)),
        )
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        ctx.temperature = weights.temperature
        loss = weights.ce_weight * ce + kd_weight * kl
        if weights.z_loss:
            loss = loss + weights.z_loss * lse.square()
        return loss, torch.stack((ce, kl, lse.square()))

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        base, sums, *rest = ctx.saved_tensors
        num_picks = len(fields(reference.Picks))
        # What was saved becomes the gradient; autograd's version counter refuses a second backward.
        grad = reference.gradient_(
            base,
            sums,
            reference.Picks(**_named(reference.Picks, rest[:num_picks])),
            reference.RowScalars(**_named(reference.RowScalars, rest[num_picks:])),
            grad_loss,
            temperature=ctx.temperature,
        )
        padding = ctx.logits_shape[-1] - grad.size(-1)
        if padding:
            grad = torch.nn.functional.pad(grad, (0, padding))
        return (grad.to(ctx.logits_dtype), *[None] * 6)


def _named(kind: Any, values: Any) -> dict[str, Any]:
    return {field.name: value for field, value in zip(fields(kind), values, strict=True)}


def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None,
    *,
    ce_weight: float,
    kd_weight: float,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    residual: Residual = "drop",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weighting: TokenWeighting = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss and its terms; the formulas are in kernels/sparse_kd/README.md.

    Args:
        logits: fp32, bf16 or fp16 [T, V_pad / tp], this rank's columns.
        labels: int64[T], negative where there is none.
        targets: ids int64[T, K], distinct within a row but for the padding -1, probs fp32[T, K]; None trains
            on the labels alone.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the KL.
        vocab_size: V; columns from V on carry no mass and get no gradient.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        temperature: tau, of student and targets in the KL.
        temperature_squared: multiply the KL by tau^2 in the loss.
        residual: what becomes of the mass that a target lacks.
        smoothing: a; targets become (1 - a) t + a / V.
        z_loss: weight of (log sum exp z)^2 where there is a label.
        token_weighting: "teacher_confidence" multiplies a token's KL, in the loss, by its largest stored probability.

    Returns:
        loss fp32[T] (differentiable once), and fp32[3, T]: CE, KL (at tau, without kd_weight, tau^2 and token weight)
        and (log sum exp z)^2, unweighted and not differentiable.

    Raises:
        ConfigError: K is above the kernel's limit.
    """
    if targets is not None and targets.ids.shape[:-1] != labels.shape:
        raise ValueError(
            f"targets {tuple(targets.ids.shape)} do not fit labels {tuple(labels.shape)}"
        )
    weights = Weights(
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        temperature=temperature,
        temperature_squared=temperature_squared,
        smoothing=smoothing,
        z_loss=z_loss,
        token_weighting=token_weighting,
    )
    prepared = None
    scale: torch.Tensor | float = weights.kd_scale
    if targets is not None:
        require_entries_fit(targets.ids.size(-1), where="the targets of a micro-batch")
        prepared = prepare_targets(
            targets,
            labels,
            vocab_size=vocab_size,
            temperature=temperature,
            residual=residual,
            smoothing=smoothing,
        )
        if token_weighting == "teacher_confidence":
            scale = scale * confidence(targets)
    loss, terms = _SparseKD.apply(
        logits, labels, prepared, scale, weights, vocab_size, tensor_group
    )
    return loss, terms.detach()


class DistillationObjective(Objective):
    """Cross-entropy + KL from cached targets, summed over a micro-batch: what the model's last stage computes.

    Args:
        vocab_size: V.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        residual: what becomes of the mass that a target lacks.
        weights: fields of `WeightSchedule`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
        residual: Residual = "drop",
        **weights: Any,
    ) -> None:
        super().__init__(vocab_size=vocab_size, tensor_group=tensor_group, **weights)
        self.residual = residual

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of the terms over the tokens of one micro-batch; see `Objective`."""
        targets = batch.targets
        if targets is not None:
            targets = SparseTargets(
                ids=sequence_first(targets.ids), probs=sequence_first(targets.probs)
            )
        loss, terms = sparse_kd_loss(
            logits.flatten(0, 1),
            sequence_first(batch.labels),
            targets,
            vocab_size=self.vocab_size,
            tensor_group=self.tensor_group,
            residual=self.residual,
            **vars(self.weights),
        )
        return self.summed(loss, terms)


def require_entries_fit(num_entries: int, *, where: object) -> None:
    """Raise ConfigError where rows may have more entries than the kernel takes."""
    if num_entries > reference.MAX_ENTRIES:
        raise ConfigError(
            "more target entries per token than the loss kernel takes",
            where=where,
            found=num_entries,
            expected=f"at most {reference.MAX_ENTRIES}",
            remedy="capture with a smaller capture.num_draws, or train with objective.target=teacher",
        )
