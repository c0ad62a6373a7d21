"""Megatron-LM's offline distillation of logits as megatron-core's wheel ships it: its writer, its reader, its loss.

Its code is called as its trainer calls it: the hook on the output layer, the tar that a checkpoint flushes, the data
set that a student reads, `topk_kl_div`. What its arguments would be is set here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from rivals.kept import Chunk, Kept, Use

K = 128
"""Of its guide's example."""


def arguments(seq_len: int, num_samples: int) -> SimpleNamespace:
    """What of Megatron-LM's arguments its writer and reader look at."""
    paths = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    return SimpleNamespace(
        mtp_num_layers=None,
        seed=1234,
        seq_length=seq_len,
        train_samples=num_samples,
        per_split_data_args_path=None,
        curr_iteration=0,
        **dict.fromkeys(paths),
    )


class MegatronLM:
    """Top-k, or top-p of the top-k, in its tar of zstd-packed tensors; its loss has a ghost token.

    torch.distributed has a group, and megatron-core's parallel state is set up by whoever opened the teacher or by
    `prepare`.

    Args:
        folder: to write to.
        rows: sequences of a chunk.
        seq_len: L.
        num_samples: sequences in all.
        top_p: its `--logits-save-top-p`.

    Raises:
        ImportError: megatron-core is older than 0.19, or zstandard is not installed.
    """

    use: Use = "ghost"

    def __init__(
        self, folder: Path, *, rows: int, seq_len: int, num_samples: int, top_p: float | None = None
    ) -> None:
        import zstandard  # noqa: F401  # its own code says so only at the first flush
        from megatron.core import parallel_state
        from megatron.core.num_microbatches_calculator import (
            init_num_microbatches_calculator,
            unset_num_microbatches_calculator,
        )
        from megatron.training import global_vars
        from megatron.training.distillation import LogitsSaverHooks

        self.name = f"Megatron-LM {K}" if top_p is None else f"Megatron-LM top-p {top_p}"
        self.basis = "as shipped in megatron-core's wheel"
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        unset_num_microbatches_calculator()
        init_num_microbatches_calculator(0, None, rows, rows, 1)
        self._args = arguments(seq_len, num_samples)
        global_vars.set_args(self._args)
        self._folder, self._rows = folder, rows
        self._saver = LogitsSaverHooks(str(folder), K, p=top_p)
        self._output_layer = torch.nn.Identity()
        self._output_layer.register_forward_hook(self._saver._forward_hook)

    def write(self, chunk: Chunk) -> None:
        """See `Layout`: an iteration of one micro-batch."""
        self._args.curr_iteration += 1
        logits = torch.from_numpy(chunk.logits).view(*chunk.tokens.shape, -1)
        self._output_layer(logits.transpose(0, 1))

    def finish(self) -> int:
        """See `Layout`."""
        with contextlib.redirect_stdout(sys.stderr):
            self._saver._write_batched_tar(*self._saver.take_pending_data())
        return sum(path.stat().st_size for path in self._folder.glob("*.tar"))

    def read(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Layout`: one decoding thread."""
        from megatron.training.distillation.cached_logits_loss import TeacherTarDataset

        for values, ids in TeacherTarDataset(str(self._folder), 0, 0, 1):
            yield values[0], ids[0]

    def kept(self, read: tuple[torch.Tensor, torch.Tensor]) -> Kept:
        """See `Layout`; its marks for `no entry` become ours."""
        from megatron.training.distillation.utils_logits import CACHED_LOGITS_LOGPROB_SENTINEL

        values, ids = (part.transpose(0, 1).flatten(0, 1) for part in read)
        there = values.float() != CACHED_LOGITS_LOGPROB_SENTINEL
        return Kept(
            torch.where(there, ids, -1).numpy(),
            torch.where(there, values.float().exp(), 0.0).numpy(),
        )

    def loss(self, student: torch.Tensor, read: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """fp32[B, L]: its loss of logits [L, B, V], which it overwrites."""
        return topk_kl_div(student, *read)


def topk_kl_div(student: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Its loss with its ghost token, in one process: fp32[B, L] of logits [L, B, V] and targets [L, B, K]."""
    from megatron.training.distillation import cached_logits_loss

    return cached_logits_loss.topk_kl_div(
        student, values, ids, 1, 0, dist.group.WORLD, add_ghost_token=True
    )


def versions() -> dict[str, Any]:
    """Of the packages that its code takes part in."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megatron-core", "zstandard")}
