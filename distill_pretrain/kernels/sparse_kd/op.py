"""The loss as an operation of torch: differentiable once, its gradient written over the logits.

`torch.ops.distill_pretrain.sparse_kd` works under torch.compile(fullgraph=True) and activation checkpointing.
"""

from __future__ import annotations

import typing
from typing import Protocol, cast

import torch

from distill_pretrain.kernels.cuda.backend import Backend
from distill_pretrain.kernels.sparse_kd import stages
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.settings import TERMS, Form, LossSettings
from distill_pretrain.kernels.sparse_kd.targets import RowTargets

_NUM_TENSORS = 7

Argument = torch.Tensor | int | str | typing.Sequence[float] | None
"""Of an operation of torch."""


class Context(Protocol):
    """What autograd keeps between the passes of an operation."""

    saved_tensors: tuple[torch.Tensor, ...]
    settings: tuple[Argument, ...]
    num_others: int

    def save_for_backward(self, *tensors: Argument) -> None:
        """Keep tensors."""

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Name the outputs that have no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose whether missing gradients become zeros."""


def sparse_kd(logits: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of logits [T, n] by every setting of `Loss`.

    The backward pass writes the gradient over the logits, so a second one is refused, as is one of anything else that
    kept them.

    Returns:
        losses fp32[T], and terms fp32[3, T]: those of `settings.TERMS`, unweighted and without a gradient.
    """
    losses, terms, *_ = _sparse_kd(logits, *flattened(loss))
    return losses, terms.detach()


@torch.library.custom_op("distill_pretrain::sparse_kd", mutates_args=())
def _sparse_kd(
    logits: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = unflattened(
        *(labels, ids, probs, floor, bucket, kd_scale),
        *(vocab_size, numbers, form, group, backend),
    )
    losses, terms, saved = stages.forward(logits, loss)
    return losses, terms, *saved


@_sparse_kd.register_fake
def _(
    logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor | None, *_: Argument
) -> tuple[torch.Tensor, ...]:
    num_rows, num_picks = logits.size(0), 1 + (0 if ids is None else ids.size(1))
    shapes = (
        (num_rows,),
        (len(TERMS), num_rows),
        (num_rows, stages.ROW_NUMBERS),
        (num_rows, num_picks),
        (num_rows, num_picks),
    )
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("distill_pretrain::sparse_kd_gradient_", mutates_args=("logits",))
def _sparse_kd_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    floor: torch.Tensor | None,
    bucket: torch.Tensor | None,
    kd_scale: torch.Tensor | None,
    saved_of_rows: torch.Tensor,
    saved_of_picks: torch.Tensor,
    saved_of_targets: torch.Tensor,
    grad_losses: torch.Tensor,
    vocab_size: int,
    numbers: typing.Sequence[float],
    form: str,
    group: str | None,
    backend: str,
) -> None:
    loss = unflattened(
        *(labels, ids, probs, floor, bucket, kd_scale),
        *(vocab_size, numbers, form, group, backend),
    )
    # The backend of the forward pass came with the settings: it alone knows what it saved.
    saved = stages.SAVED[loss.backend](saved_of_rows, saved_of_picks, saved_of_targets)
    stages.gradient_(logits, loss, saved, grad_losses)


@_sparse_kd_gradient_.register_fake
def _(*_: Argument) -> None:
    return None


def flattened(loss: Loss) -> tuple[Argument, ...]:
    """Write a loss as the arguments of an operation: torch takes tensors and numbers alone."""
    targets = loss.targets
    return (
        loss.labels,
        *(
            (None, None, None, None)
            if targets is None
            else (targets.ids, targets.probs, targets.floor, targets.bucket)
        ),
        loss.kd_scale,
        loss.vocab_size,
        loss.settings.numbers,
        loss.form,
        loss.group,
        loss.backend,
    )


def unflattened(
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
) -> Loss:
    """Return the loss that was `flattened`."""
    targets = None
    if ids is not None:
        assert probs is not None
        targets = RowTargets(ids=ids, probs=probs, floor=floor, bucket=bucket)
    return Loss(
        labels=labels,
        targets=targets,
        kd_scale=kd_scale,
        vocab_size=vocab_size,
        settings=LossSettings.of_numbers(numbers),
        form=cast(Form, form),
        group=group,
        backend=cast(Backend, backend),
    )


def _save(ctx: Context, inputs: tuple[Argument, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, *for_gradient = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *for_gradient)
    ctx.settings = inputs[_NUM_TENSORS:]


def _backward(
    ctx: Context, grad_losses: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("the loss is differentiable once: call backward without create_graph")
    # Autograd's version counter refuses a second backward here.
    logits, *saved = ctx.saved_tensors
    nothing = (None,) * (_NUM_TENSORS - 1 + len(ctx.settings))
    if grad_losses is None:
        return (None, *nothing)
    _sparse_kd_gradient_(logits, *saved, grad_losses, *ctx.settings)
    return (logits.detach(), *nothing)


_sparse_kd.register_autograd(_backward, setup_context=_save)
