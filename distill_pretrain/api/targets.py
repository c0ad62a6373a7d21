"""From a teacher's logits to sparse targets, as a capture makes them.

Shapes: `...` any leading sizes, T positions in all, V vocabulary, K the most entries of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.api.checks import FLOAT_DTYPES, require_tensor, section
from distill_pretrain.contracts import RaggedTargets, Replica, SparseTargets
from distill_pretrain.data import batches
from distill_pretrain.errors import LossInputError
from distill_pretrain.sampling.kinds import SamplerName
from distill_pretrain.sampling.samplers import MAX_VOCAB, Sampler, sample_columns
from distill_pretrain.teacher.config import TargetSetConfig
from distill_pretrain.teacher.sampling_backend import columns_reader


def sample_targets(
    logits: torch.Tensor | npt.NDArray[np.float32],
    positions: npt.ArrayLike | torch.Tensor,
    *,
    sampler: SamplerName = "systematic",
    num_draws: int = 50,
    seed: int = 1234,
    top_p: float | None = None,
    valid: npt.ArrayLike | torch.Tensor | None = None,
) -> RaggedTargets:
    """Sample sparse targets of a teacher's distributions, bit for bit those that `capture` stores of the same logits.

    A position's targets depend on its own logits, `positions` entry, and the settings, and on nothing else: not on the
    other rows, the batch, or whether logits are numpy's or torch's. On a GPU kernels sample where the logits are.

    Args:
        logits: [..., V], unnormalised, V from 2 to 2**20; torch fp32, bf16 or fp16, numpy float32; -inf excludes an id.
        positions: whole numbers [...] >= 0 that name the draws: `sequence * seq_len + offset` of a `SequencePlan`.
        sampler: "systematic" (unbiased, least variance), "multinomial", "topk" or "topp" (biased).
        num_draws: draws per position, 1 to 1024; for "topk" the k, for "topp" the most ids of a position.
        seed: of the draws.
        top_p: mass at which "topp" stops; None for the others.
        valid: bool [...]; a position where it is False gets no target, and its logits are not looked at.

    Returns:
        Targets of the T positions in row-major order; `pad_targets` makes the tensors that a loss takes.

    Raises:
        ConfigError: a setting is none.
        LossInputError: logits, positions or valid have the wrong shape or dtype.
        TeacherError: logits hold NaN, +inf or nothing but -inf; names the rows.
    """
    chosen = section(
        TargetSetConfig,
        {"sampler": sampler, "num_draws": num_draws, "seed": seed, "top_p": top_p},
    )
    if not isinstance(logits, torch.Tensor):
        if not isinstance(logits, np.ndarray) or logits.dtype != np.float32:
            raise _wrong("logits", logits, "a tensor, or a numpy array of float32")
        logits = torch.from_numpy(np.ascontiguousarray(logits))
    require_tensor("logits", logits, dtypes=FLOAT_DTYPES)
    if logits.ndim < 2 or not 2 <= logits.size(-1) <= MAX_VOCAB:
        raise _wrong("logits", logits, f"[..., V], V from 2 to {MAX_VOCAB}")
    places = _on_host(positions)
    if not np.issubdtype(places.dtype, np.integer) or places.shape != tuple(logits.shape[:-1]):
        raise _wrong("positions", places, f"integers {list(logits.shape[:-1])}")
    if np.issubdtype(places.dtype, np.signedinteger) and places.size and int(places.min()) < 0:
        raise _wrong("positions", int(places.min()), "whole numbers of at least 0")
    wanted: npt.NDArray[Any] | None = None if valid is None else _on_host(valid)
    if wanted is not None and (wanted.dtype != np.bool_ or wanted.shape != places.shape):
        raise _wrong("valid", wanted, f"bool {list(places.shape)}")
    assert chosen.seed is not None
    read = columns_reader("auto", logits.device, Replica())
    (targets,) = sample_columns(
        read(logits.detach().flatten(0, -2)),
        places.astype(np.uint64).reshape(-1),
        [
            Sampler(
                name=chosen.sampler,
                num_draws=chosen.num_draws,
                seed=chosen.seed,
                top_p=chosen.top_p,
            )
        ],
        valid=None if wanted is None else wanted.reshape(-1),
    )
    return targets


def pad_targets(
    targets: RaggedTargets,
    shape: Sequence[int] | None = None,
    *,
    device: torch.device | str | None = None,
) -> SparseTargets:
    """Turn the targets of T positions into the tensors that a loss takes.

    Args:
        targets: of `sample_targets` or `CacheReader.read`.
        shape: leading sizes, whose product is T; None for [T].
        device: of the tensors.

    Returns:
        ids int64[*shape, K] padded with -1, and probs float32[*shape, K], zero where padded.

    Raises:
        LossInputError: the shape is not one of T positions.
    """
    num_positions = len(targets.entries_per_token)
    leading = (num_positions,) if shape is None else tuple(shape)
    if int(np.prod(leading)) != num_positions or min(leading, default=-1) < 0 or not num_positions:
        raise _wrong("shape", leading, f"sizes whose product is the {num_positions} positions")
    ids, probs = batches.pad_targets([targets], rows=num_positions)
    width = ids.shape[-1]
    return SparseTargets(
        ids=torch.from_numpy(ids.astype(np.int64)).reshape(*leading, width).to(device),
        probs=torch.from_numpy(probs).reshape(*leading, width).to(device),
    )


def _on_host(values: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.generic]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _wrong(where: str, found: object, expected: str) -> LossInputError:
    if isinstance(found, np.ndarray | torch.Tensor):
        found = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    return LossInputError(
        "an argument has the wrong type, dtype or shape",
        where=where,
        found=found,
        expected=expected,
    )
