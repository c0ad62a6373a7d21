"""Cross-entropy + a divergence from a teacher that runs in the same job, over the whole vocabulary (FullKD).

Shapes: B sequences, L positions, T = L * B tokens, R rows of one chunk, V real vocabulary, V_pad padded vocabulary,
n this rank's real columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from distill_pretrain.contracts import LogitsEngine, TokenBatch
from distill_pretrain.errors import ConfigError, LossInputError
from distill_pretrain.kernels.sparse_kd.cap import cap_slope, soft_capped
from distill_pretrain.kernels.sparse_kd.divergences import DIVERGENCES
from distill_pretrain.kernels.sparse_kd.settings import TERMS, Divergence, LossSettings
from distill_pretrain.losses.checks import require_columns, require_labels
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.positions import Selection, row_entropies
from distill_pretrain.losses.terms import Objective, column_slice, sequence_first

CHUNK_ELEMENTS = 1 << 22
"""Elements of each temporary [R, n]; at any time there are about ten."""


class _Context(Protocol):
    """What autograd keeps between the passes."""

    saved_tensors: tuple[torch.Tensor, ...]
    logits_dtype: torch.dtype

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _DenseKD(torch.autograd.Function):
    """The gradient is written in the forward pass, sequence by sequence, so that no teacher logits are kept."""

    @staticmethod
    def forward(
        ctx: _Context,
        logits: torch.Tensor,
        labels: torch.Tensor,
        teacher_logits: Callable[[int], torch.Tensor],
        divergence: Divergence,
        settings: LossSettings,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
        selection: Selection | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = column_slice(logits, vocab_size, tensor_group)
        num_columns = columns.stop - columns.start
        grad = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        terms = grad.new_zeros(1 + len(TERMS), *labels.shape)
        rows = max(1, CHUNK_ELEMENTS // max(1, logits.size(-1)))
        for sequence in range(logits.size(1)):
            teacher = teacher_logits(sequence)
            _require_teacher_shape(teacher, logits.size(0), vocab_size)
            chosen = labels[:, sequence] >= 0
            if selection is not None:
                if selection.by == "teacher_entropy":
                    found = row_entropies(teacher[:, :vocab_size], None)
                else:
                    own = logits[:, sequence, :num_columns]
                    found = row_entropies(own, tensor_group, cap=settings.logit_cap)
                chosen = selection.chosen(found.unsqueeze(-1), chosen.unsqueeze(-1)).squeeze(-1)
            teacher = teacher[:, columns]
            for first in range(0, logits.size(0), rows):
                span = slice(first, first + rows)
                student = soft_capped(logits[span, sequence, :num_columns], settings.logit_cap)
                chunk = _Chunk(
                    student,
                    teacher[span].float(),
                    labels[span, sequence],
                    chosen[span],
                    first_column=columns.start,
                    vocab_size=vocab_size,
                    settings=settings,
                    tensor_group=tensor_group,
                )
                gradient = chunk.gradient(divergence)
                if settings.logit_cap:
                    gradient *= cap_slope(student, settings.logit_cap)
                grad[span, sequence, :num_columns] = gradient
                terms[:, span, sequence] = chunk.terms
        ctx.save_for_backward(grad)
        ctx.logits_dtype = logits.dtype
        return terms[0].clone(), terms[1:].clone()

    @staticmethod
    def backward(
        ctx: _Context, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # In place: autograd's version counter refuses a second backward.
        return (grad.mul_(grad_loss.unsqueeze(-1)).to(ctx.logits_dtype), *[None] * 7)


class _Chunk:
    """Some rows of the loss. `gradient` leaves `terms`: loss, CE, divergence, lse^2, fp32[4, R].

    Every rank of the tensor group holds the same rows and makes the same collectives: one for the maxima, one for the
    sums, one for the divergence.
    """

    def __init__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        chosen: torch.Tensor,
        *,
        first_column: int,
        vocab_size: int,
        settings: LossSettings,
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        self.settings = settings
        self.group = tensor_group
        self.labels = labels
        tau, share = settings.temperature, settings.smoothing
        self.has_label = labels >= 0
        self.chosen = chosen
        # Where the teacher is not learnt from, the label is in its place.
        at_label = torch.where(chosen, settings.ce_weight, settings.ce_weight + settings.kd_weight)
        self.ce_weight = torch.where(self.has_label, at_label, 0.0)
        column = labels - first_column
        self.owned = self.has_label & (column >= 0) & (column < student.size(-1))
        self.column = column.masked_fill(~self.owned, 0).unsqueeze(-1)

        maxima = self._reduced(
            torch.stack((_row_max(student), _row_max(teacher)), -1), dist.ReduceOp.MAX
        )
        self.maxima = maxima[:, 0]
        self.shifted = student - maxima[:, :1]
        shifted_teacher = teacher - maxima[:, 1:]
        picked = torch.zeros_like(self.maxima)
        if student.size(-1):
            picked = self.shifted.gather(-1, self.column)[:, 0].masked_fill(~self.owned, 0.0)
        # A label that no rank has: NaN, as with cached targets.
        picked = picked.masked_fill(labels >= vocab_size, math.nan)
        sums = (
            self.shifted.exp().sum(-1),
            (self.shifted / tau).exp().sum(-1),
            (shifted_teacher / tau).exp().sum(-1),
            shifted_teacher.exp().sum(-1),
            picked,
        )
        sums_all = self._reduced(torch.stack(sums, -1), dist.ReduceOp.SUM)
        self.sum_exp, tau_sum, teacher_sum, teacher_plain_sum, self.picked = sums_all.unbind(-1)
        self.log_q = self.shifted / tau - tau_sum.log().unsqueeze(-1)
        self.log_t = shifted_teacher / tau - teacher_sum.log().unsqueeze(-1)
        if share:
            self.log_t = torch.log(self.log_t.exp() * (1.0 - share) + share / vocab_size)
        scale = torch.full_like(self.maxima, settings.kd_scale)
        if settings.token_weighting == "teacher_confidence":
            scale = (
                scale / teacher_plain_sum
            )  # the largest probability of softmax(x) is exp(0) / sum
        self.scale = torch.where(chosen, scale, 0.0)

    def gradient(self, divergence: Divergence) -> torch.Tensor:
        """Return the gradient of the loss by this rank's real columns, fp32[R, n]."""
        values, slope = DIVERGENCES[divergence](self.log_q, self.log_t, self._row_sum)
        values = torch.where(self.chosen, values, 0.0)
        settings = self.settings
        log_sum = self.sum_exp.log()
        ce = torch.where(self.has_label, log_sum - self.picked, 0.0)
        lse = torch.where(self.has_label, log_sum + self.maxima, 0.0)
        loss = self.ce_weight * ce + self.scale * values + settings.z_loss * lse.square()
        self.terms = torch.stack((loss, ce, values, lse.square()))

        at_one = (self.ce_weight + 2.0 * settings.z_loss * lse) / self.sum_exp
        grad = self.shifted.exp().mul_(at_one.unsqueeze(-1))
        grad += slope.mul_((self.scale / settings.temperature).unsqueeze(-1))
        if grad.size(-1):
            at_column = torch.where(self.owned, -self.ce_weight, 0.0).unsqueeze(-1)
            grad.scatter_add_(-1, self.column, at_column)
        # 0 * inf of a row that takes no part.
        return torch.where(self.has_label.unsqueeze(-1), grad, 0.0)

    def _row_sum(self, values: torch.Tensor) -> torch.Tensor:
        """[R, n] -> fp32[R], over all ranks."""
        return self._reduced(values.sum(-1), dist.ReduceOp.SUM)

    def _reduced(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(values, op=operation, group=self.group)
        return values


def _require_teacher_shape(teacher: torch.Tensor, num_rows: int, vocab_size: int) -> None:
    if teacher.ndim != 2 or len(teacher) != num_rows or teacher.size(1) < vocab_size:
        raise LossInputError(
            "the teacher's logits do not fit the student's",
            where="teacher_logits",
            found=tuple(teacher.shape),
            expected=f"[{num_rows}, {vocab_size}]",
        )


def _row_max(rows: torch.Tensor) -> torch.Tensor:
    if rows.size(-1) == 0:
        return rows.new_full(rows.shape[:1], float("-inf"))
    return rows.amax(-1)


def dense_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: Callable[[int], torch.Tensor],
    *,
    divergence: Divergence,
    settings: LossSettings,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the per-token loss and its terms, student softmax(z / tau) against teacher softmax(x / tau).

    A position without a label has no loss at all, as a cache has no target there. Beside the student's logits and
    their gradient in fp32, memory holds one sequence of teacher logits and buffers of `CHUNK_ELEMENTS`.

    Args:
        logits: fp32, bf16 or fp16 [L, B, V_pad / tp], this rank's columns.
        labels: int64[L, B], negative where there is none.
        teacher_logits: gives [L, V], all columns, of one of the B sequences.
        divergence: what is minimised.
        settings: the loss; `residual` plays no part, as no mass is missing.
        vocab_size: V; columns from V on carry no mass and get no gradient.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.

    Returns:
        loss fp32[L, B] (differentiable once), and fp32[3, L, B]: CE, divergence (at tau, without kd_weight, tau^2 and
        token weight) and (log sum exp z)^2, unweighted and not differentiable.

    Raises:
        ConfigError: there is no such divergence.
        LossInputError: logits, labels or the teacher's logits have the wrong shape, or a label is outside the
            vocabulary. That is read here, which waits for a GPU; unchecked, the label's loss is NaN.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(
            "the loss has no such setting",
            where="divergence",
            found=divergence,
            expected=", ".join(DIVERGENCES),
        )
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise LossInputError(
            "the labels do not fit the logits",
            where="labels",
            found=tuple(labels.shape),
            expected=f"[L, B] of logits [L, B, columns], which are {tuple(logits.shape)}",
        )
    require_columns(logits.size(-1), vocab_size, tensor_group)
    require_labels(labels, vocab_size)
    return _dense_kd_loss(
        logits, labels, teacher_logits, divergence, settings, vocab_size, tensor_group
    )


def _dense_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: Callable[[int], torch.Tensor],
    divergence: Divergence,
    settings: LossSettings,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
    selection: Selection | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `dense_kd_loss` of checked arguments, at the positions of `selection`, the label's elsewhere."""
    loss: torch.Tensor
    terms: torch.Tensor
    loss, terms = _DenseKD.apply(  # type: ignore[no-untyped-call]
        logits, labels, teacher_logits, divergence, settings, vocab_size, tensor_group, selection
    )
    return loss, terms.detach()


class TeacherObjective(Objective):
    """Cross-entropy + divergence from a teacher in this process, summed over a micro-batch.

    Args:
        teacher: scores whole sequences; V columns.
        config: of the loss.
        vocab_size: V.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        decay_left: see `Objective`.
        logit_cap: see `Objective`.
    """

    def __init__(
        self,
        teacher: LogitsEngine,
        config: ObjectiveConfig,
        *,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
        decay_left: Callable[[int], float] | None = None,
        logit_cap: float | None = None,
    ) -> None:
        super().__init__(
            config,
            vocab_size=vocab_size,
            tensor_group=tensor_group,
            decay_left=decay_left,
            logit_cap=logit_cap,
        )
        assert teacher.vocab_size == vocab_size, (teacher.vocab_size, vocab_size)
        self.teacher = teacher
        self.selection = Selection.of(config)

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of the terms over the tokens of one micro-batch; see `Objective`."""
        loss, terms = _dense_kd_loss(
            logits,
            batch.labels.transpose(0, 1),
            lambda sequence: self.teacher.logits(batch.tokens[sequence : sequence + 1])[0],
            self.config.divergence,
            self.settings,
            self.vocab_size,
            self.tensor_group,
            # An evaluation compares all positions.
            self.selection if torch.is_grad_enabled() else None,
        )
        weights = None if batch.weights is None else sequence_first(batch.weights)
        return self.summed(loss.flatten(), terms.flatten(1), weights)
