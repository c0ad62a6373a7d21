"""What computes the loss: CUDA kernels or plain PyTorch, chosen once and the same on all ranks that share rows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.cuda.backend import Backend, Implementation, loading_problem
from distill_pretrain.kernels.cuda.launcher import KernelSource
from distill_pretrain.kernels.sparse_kd.launch import SOURCE
from distill_pretrain.kernels.sparse_kd.problem import MAX_COLUMNS, MAX_ENTRIES


@dataclass(frozen=True, kw_only=True)
class LossBackend:
    """Which backend computes the loss: CUDA kernels, or plain PyTorch.

    Attributes:
        name: the kernels, or plain PyTorch.
        is_insisted: the kernels refuse what is too large for them, where otherwise plain PyTorch takes it.
    """

    name: Backend
    is_insisted: bool = False

    def fitting(self, *, num_entries: int, num_columns: int) -> Backend:
        """Return the backend of rows of so many target entries and columns: the same wherever these numbers are.

        Raises:
            ConfigError: the kernels are insisted on and do not take such rows.
        """
        most = MAX_ENTRIES, MAX_COLUMNS
        if self.name == "reference" or (num_entries <= most[0] and num_columns <= most[1]):
            return self.name
        if self.is_insisted:
            raise ConfigError(
                "the CUDA kernels do not take rows of this size",
                where="objective.kernel: cuda",
                found=f"{num_entries} target entries per token, {num_columns} columns per rank",
                expected=f"at most {most[0]} and {most[1]}",
                remedy="set objective.kernel=auto: plain PyTorch computes what the kernels cannot",
            )
        _warn_of_size()
        return "reference"


def choose_backend(
    implementation: Implementation,
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    source: KernelSource = SOURCE,
) -> LossBackend:
    """Choose what computes the loss of logits on `device`, the same on every rank of `group`.

    Every rank of the group calls it, since ranks whose rows are split over them must issue the same collectives.
    "auto" takes the kernels where all of the ranks can run them; where a GPU is there but the kernels are not, the
    group's first rank warns. On CPUs "auto" asks no other rank. `source` has the kernels that the loss needs.

    Raises:
        ConfigError: "cuda" is asked for and some rank cannot run the kernels; on every rank.
    """
    if implementation not in ("auto", "reference", "cuda"):
        raise ConfigError(
            "there is no such implementation of the loss",
            where="implementation",
            found=implementation,
            expected="auto, reference or cuda",
        )
    if implementation == "reference" or (implementation == "auto" and device.type != "cuda"):
        return LossBackend(name="reference")
    problem = _first_of_all(loading_problem(source, device), group)
    is_insisted = implementation == "cuda"
    if problem is None:
        return LossBackend(name="cuda", is_insisted=is_insisted)
    if is_insisted:
        raise ConfigError(
            "the loss cannot be computed by CUDA kernels",
            where="objective.kernel",
            found=f"cuda; {problem}",
            remedy="set objective.kernel=auto: plain PyTorch computes it where the kernels cannot, slower",
        )
    if group is None or dist.get_rank(group) == 0:
        warnings.warn(f"the loss runs in plain PyTorch, slower: {problem}", stacklevel=2)
    return LossBackend(name="reference")


def _first_of_all(problem: str | None, group: dist.ProcessGroup | None) -> str | None:
    """Why some rank of the group has no kernels, the same answer on all; None if all have."""
    if group is None:
        return problem
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((found for found in problems if found is not None), None)


@cache
def _warn_of_size() -> None:
    """Warn once in a process, however many sizes there are: a batch's entries differ from the next's."""
    warnings.warn(
        "some of the loss runs in plain PyTorch, slower: its kernels take "
        f"{MAX_ENTRIES} target entries per token and {MAX_COLUMNS} columns per rank",
        stacklevel=3,
    )
