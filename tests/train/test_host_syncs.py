"""A step makes the host wait for the device once: counted on the CPU, as values that Python reads."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.host_copy import HostCopy
from distill_pretrain.processes.process import process_group, released_groups
from distill_pretrain.train.callbacks import Callback
from tests.support.layouts import LLAMA
from tests.support.training import run_trainer

STEPS = 3
OPS_THAT_WAIT = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
"""What needs a value, or a size, of a tensor on the host."""


STAND_IN = "local_multi_tensor_l2_norm"
"""megatron-core's own norm where neither Transformer Engine nor Apex has a kernel for it; it waits once per tensor."""


class OnHost(torch.Tensor):
    """A tensor that lies in host memory on a GPU machine, too; so does what is computed from it."""


class Waits(TorchDispatchMode):
    """Where the host waits for the device, in order.

    What a `HostCopy` brings is free once the host has waited for something that was started later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def add(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        if any(f.name == STAND_IN for f in frames):
            return
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if __file__ != f.filename]
        self.places.append(" < ".join(reversed(places[-4:])))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A size that is told need not be read.
        sized = func is torch.ops.aten.repeat_interleave.Tensor and "output_size" in (kwargs or {})
        # Adam's step counts are in host memory wherever the weights are.
        in_optimizer = any("/torch/optim/" in f.filename for f in traceback.extract_stack())
        waits = (func in OPS_THAT_WAIT or by_mask) and not sized
        if waits and not (in_optimizer or isinstance(args[0], OnHost)):
            self.add()
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_counted() -> Iterator[Waits]:
    waits = Waits()
    made, read = HostCopy.__init__, HostCopy.read

    def make(self: Any, tensor: torch.Tensor) -> None:
        made(self, tensor)
        self.made_at = len(waits.places)

    def reads(self: Any) -> torch.Tensor:
        if len(waits.places) == self.made_at:
            waits.add()
        return read(self).as_subclass(OnHost)

    def counted(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *args: Any, **settings: Any) -> Any:
            if not isinstance(self, OnHost):
                waits.add()
            return method(self, *args, **settings)

        return mock.patch.object(torch.Tensor, name, call)

    with (
        mock.patch.object(HostCopy, "__init__", make),
        mock.patch.object(HostCopy, "read", reads),
        counted("tolist"),
        counted("cpu"),
        waits,
    ):
        yield waits


class AtSteps(Callback):
    """The number of waits when each step begins, and after the last."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.counts: list[int] = []

    def before_step(self, step: int) -> None:
        self.counts.append(len(self.waits.places))

    def end_step(self, step: int, record: Any, doing: Any) -> None:
        if step == STEPS:
            self.counts.append(len(self.waits.places))


@pytest.mark.parametrize(
    "layout",
    [{}, {"distributed_optimizer": True, "overlap_grad_reduce": True}],
    ids=["plain", "distributed"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_the_device_once(tmp_path, layout, precision):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    parallel = ParallelConfig(**layout)
    with (
        process_group(),
        released_groups(),
        model_parallel(parallel, seed=1) as groups,
        waits_counted() as waits,
    ):
        at = AtSteps(waits)
        run_trainer(
            tmp_path,
            groups,
            model={**LLAMA, "num_layers": 1},
            parallel=parallel,
            callbacks=lambda student: [at],
            steps=STEPS,
            checkpoint_interval=STEPS + 1,
            precision=precision,
        )
    found = [waits.places[a:b] for a, b in zip(at.counts, at.counts[1:], strict=False)]
    assert len(found) == STEPS
    for places in found:
        assert len(places) == 1 and "clip_grads.py" in places[0], "\n".join(places)
