"""LM head and loss as one operation of torch, differentiable once.

The gradients are made in the forward pass and multiplied by the incoming one in the backward pass: that holds for the
sum over tokens, not for losses that are weighted afterwards.
"""

from __future__ import annotations

import typing

import torch

from distill_pretrain.kernels.chunked_head.head import head_and_loss
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.op import Argument, Context, flattened, unflattened
from distill_pretrain.kernels.sparse_kd.settings import TERMS


def chunked_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    loss: Loss,
    *,
    chunk_tokens: int,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the summed loss of hidden states [T, H] under an LM head [n, H], by every setting of `Loss`.

    With a group in `loss`, every rank of it calls this; the gradient by the hidden states is then this rank's part of
    a sum. The losses are summed with `row_weights` fp32[T]; None is 1.

    Returns:
        the loss summed over the tokens, fp32[], and unweighted terms fp32[3, T] without a gradient.
    """
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    summed, terms, *_ = _chunked_head(
        hidden,
        weight,
        *flattened(loss),
        row_weights,
        chunk_tokens,
        needed,
    )
    return summed, terms.detach()


@torch.library.custom_op("distill_pretrain::chunked_head", mutates_args=())
def _chunked_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    floor: torch.Tensor | None,
    bucket: torch.Tensor | None,
    kd_scale: torch.Tensor | None,
    vocab_size: int,
    numbers: typing.Sequence[float],
    form: str,
    group: str | None,
    backend: str,
    row_weights: torch.Tensor | None,
    chunk_tokens: int,
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = unflattened(
        *(labels, ids, probs, floor, bucket, kd_scale),
        *(vocab_size, numbers, form, group, backend),
    )
    losses, terms, grad_hidden, grad_weight = head_and_loss(
        hidden,
        weight,
        loss,
        chunk_tokens=chunk_tokens,
        with_gradients=with_gradients,
        row_weights=row_weights,
    )
    if row_weights is not None:
        losses = losses * row_weights
    return losses.sum(), terms, grad_hidden, grad_weight


@_chunked_head.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *settings: Argument) -> tuple[torch.Tensor, ...]:
    *_, with_gradients = settings
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((len(TERMS), hidden.size(0)), dtype=torch.float32),
        torch.empty_like(hidden) if with_gradients else hidden.new_empty(0),
        torch.empty_like(weight) if with_gradients else weight.new_empty(0),
    )


def _save(ctx: Context, inputs: tuple[Argument, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.num_others = len(inputs) - 2


def _backward(
    ctx: Context, grad_loss: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("the loss is differentiable once: call backward without create_graph")
    # In place: autograd's version counter refuses a second backward.
    gradients = ctx.saved_tensors
    nothing = (None,) * ctx.num_others
    if grad_loss is None:
        return (None, None, *nothing)
    return (*(gradient.mul_(grad_loss) for gradient in gradients), *nothing)


_chunked_head.register_autograd(_backward, setup_context=_save)
