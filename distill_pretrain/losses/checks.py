"""What the functions of the loss refuse. Values on a GPU are read here, which waits for it.

The trainer does not come this way: its labels and targets are checked on the host, where the corpus is opened and where
the cache is decoded. What gets past both makes the loss NaN, by either backend.

Shapes: T tokens, K kept entries, V real vocabulary, n = V_pad/tp columns of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from distill_pretrain.contracts import NO_ENTRY, SparseTargets
from distill_pretrain.errors import LossInputError

MASS_ROUNDING = 2**-11 + 1e-5
"""A row's probabilities may sum to so much more than 1: what a cache of log-probabilities rounds (cache/FORMAT.md,
codec 2), and the roundings of an fp32 sum."""


def require_columns(
    num_columns: int, vocab_size: int, tensor_group: dist.ProcessGroup | None
) -> None:
    """Raise LossInputError where the ranks' columns are fewer than the vocabulary."""
    ranks = 1 if tensor_group is None else dist.get_world_size(tensor_group)
    if not 1 <= vocab_size <= num_columns * ranks:
        raise LossInputError(
            "the logits do not have the vocabulary's columns",
            where="vocab_size",
            found=vocab_size,
            expected=f"1 to {num_columns * ranks}, the columns of {ranks} rank(s)",
            remedy="give the real vocabulary's size, and logits padded to at least that",
        )


def require_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise LossInputError where a label is at or beyond the vocabulary; a negative one means no label."""
    if labels.numel() and int(largest := labels.amax()) >= vocab_size:
        raise LossInputError(
            "a label is outside the vocabulary",
            where="labels",
            found=int(largest),
            expected=f"below {vocab_size}, or negative where there is no label",
            remedy="check that the text was tokenised with the model's tokenizer",
        )


def require_targets(targets: SparseTargets, labels: torch.Tensor, vocab_size: int) -> None:
    """Raise LossInputError unless the targets are distributions over distinct ids of the vocabulary."""
    ids, probs = targets.ids, targets.probs
    if ids.ndim != labels.ndim + 1 or ids.shape[:-1] != labels.shape or probs.shape != ids.shape:
        raise LossInputError(
            "the targets do not fit the labels",
            where="targets",
            found=f"ids {tuple(ids.shape)}, probs {tuple(probs.shape)}",
            expected=f"both {(*labels.shape, 'K')}, for labels {tuple(labels.shape)}",
        )
    if not ids.numel():
        return
    least, largest = (int(value) for value in torch.stack(ids.aminmax()))
    if least < NO_ENTRY or largest >= vocab_size:
        raise LossInputError(
            "a target's id is outside the vocabulary",
            where="targets.ids",
            found=least if least < NO_ENTRY else largest,
            expected=f"0 to {vocab_size - 1}, or {NO_ENTRY} where a row is padded",
            remedy="check that the targets were made with the model's tokenizer",
        )
    _require_probabilities(ids, probs)
    _require_distinct(ids)


def _require_probabilities(ids: torch.Tensor, probs: torch.Tensor) -> None:
    # Written so that NaN is refused too.
    if not bool(((probs >= 0) & (probs < float("inf")) & ((ids >= 0) | (probs == 0))).all()):
        raise LossInputError(
            "the targets' probabilities are none",
            where="targets.probs",
            found="a negative or infinite one, NaN, or one beside the padding of a row",
            expected=f"finite numbers of at least 0, and 0 where the id is {NO_ENTRY}",
        )
    masses = probs.sum(-1)
    if float(largest := masses.amax()) > 1 + MASS_ROUNDING:
        raise LossInputError(
            "the targets' probabilities sum to more than 1",
            where=f"targets.probs, row {int(masses.flatten().argmax())}",
            found=f"{float(largest):.6g}",
            expected="at most 1 in every row",
            remedy="give probabilities of the whole vocabulary's softmax, taken in fp32, not logits or counts",
        )


def _require_distinct(ids: torch.Tensor) -> None:
    first, second = ids[..., :-1], ids[..., 1:]
    # As caches have them; of other orders the sorted ids are compared.
    if bool(((first < second) | (second < 0)).all()):
        return
    ordered = ids.sort(-1).values
    twice = (ordered[..., :-1] == ordered[..., 1:]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        row, entry = (int(place) for place in twice.flatten(0, -2).nonzero()[0])
        raise LossInputError(
            "an id is twice in a row of the targets",
            where=f"targets.ids, row {row}",
            found=f"id {int(ordered.flatten(0, -2)[row, entry])} twice",
            expected="distinct ids within a row",
            remedy="add the probabilities up and keep the id once",
        )
