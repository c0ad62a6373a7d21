"""The distillation loss for any training loop: over logits, or over hidden states and the LM head's weight.

The formulas are in kernels/sparse_kd/README.md. Plain PyTorch on CPUs, this project's kernels on GPUs that run them.

Shapes: `...` any leading sizes, T positions in all, K target entries, H hidden size, V real vocabulary, C >= V columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, overload

import torch

from distill_pretrain.api.checks import FLOAT_DTYPES, require_tensor
from distill_pretrain.contracts import SparseTargets
from distill_pretrain.errors import ConfigError, LossInputError, require_whole
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.cuda.backend import Implementation
from distill_pretrain.kernels.sparse_kd.launch import source_of
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.settings import TERMS, LossKeywords, LossSettings
from distill_pretrain.losses.backend import choose_backend
from distill_pretrain.losses.checks import require_columns, require_labels, require_targets
from distill_pretrain.losses.config import CHUNK_TOKENS
from distill_pretrain.losses.sparse_kd import prepare_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum", "none"]
Terms = dict[str, torch.Tensor]


@overload
def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = ...,
    reduction: Reduction = ...,
    overwrite_logits: bool = ...,
    check_values: bool = ...,
    implementation: Implementation = ...,
    return_terms: Literal[False] = ...,
    **settings: Unpack[LossKeywords],
) -> torch.Tensor: ...


@overload
def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = ...,
    reduction: Reduction = ...,
    overwrite_logits: bool = ...,
    check_values: bool = ...,
    implementation: Implementation = ...,
    return_terms: Literal[True],
    **settings: Unpack[LossKeywords],
) -> tuple[torch.Tensor, Terms]: ...


def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    overwrite_logits: bool = False,
    check_values: bool = True,
    implementation: Implementation = "auto",
    return_terms: bool = False,
    **settings: Unpack[LossKeywords],
) -> torch.Tensor | tuple[torch.Tensor, Terms]:
    """Compute ce_weight * cross-entropy + kd_weight * KL(targets || softmax(logits)).

    It is differentiable once, by the logits.

    A position whose label is negative has no loss at all. A position without targets has no KL.

    Args:
        logits: fp32, bf16 or fp16 [..., C].
        labels: int64[...], the next tokens; negative, such as -100, where there is none.
        ids: int64[..., K] of the targets, distinct within a row but for the padding -1; None for cross-entropy alone.
        probs: float32[..., K], their probabilities, zero where padded; None with `ids`.
        vocab_size: V; columns from V on are padding, without mass or gradient. None: every column is real.
        reduction: "mean" over the positions that have a label, "sum", or "none" for float32[...].
        overwrite_logits: let the backward pass write the gradient over `logits`, which must then not be read any more;
            otherwise it is written over a copy that the forward pass makes.
        check_values: look at labels, ids and probabilities, which waits for a GPU. Unchecked, a label or id outside the
            vocabulary makes the loss NaN. Under torch.compile values are not looked at.
        implementation: "auto", "reference" (plain PyTorch) or "cuda" (kernels or an error).
        return_terms: also return `ce`, `kl` and `z`, (log sum exp logits)^2: unweighted, reduced alike, no gradient.
        **settings: the loss.
            `ce_weight`: weight of the cross-entropy with the labels; 0 unless given.
            `kd_weight`: weight of the KL; 1 unless given; 0 where there are no targets.
            `temperature`: tau of softmax(logits / tau) and of the targets in the KL; 1.
            `temperature_squared`: multiply the KL by tau^2; True.
            `residual`: where mass that a row's probabilities lack goes: "drop" (the default), "renormalise", "label",
            "ghost", "uniform" or "decoupled".
            `divergence`: with residual "ghost" also "reverse_kl" and "jensen_shannon", over the given ids and one
            bucket of all others; "forward_kl".
            `tail_weight`: with residual "decoupled", weight of the term that tells the given ids from all others; 1.
            `smoothing`: a in [0, 1); targets become (1 - a) t + a / V; 0.
            `z_loss`: weight of (log sum exp logits)^2; 0.
            `token_weighting`: "teacher_confidence" multiplies a position's KL by its largest probability; "none".

    Returns:
        The loss, float32; with `return_terms` also the terms by name.

    Raises:
        LossInputError: shapes, dtypes or devices do not fit; a label or an id is outside the vocabulary; an id is twice
            in a row; a row's probabilities are none, or sum to more than 1.
        ConfigError: a setting is none.
    """
    _require_reduction(reduction, ("mean", "sum", "none"))
    require_tensor("logits", logits, dtypes=FLOAT_DTYPES)
    if logits.ndim < 1:
        require_tensor("logits", logits, dtypes=FLOAT_DTYPES, shape=("...", "C"))
    chosen = _settings(settings)
    rows = _Rows.of(labels, ids, probs, chosen, leading=logits.shape[:-1], device=logits.device)
    loss = rows.loss(
        chosen,
        vocab_size=vocab_size,
        num_columns=logits.size(-1),
        check_values=check_values,
        implementation=implementation,
    )
    is_trained = torch.is_grad_enabled() and logits.requires_grad
    if is_trained and (not overwrite_logits or _is_leafs(logits)):
        logits = logits.clone()
    losses, terms = sparse_kd(logits.reshape(-1, logits.size(-1)), loss)
    losses, terms = rows.with_label(losses), rows.with_label(terms)
    if reduction == "none":
        losses, terms = losses.reshape(labels.shape), terms.reshape(len(TERMS), *labels.shape)
    else:
        losses, terms = rows.reduced(losses.sum(), terms, reduction)
    return (losses, _named(terms)) if return_terms else losses


@overload
def linear_sparse_kd_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    chunk_tokens: int = ...,
    check_values: bool = ...,
    implementation: Implementation = ...,
    return_terms: Literal[False] = ...,
    **settings: Unpack[LossKeywords],
) -> torch.Tensor: ...


@overload
def linear_sparse_kd_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    chunk_tokens: int = ...,
    check_values: bool = ...,
    implementation: Implementation = ...,
    return_terms: Literal[True],
    **settings: Unpack[LossKeywords],
) -> tuple[torch.Tensor, Terms]: ...


def linear_sparse_kd_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    probs: torch.Tensor | None,
    *,
    vocab_size: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_tokens: int = CHUNK_TOKENS,
    check_values: bool = True,
    implementation: Implementation = "auto",
    return_terms: bool = False,
    **settings: Unpack[LossKeywords],
) -> torch.Tensor | tuple[torch.Tensor, Terms]:
    """Compute `sparse_kd_loss` of hidden @ head_weight.T, logits that are never whole; by hidden states and weight.

    The logits of `chunk_tokens` positions exist at a time, and turn into their gradient in the same pass: the memory is
    that of one chunk and of the two gradients, and the backward pass only multiplies these by one number. So there is
    no reduction "none". The weight's gradient is summed in fp32.

    Args:
        hidden: fp32, bf16 or fp16 [..., H], what the LM head takes.
        head_weight: [C, H] of the same dtype: the weight of a linear LM head without bias.
        labels: see `sparse_kd_loss`, as all arguments that are not listed here.
        ids: int64[..., K], or None.
        probs: float32[..., K], or None.
        vocab_size: V; rows of the weight from V on are padding.
        reduction: "mean" over the positions that have a label, or "sum".
        chunk_tokens: positions whose logits exist at a time.
        check_values: look at labels, ids and probabilities.
        implementation: "auto", "reference" or "cuda".
        return_terms: also return `ce`, `kl` and `z`.
        **settings: the loss.

    Returns:
        The loss, float32[]; with `return_terms` also the terms by name.

    Raises:
        LossInputError: see `sparse_kd_loss`; or hidden states and weight do not fit each other.
        ConfigError: a setting is none.
    """
    _require_reduction(reduction, ("mean", "sum"))
    require_whole("chunk_tokens", chunk_tokens, least=1)
    require_tensor("hidden", hidden, dtypes=FLOAT_DTYPES)
    if hidden.ndim < 1:
        require_tensor("hidden", hidden, dtypes=FLOAT_DTYPES, shape=("...", "H"))
    require_tensor(
        "head_weight",
        head_weight,
        dtypes=(hidden.dtype,),
        shape=("C", hidden.size(-1)),
        device=hidden.device,
    )
    chosen = _settings(settings)
    rows = _Rows.of(labels, ids, probs, chosen, leading=hidden.shape[:-1], device=hidden.device)
    loss = rows.loss(
        chosen,
        vocab_size=vocab_size,
        num_columns=head_weight.size(0),
        check_values=check_values,
        implementation=implementation,
    )
    summed, terms = chunked_head(
        hidden.reshape(-1, hidden.size(-1)), head_weight, loss, chunk_tokens=chunk_tokens
    )
    reduced, terms = rows.reduced(summed, rows.with_label(terms), reduction)
    return (reduced, _named(terms)) if return_terms else reduced


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Labels and targets as rows, their shapes and dtypes found sound.

    Attributes:
        labels: int64[T].
        targets: [T, K], or None.
    """

    labels: torch.Tensor
    targets: SparseTargets | None

    @classmethod
    def of(
        cls,
        labels: torch.Tensor,
        ids: torch.Tensor | None,
        probs: torch.Tensor | None,
        settings: LossSettings,
        *,
        leading: torch.Size,
        device: torch.device,
    ) -> _Rows:
        """Labels [...] and targets [..., K] of leading sizes [...]."""
        require_tensor("labels", labels, dtypes=(torch.int64,), shape=tuple(leading), device=device)
        if ids is None and probs is None:
            if settings.kd_weight:
                raise LossInputError(
                    "there are no targets to learn from",
                    where="ids, probs",
                    found=f"None, with kd_weight {settings.kd_weight}",
                    expected="tensors [..., K], or kd_weight 0",
                )
            return cls(labels=labels.reshape(-1), targets=None)
        shape: tuple[int | str, ...] = (*leading, "K")
        require_tensor("ids", ids, dtypes=(torch.int64,), shape=shape, device=device)
        assert ids is not None
        shape = tuple(ids.shape)
        require_tensor("probs", probs, dtypes=(torch.float32,), shape=shape, device=device)
        assert probs is not None
        width = ids.size(-1)
        targets = SparseTargets(
            ids=ids.reshape(labels.numel(), width), probs=probs.reshape(labels.numel(), width)
        )
        return cls(labels=labels.reshape(-1), targets=targets if width else None)

    def loss(
        self,
        settings: LossSettings,
        *,
        vocab_size: int | None,
        num_columns: int,
        check_values: bool,
        implementation: Implementation,
    ) -> Loss:
        """What the kernels compute, its values checked if asked for."""
        size = num_columns if vocab_size is None else vocab_size
        if vocab_size is not None:
            require_whole("vocab_size", vocab_size, least=1)
        require_columns(num_columns, size, None)
        if check_values and not torch.compiler.is_compiling():
            require_labels(self.labels, size)
            if self.targets is not None:
                require_targets(self.targets, self.labels, size)
        loss = prepare_loss(
            self.labels,
            self.targets,
            settings,
            vocab_size=size,
            num_columns=num_columns,
            tensor_group=None,
            backend=choose_backend(
                implementation, self.labels.device, None, source=source_of(settings)
            ),
        )
        if loss.kd_scale is None:
            return loss
        return replace(loss, kd_scale=self.with_label(loss.kd_scale))

    def with_label(self, values: torch.Tensor) -> torch.Tensor:
        """Values [..., T], zero where there is no label."""
        return torch.where(self.labels >= 0, values, 0.0)

    def reduced(
        self, summed: torch.Tensor, terms: torch.Tensor, reduction: Reduction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and the terms [3, T], summed or averaged."""
        totals = terms.sum(-1)
        if reduction == "sum":
            return summed, totals
        count = (self.labels >= 0).sum().clamp(min=1)
        return summed / count, totals / count


def _settings(given: LossKeywords) -> LossSettings:
    """The settings of a call: where nothing is said, distillation alone."""
    keywords: LossKeywords = {"ce_weight": 0.0, "kd_weight": 1.0}
    keywords.update(given)
    return LossSettings(**keywords)


def _named(terms: torch.Tensor) -> Terms:
    return dict(zip(TERMS, terms.unbind(0), strict=True))


def _require_reduction(reduction: str, possible: tuple[str, ...]) -> None:
    if reduction not in possible:
        raise ConfigError(
            "the loss has no such setting",
            where="reduction",
            found=reduction,
            expected=", ".join(possible),
        )


def _is_leafs(logits: torch.Tensor) -> bool:
    """Whether the memory is a leaf's, a parameter's say: its own gradient must not be written over it."""
    base = logits if logits._base is None else logits._base
    return base.is_leaf and base.requires_grad
