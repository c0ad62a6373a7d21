"""Cross-entropy + sparse KL on vocab-parallel logits.

Shapes: T tokens, K kept entries, V real vocabulary, V_pad padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from distill_pretrain.contracts import NO_ENTRY, SparseTargets, TokenBatch
from distill_pretrain.errors import ConfigError, LossInputError
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.cuda.backend import Implementation
from distill_pretrain.kernels.sparse_kd import reference
from distill_pretrain.kernels.sparse_kd.launch import source_of
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.settings import TERMS, LossSettings
from distill_pretrain.kernels.sparse_kd.targets import confidence, prepare_targets
from distill_pretrain.losses.backend import LossBackend, choose_backend
from distill_pretrain.losses.checks import require_columns, require_labels, require_targets
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.positions import (
    Selection,
    row_entropies,
    target_entropies,
    with_labels_elsewhere,
)
from distill_pretrain.losses.terms import Objective, column_slice, sequence_first
from distill_pretrain.processes.process import local_device


def sparse_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None,
    settings: LossSettings,
    *,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
    implementation: Implementation | LossBackend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the per-token loss and its terms; the formulas are in kernels/sparse_kd/README.md.

    Labels and targets are checked, which waits for a GPU; not while torch.compile traces. Unchecked, a label or an id
    at or beyond V makes the row's loss NaN.

    Args:
        logits: fp32, bf16 or fp16 [T, V_pad / tp], this rank's columns; the backward pass overwrites them.
        labels: int64[T], negative where there is none.
        targets: ids int64[T, K], distinct within a row but for the padding -1, probs fp32[T, K]; None trains
            on the labels alone.
        settings: the loss.
        vocab_size: V; columns from V on carry no mass and get no gradient.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        implementation: "reference" keeps to plain PyTorch, "cuda" to the kernels, "auto" takes the kernels where they
            run on every rank, which on GPUs it asks at every call: `choose_backend` tells it once for all.

    Returns:
        loss fp32[T] (differentiable once), and fp32[3, T]: CE, KL (at tau, without kd_weight, tau^2 and token weight)
        and (log sum exp z)^2, unweighted and not differentiable.

    Raises:
        ConfigError: K is above the kernel's limit.
        LossInputError: logits, labels or targets have the wrong shape, a label or an id is outside the vocabulary, an
            id is twice in a row, or a probability is none.
    """
    _require_inputs(logits, labels, targets, vocab_size, tensor_group)
    if not isinstance(implementation, LossBackend):
        source = source_of(settings)
        implementation = choose_backend(implementation, logits.device, tensor_group, source=source)
    loss = prepare_loss(
        labels,
        targets,
        settings,
        vocab_size=vocab_size,
        num_columns=logits.size(-1),
        tensor_group=tensor_group,
        backend=implementation,
    )
    return sparse_kd(logits, loss)


def _require_inputs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: SparseTargets | None,
    vocab_size: int,
    tensor_group: dist.ProcessGroup | None,
) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise LossInputError(
            "the labels do not fit the logits",
            where="labels",
            found=f"{labels.dtype} {tuple(labels.shape)}",
            expected=f"int64 [T], one for each of T rows of logits; logits are {tuple(logits.shape)}",
        )
    require_columns(logits.size(-1), vocab_size, tensor_group)
    if not torch.compiler.is_compiling():
        require_labels(labels, vocab_size)
        if targets is not None:
            require_targets(targets, labels, vocab_size)


def prepare_loss(
    labels: torch.Tensor,
    targets: SparseTargets | None,
    settings: LossSettings,
    *,
    vocab_size: int,
    num_columns: int,
    tensor_group: dist.ProcessGroup | None,
    backend: LossBackend,
) -> Loss:
    """Prepare what the kernels compute, without a look at any value; arguments as of `sparse_kd_loss`.

    Raises:
        ConfigError: K is above the kernel's limit.
    """
    prepared = scale = None
    if targets is not None:
        require_entries_fit(targets.ids.size(-1), where="the targets of a micro-batch")
        prepared = prepare_targets(targets, labels, settings, vocab_size=vocab_size)
        scale = torch.full(labels.shape, settings.kd_scale, device=labels.device)
        if settings.token_weighting == "teacher_confidence":
            scale = settings.kd_scale * confidence(targets)
    group = None
    if tensor_group is not None and dist.get_world_size(tensor_group) > 1:
        group = tensor_group.group_name
    num_entries = 0 if prepared is None else prepared.ids.size(-1)
    return Loss(
        labels=labels,
        targets=prepared,
        kd_scale=scale,
        vocab_size=vocab_size,
        settings=settings,
        form="forward_kl" if prepared is None else settings.form,
        group=group,
        backend=backend.fitting(num_entries=num_entries, num_columns=num_columns),
    )


class DistillationObjective(Objective):
    """Cross-entropy + KL from cached targets, summed over a micro-batch: what the model's last stage computes.

    Args:
        config: of the loss. Its `kernel` is decided on here and once, with the other ranks of `tensor_group`, which
            build theirs at the same time.
        vocab_size: V.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        chunk_tokens: ask for hidden states, and make the logits of so many tokens at a time; None asks for logits.
        decay_left: see `Objective`.
        logit_cap: see `Objective`.

    Raises:
        ConfigError: "cuda" is asked for and some rank of `tensor_group` cannot run the kernels.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None,
        chunk_tokens: int | None = None,
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
        self.backend = choose_backend(
            config.kernel, local_device(), tensor_group, source=source_of(self.settings)
        )
        self.selection = Selection.of(config)
        self.chunk_tokens = chunk_tokens
        self.takes_hidden = chunk_tokens is not None

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of the terms over the tokens of one micro-batch; see `Objective`."""
        rows = logits.flatten(0, 1)
        targets, chosen = self._chosen(batch, lambda: self._entropies(rows))
        loss = self._loss(batch, targets, num_columns=logits.size(-1))
        losses, terms = sparse_kd(rows, loss)
        return self.summed(losses, _kl_where(terms, chosen), _weights(batch))

    def from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, *, batch: TokenBatch
    ) -> torch.Tensor:
        """Compute the same from hidden states [L, B, H] and this rank's LM head [V_pad / tp, H].

        The gradient by the hidden states is this rank's part of the sum over `tensor_group`.
        """
        assert self.chunk_tokens is not None
        rows = hidden.flatten(0, 1)

        def entropies() -> torch.Tensor:
            # The LM head makes these logits once more for the loss: all of them at once are what it never holds.
            parts = torch.split(rows, self.chunk_tokens or len(rows))
            return torch.cat([self._entropies(part @ weight.t()) for part in parts])

        targets, chosen = self._chosen(batch, entropies)
        loss = self._loss(batch, targets, num_columns=weight.size(0))
        weights = _weights(batch)
        summed, terms = chunked_head(
            rows,
            weight,
            loss,
            chunk_tokens=self.chunk_tokens,
            row_weights=weights,
        )
        return self.summed(summed, _kl_where(terms, chosen), weights)

    def _chosen(
        self, batch: TokenBatch, entropies: Callable[[], torch.Tensor]
    ) -> tuple[SparseTargets | None, torch.Tensor | None]:
        """The targets [T, K] of a batch, and bool[T] of the positions that learn from them; None for all.

        `entropies` gives the student's, fp32[T]. An evaluation, which has no gradient, compares all positions.
        """
        targets = batch.targets
        if targets is None:
            return None, None
        targets = SparseTargets(
            ids=sequence_first(targets.ids), probs=sequence_first(targets.probs)
        )
        if self.selection is None or not torch.is_grad_enabled():
            return targets, None
        if not targets.ids.size(
            -1
        ):  # no position has any: all learn their label, which needs a place
            ids = targets.ids.new_full((len(targets.ids), 1), NO_ENTRY)
            targets = SparseTargets(ids=ids, probs=targets.probs.new_zeros(ids.shape))
        labels = sequence_first(batch.labels)
        with torch.no_grad():
            by_student = self.selection.by == "student_entropy"
            found = entropies() if by_student else target_entropies(targets)
            candidates = (labels >= 0) & (targets.probs.sum(-1) > 0)
            shape = batch.labels.t().shape
            chosen = self.selection.chosen(found.view(shape), candidates.view(shape)).flatten()
        return with_labels_elsewhere(targets, labels, chosen), chosen

    def _entropies(self, logits: torch.Tensor) -> torch.Tensor:
        """The student's entropies, fp32[T], of this rank's columns [T, V_pad / tp]."""
        columns = column_slice(logits, self.vocab_size, self.tensor_group)
        real = logits[:, : columns.stop - columns.start]
        return row_entropies(real, self.tensor_group, cap=self.settings.logit_cap)

    def _loss(self, batch: TokenBatch, targets: SparseTargets | None, *, num_columns: int) -> Loss:
        return prepare_loss(
            sequence_first(batch.labels),
            targets,
            self.settings,
            vocab_size=self.vocab_size,
            num_columns=num_columns,
            tensor_group=self.tensor_group,
            backend=self.backend,
        )


def _kl_where(terms: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """Terms fp32[3, T] with the KL of chosen positions alone: elsewhere it is the cross-entropy's."""
    if chosen is None:
        return terms
    return torch.stack(
        [
            term * chosen if name == "kl" else term
            for name, term in zip(TERMS, terms.unbind(0), strict=True)
        ]
    )


def _weights(batch: TokenBatch) -> torch.Tensor | None:
    """Return fp32[T] in the order of megatron-core's logits; None is 1."""
    return None if batch.weights is None else sequence_first(batch.weights)


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
