"""The student under megatron-core's schedules, data parallelism and optimizers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore.init.groups import config_overrides
from distill_pretrain.mcore.model.chunks import sharding_metadata
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.runtime.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronOptimizer,
    ShardedStateDict,
    StateDict,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
)
from distill_pretrain.mcore.student.base import (
    Reduced,
    Student,
    divisor,
    forward_micro_batch,
    reduce_terms,
    valid_tokens,
    valid_weight,
)
from distill_pretrain.mcore.student.optimizer_settings import megatron_optimizer_config
from distill_pretrain.processes.groups import ParallelGroups


def _forward_step(
    seen: list[torch.Tensor], data_iterator: Iterator[TokenBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Reduced]]:
    """Run one micro-batch; its weight goes into `seen` where the loss is computed."""
    batch = next(data_iterator)

    def reduced(terms: torch.Tensor) -> Reduced:
        seen.append(valid_weight(batch))
        return reduce_terms(valid_tokens(batch), seen[-1], terms)

    return forward_micro_batch(model, batch), reduced


def _finalize_gradients(
    groups: ParallelGroups,
    seen: list[torch.Tensor],
    chunks: list[torch.nn.Module],
    num_tokens: torch.Tensor,
    **settings: object,
) -> None:
    """Reduce gradients as megatron-core does, and divide them by the weight of the tokens of the global batch.

    It would divide them itself, but only by a whole number, and after asking the host whether there are any tokens,
    which waits for the device.
    """
    finalize_model_grads(chunks, None, **settings)
    total = torch.stack(seen).sum() if seen else num_tokens.double()
    seen.clear()
    dist.broadcast(total, groups.pipeline_last_rank, group=groups.pipeline)
    dist.all_reduce(total, group=groups.data_context)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / divisor(total))  # type: ignore[operator]


class MegatronStudent(Student):
    """A student under megatron-core's schedules, data parallelism and optimizers."""

    optimizer: MegatronOptimizer

    @property
    def shares_updates(self) -> bool:
        """See `Student`."""
        return bool(self.optimizer.config.use_distributed_optimizer)

    def _attach_optimizer(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: str,
    ) -> MegatronOptimizer:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            # The trainer judges every step before its update.
            check_for_nan_in_grad=False,
            average_in_collective=False,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(self.chunks)
        ]
        attached = get_megatron_optimizer(
            replace(
                megatron_optimizer_config(
                    optimizer, precision=precision, distributed=parallel.distributed_optimizer
                ),
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            self.chunks,
            config_overrides=config_overrides(model, optimizer),
        )
        # Weakly: the distributed optimizer's views of fp32 weights hold their graph, whose hooks hold this model.
        # Python cannot collect a circle through such a graph, and with it would stay the process groups.
        scale_loss = weakref.WeakMethod(attached.scale_loss)
        self.config.grad_scale_func = lambda loss: scale_loss()(loss)  # type: ignore[misc]
        self._seen: list[torch.Tensor] = []
        self.config.finalize_model_grads_func = partial(
            _finalize_gradients, self.groups, self._seen
        )
        if parallel.overlap_grad_reduce:
            # Only the last micro-batch's gradients are complete and may travel.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._forward_backward = get_forward_backward_func()
        return attached

    def _accumulate_gradients(
        self, iterators: list[Iterator[TokenBatch]]
    ) -> list[dict[str, torch.Tensor]]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        return self._run_schedule(iterators, forward_only=False)

    def _forward_only(self, iterators: list[Iterator[TokenBatch]]) -> list[dict[str, torch.Tensor]]:
        return self._run_schedule(iterators, forward_only=True)

    def _run_schedule(
        self, iterators: list[Iterator[TokenBatch]], *, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        self._seen.clear()  # of an evaluation, or of a step that failed
        reports: list[dict[str, torch.Tensor]] = self._forward_backward(
            forward_step_func=partial(_forward_step, self._seen),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=self.num_micro_batches,
            seq_length=self.seq_len,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    def _update_weights(self, accepts: Callable[[float], bool]) -> tuple[bool, float]:
        """The optimizer's own `step`, with a question between the norm and the update."""
        overflow = self.optimizer.prepare_grads()
        norm = math.inf if overflow else float(self.optimizer.get_grad_norm())
        if not accepts(norm) or overflow:
            return False, norm
        clip_grad = self.optimizer.config.clip_grad
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
        return bool(self.optimizer.step_with_ready_grads()), norm

    @torch.no_grad()
    def set_weights(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
        """See `Student`. Masters are where the optimizer keeps them apart: beside weights that are not fp32."""
        parameter.copy_(values)
        master = getattr(parameter, "main_param", None)
        if master is None:
            return
        if getattr(parameter, "main_param_sharded", False):
            span = self.own_span(parameter)
            assert span is not None
            values = values.flatten()[slice(*span)]
        master.copy_(values)

    def own_span(self, parameter: torch.nn.Parameter) -> tuple[int, int] | None:
        """See `Student`."""
        if not self.shares_updates:
            return 0, parameter.numel()
        for part in self.optimizer.chained_optimizers:
            if parameter in part.model_param_gbuf_map:
                span = part._get_model_param_range_map(parameter)["param"]
                return span.start, span.end
        return None

    def own_weights(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """See `Student`. Masters are where the optimizer keeps them apart: beside weights that are not fp32."""
        found = {}
        for parameter in (p for chunk in self.chunks for p in chunk.parameters()):
            span = self.own_span(parameter)
            if span is None:
                continue
            master = getattr(parameter, "main_param", None)
            if master is None:
                found[parameter] = parameter.detach().flatten()[slice(*span)]
            else:
                found[parameter] = master.detach().flatten()
        return found

    def optimizer_state(
        self, model_state: ShardedStateDict, *, is_loading: bool
    ) -> ShardedStateDict:
        """See `Student`."""
        state: ShardedStateDict = self.optimizer.sharded_state_dict(
            dict(model_state), is_loading=is_loading, metadata=sharding_metadata()
        )
        return state

    def load_optimizer_state(self, loaded: StateDict) -> None:
        """See `Student`."""
        self.optimizer.load_state_dict(loaded)
