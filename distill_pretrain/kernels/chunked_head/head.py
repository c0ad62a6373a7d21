"""LM head and loss in one pass over chunks of tokens; the gradients are made with the loss.

Shapes: T tokens, H hidden size, n = V_pad/tp local vocabulary columns, C tokens of a chunk.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.settings import TERMS
from distill_pretrain.kernels.sparse_kd.stages import forward, loss_and_gradient_

BLOCK_ELEMENTS = 1 << 24
"""Size of the fp32 copies where a product with fp32 sums has to be made from them."""


class HeadResult(NamedTuple):
    """What one pass over the tokens gives.

    Attributes:
        losses: fp32[T].
        terms: fp32[3, T].
        grad_hidden: [T, H], of the summed loss by the hidden states, this rank's columns' part; empty if not wanted.
        grad_weight: [n, H], of the summed loss by the weight; empty if not wanted.
    """

    losses: torch.Tensor
    terms: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def head_and_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    loss: Loss,
    *,
    chunk_tokens: int,
    with_gradients: bool,
    row_weights: torch.Tensor | None = None,
) -> HeadResult:
    """Compute the loss of the logits `hidden @ weight.T`, and its gradients.

    Logits take [C, n] in the dtype of `hidden`; the weight's gradient is summed in fp32 and rounded once.

    Args:
        hidden: [T, H].
        weight: [n, H], of the same dtype.
        loss: of all T tokens.
        chunk_tokens: the most C may be; chunks are of equal length.
        with_gradients: whether to make them.
        row_weights: fp32[T], of the losses in the sum that the gradients are of; None for 1.
    """
    num_tokens = len(hidden)
    size = math.ceil(num_tokens / max(1, math.ceil(num_tokens / chunk_tokens)))
    logits = hidden.new_empty(size, len(weight))
    losses = hidden.new_empty(num_tokens, dtype=torch.float32)
    terms = hidden.new_empty(len(TERMS), num_tokens, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if with_gradients else hidden.new_empty(0)
    grad_weight = hidden.new_empty(0)
    if with_gradients:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for first in range(0, num_tokens, max(1, size)):
        rows = slice(first, min(first + size, num_tokens))
        chunk = logits[: rows.stop - first]
        torch.mm(hidden[rows], weight.t(), out=chunk)
        if not with_gradients:
            losses[rows], terms[:, rows], *_ = forward(chunk, loss.rows(rows))
            continue
        weights = None if row_weights is None else row_weights[rows]
        losses[rows], terms[:, rows] = loss_and_gradient_(chunk, loss.rows(rows), weights)
        torch.mm(chunk, weight, out=grad_hidden[rows])
        _add_product_(grad_weight, chunk, hidden[rows])
    return HeadResult(losses, terms, grad_hidden, grad_weight.to(weight.dtype))


def _add_product_(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add gradient [C, n] transposed times hidden [C, H] to total fp32[n, H], all sums in fp32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    elif gradient.is_cuda and _adds_in_fp32(gradient.device, gradient.dtype):
        _addmm_fp32_(total, gradient, hidden)
    else:
        columns = max(1, BLOCK_ELEMENTS // max(1, len(gradient)))
        exact = hidden.float()
        for some, part in zip(
            torch.split(total, columns), torch.split(gradient, columns, dim=1), strict=True
        ):
            some.addmm_(part.t().float(), exact)


def _addmm_fp32_(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """One product of low-precision matrices that adds to an fp32 one: the BLAS can, torch has it since 2.8."""
    torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)


@cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has that product, on this device."""
    try:
        rows = torch.ones(16, 16, dtype=dtype, device=device)
        total = torch.ones(16, 16, device=device)
        _addmm_fp32_(total, rows, rows)
        return bool((total == 17).all())
    except (RuntimeError, TypeError):
        return False
