"""An exponential moving average of a student's weights, in fp32.

After n steps the average has moved by 1 - min(decay, (1 + n) / (10 + n)) of the way to the weights, so that what it
started from soon counts for nothing. A rank holds it for the weights that it updates: its share under the
distributed optimizer, else its slice of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distill_pretrain.mcore.runtime.core import (
    ShardedStateDict,
    StateDict,
    is_main_replica,
    make_sharded_optimizer_tensor,
)

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import Student

PREFIX = "average.ema"
"""Of the names that the average has in a checkpoint."""


class WeightAverage:
    """The average of one student's weights on this rank.

    Args:
        student: whose weights they are; it must outlive this.
        decay: see the module.
    """

    def __init__(self, student: Student, decay: float) -> None:
        # Weakly: the student holds this.
        self._student = weakref.proxy(student)
        self._decay = decay
        self._shares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the past: the average is the weights as they are."""
        self._shares = {
            parameter: values.clone() for parameter, values in self._student.own_weights().items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights of a step that is done."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for parameter, values in self._student.own_weights().items():
            self._shares[parameter].lerp_(values, share)

    def whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the average of a parameter of this model-parallel rank, fp32 in its shape.

        Data-parallel ranks call it together, for one parameter after another.
        """
        if not self._student.shares_updates:
            return self._shares[parameter].view(parameter.shape)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        own = self._student.own_span(parameter)
        if own is not None:
            whole[slice(*own)] = self._shares[parameter]
        groups = self._student.groups
        is_dense = getattr(parameter, "allreduce", True)
        dist.all_reduce(whole, group=groups.data_context if is_dense else groups.expert_data)
        return whole.view(parameter.shape)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average for weights in the block, and its own again behind it; every rank calls it."""
        self._student.gather_weights()
        parameters = list(self._student.weight_entries())
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.copy_(self.whole(parameter))
            yield
        finally:
            with torch.no_grad():
                for parameter, values in zip(parameters, kept, strict=True):
                    parameter.copy_(values)

    def state(self, *, is_loading: bool) -> ShardedStateDict:
        """Return the average as dist_checkpointing saves it, under any layout; every rank calls it."""
        state = {}
        for number, (parameter, entry) in enumerate(self._student.weight_entries().items()):
            if is_loading:
                values = torch.empty(parameter.shape, dtype=torch.float32)
            elif is_main_replica(entry.replica_id):
                values = self.whole(parameter).to("cpu", copy=True)
            else:
                self.whole(parameter)
                values = torch.empty((), dtype=torch.float32).expand(parameter.shape)
            state[f"{number}"] = make_sharded_optimizer_tensor(entry, values, prefix=PREFIX)
        return state

    @torch.no_grad()
    def load_state(self, loaded: StateDict) -> None:
        """Restore what was loaded into `state`."""
        for number, parameter in enumerate(self._student.weight_entries()):
            own = self._student.own_span(parameter)
            if own is not None:
                self._shares[parameter].copy_(loaded[f"{number}"].flatten()[slice(*own)])
