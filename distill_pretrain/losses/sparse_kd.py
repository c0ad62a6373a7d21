"""Cross-entropy + sparse KL on vocab-parallel logits: one autograd function, two small all-reduces.

Shapes: T tokens, K kept entries, V real vocabulary, V_pad padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.kernels.sparse_kd import reference


class _SparseKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        target_ids: torch.Tensor | None,
        target_probs: torch.Tensor | None,
        ce_weight: float,
        kd_weight: float,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rank = dist.get_rank(tensor_group) if tensor_group is not None else 0
        first_column = rank * logits.size(-1)
        num_columns = max(0, min(logits.size(-1), vocab_size - first_column))
        targets = None
        if target_ids is not None and target_probs is not None:
            targets = SparseTargets(ids=target_ids, probs=target_probs)
        picks = reference.pick_columns(
            labels,
            targets,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            first_column=first_column,
            num_columns=num_columns,
        )
        real = logits[:, :num_columns]
        maxima = reference.row_max(real)
        if tensor_group is not None:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tensor_group)
        exponentials, sums = reference.shifted_sums(real, maxima, picks)
        if tensor_group is not None:
            dist.all_reduce(sums, group=tensor_group)
        ce, kl = reference.per_token_terms(sums, labels, targets)
        ctx.save_for_backward(exponentials, sums, picks.columns, picks.owned, picks.weights)
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        return ce_weight * ce + kd_weight * kl, torch.stack((ce, kl))

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        exponentials, sums, columns, owned, weights = ctx.saved_tensors
        picks = reference.Picks(columns=columns, owned=owned, weights=weights)
        # The saved exponentials become the gradient; autograd's version counter refuses a second backward.
        grad = reference.gradient_(exponentials, sums[:, 0], picks, grad_loss)
        padding = ctx.logits_shape[-1] - grad.size(-1)
        if padding:
            grad = torch.nn.functional.pad(grad, (0, padding))
        return (grad.to(ctx.logits_dtype), *[None] * 7)


def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None,
    *,
    ce_weight: float,
    kd_weight: float,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss and its terms.

    Args:
        logits: fp32, bf16 or fp16 [T, V_pad / tp], this rank's columns.
        labels: int64[T], negative where there is none.
        targets: ids int64[T, K], distinct within a row but for the padding -1, probs fp32[T, K]; None trains
            on the labels alone.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the KL.
        vocab_size: V; columns from V on carry no mass and get no gradient.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.

    Returns:
        loss fp32[T] (differentiable once), and fp32[2, T]: unweighted CE and KL (not differentiable).
    """
    if targets is not None and targets.ids.shape[:-1] != labels.shape:
        raise ValueError(
            f"targets {tuple(targets.ids.shape)} do not fit labels {tuple(labels.shape)}"
        )
    loss, terms = _SparseKD.apply(
        logits,
        labels,
        None if targets is None else targets.ids,
        None if targets is None else targets.probs,
        ce_weight,
        kd_weight,
        vocab_size,
        tensor_group,
    )
    return loss, terms.detach()


class DistillationObjective:
    """ce_weight * CE + kd_weight * KL, summed over a micro-batch: what the model's last stage computes."""

    TERMS = ("loss", "ce", "kl")

    def __init__(
        self,
        *,
        ce_weight: float,
        kd_weight: float,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.vocab_size = vocab_size
        self.tensor_group = tensor_group

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of (loss, CE, KL) over the tokens of one micro-batch, fp32[3]; only the loss is differentiable."""
        loss, terms = sparse_kd_loss(
            logits,
            batch.labels,
            batch.targets,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            vocab_size=self.vocab_size,
            tensor_group=self.tensor_group,
        )
        return torch.cat((loss.sum().reshape(1), terms.sum(dim=1)))
