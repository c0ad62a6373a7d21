"""A student that DeepSpeed's ZeRO shards over data-parallel ranks, under megatron-core's tensor parallelism.

Losses, batches, metrics and checkpoints are those of `megatron.MegatronStudent`: each gradient is the sum over the
global batch divided by its valid tokens, and the optimizer state is saved per parameter, whole over data-parallel ranks
and sliced as the parameter is over tensor-parallel ones, in the form of megatron-core's own optimizers.
"""

from __future__ import annotations

import io
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore.init.groups import config_overrides
from distill_pretrain.mcore.model.chunks import sharded_chunks
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.runtime.core import (
    ShardedStateDict,
    ShardedTensor,
    StateDict,
    _get_param_groups,
    get_standard_config_overrides,
    is_main_replica,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from distill_pretrain.mcore.student.base import (
    Student,
    divisor,
    forward_micro_batch,
    reduce_terms,
    valid_tokens,
    valid_weight,
)
from distill_pretrain.mcore.student.optimizer_settings import megatron_optimizer_config
from distill_pretrain.mcore.student.zero import (
    ConditionalAdamW,
    engine_config,
    import_deepspeed,
    model_parallel_unit,
)
from distill_pretrain.processes.env import publish_local_rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


def _destroy(engine: DeepSpeedEngine) -> None:
    """Let go of an engine whose student has ended; without process groups there is nothing left to give back."""
    if dist.is_initialized():
        engine.destroy()


class DeepSpeedStudent(Student):
    """A student whose optimizer state, gradients (ZeRO-2) and weights (ZeRO-3) are sharded by DeepSpeed."""

    optimizer: ConditionalAdamW

    def _attach_optimizer(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: str,
    ) -> ConditionalAdamW:
        self._deepspeed = import_deepspeed(optimizer)
        (module,) = self.chunks
        self._keeps_masters = precision != "fp32"
        self._shards_weights = optimizer.zero_stage == 3
        settings = megatron_optimizer_config(optimizer, precision=precision, distributed=False)
        # Without the standard overrides, megatron-core 0.18 and later let norms and biases decay.
        overrides = config_overrides(model, optimizer) or get_standard_config_overrides(settings)
        groups = _get_param_groups(self.chunks, settings, overrides)
        self._grouped = [list(group["params"]) for group in groups]
        self._group_keys = {*groups[0], "lr", "betas", "eps", "weight_decay"} - {"params"}
        # Taken now: ZeRO-3 leaves parameters without a shape.
        self._shapes = {p: p.shape for p in module.parameters()}
        self._template: ShardedStateDict = sharded_chunks([module])["model"]
        self._sum_partial_gradients(module)
        adam = ConditionalAdamW(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        publish_local_rank()
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._engine, self._zero, _, _ = self._deepspeed.initialize(
                model=module,
                optimizer=adam,
                mpu=model_parallel_unit(self.groups),
                config=engine_config(
                    optimizer,
                    precision=precision,
                    micro_batch_size=self.micro_batch_size,
                    num_micro_batches=self.num_micro_batches,
                    num_parameters=sum(shape.numel() for shape in self._shapes.values()),
                ),
            )
        # The engine's hooks on gradients hold it for ever otherwise, and with it the process groups and their threads.
        weakref.finalize(self, _destroy, self._engine).atexit = False
        self._start_moments(adam)
        return adam

    def _sum_partial_gradients(self, module: torch.nn.Module) -> None:
        """Sum over tensor-parallel ranks the gradients that each of them has of its own positions or heads.

        megatron-core does so once per step (`finalize_model_grads`); here it is done per micro-batch, before ZeRO
        takes the gradient away.
        """
        if dist.get_world_size(self.groups.tensor) == 1:
            return

        def summed(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float()
            dist.all_reduce(total, group=self.groups.tensor)
            return total.to(gradient.dtype)

        for name, parameter in module.named_parameters():
            of_positions = self.config.sequence_parallel and getattr(
                parameter, "sequence_parallel", False
            )
            of_heads = self.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
            if of_positions or of_heads:
                parameter.register_hook(summed)  # type: ignore[no-untyped-call]

    def _flat_masters(self, adam: torch.optim.Optimizer) -> list[torch.Tensor]:
        """The partitions of this rank that Adam updates in place of the parameters."""
        if self._shards_weights:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [flat for group in adam.param_groups for flat in group["params"]]

    def _start_moments(self, adam: torch.optim.Optimizer) -> None:
        """Make Adam's state now, as its first step would, so that it can be loaded."""
        for flat in self._flat_masters(adam):
            adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
            }
        if not self._shards_weights:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _accumulate_gradients(
        self, iterators: list[Iterator[TokenBatch]]
    ) -> list[dict[str, torch.Tensor]]:
        batches = list(islice(iterators[0], self.num_micro_batches))
        weights = [valid_weight(batch) for batch in batches]
        total = torch.stack(weights).sum()
        dist.all_reduce(total, group=self.groups.data)
        # ZeRO averages gradients over data-parallel ranks.
        scale = (dist.get_world_size(self.groups.data) / divisor(total)).float()
        reports = []
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            terms = forward_micro_batch(self._engine, batch)
            loss, _, report = reduce_terms(valid_tokens(batch), weight, terms)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            reports.append(report)
        return reports

    def _forward_only(self, iterators: list[Iterator[TokenBatch]]) -> list[dict[str, torch.Tensor]]:
        return [
            reduce_terms(
                valid_tokens(batch), valid_weight(batch), forward_micro_batch(self._engine, batch)
            )[2]
            for batch in islice(iterators[0], self.num_micro_batches)
        ]

    def _update_weights(self, accepts: Callable[[float], bool]) -> tuple[bool, float]:
        answers: list[bool] = []

        def may_update() -> bool:
            # Asked once per parameter group.
            if not answers:
                answers.append(accepts(float(self._zero._global_grad_norm)))
            return answers[0]

        self.optimizer.may_update = may_update
        self._engine.step()
        del self.optimizer.may_update  # which knows this student
        if not answers:
            # The gradient was not finite, so ZeRO did not come to the update; versions before 0.19.8 then keep the
            # norm of the step before.
            accepts(math.inf)
            return False, math.inf
        return answers[0], float(self._zero._global_grad_norm)

    def _whole(self, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """A moment or (key None) the master weights of this tensor-parallel rank's slice; every rank calls it."""
        utils = self._deepspeed.utils
        whole: torch.Tensor = (
            utils.safe_get_full_fp32_param(parameter)
            if key is None
            else utils.safe_get_full_optimizer_state(parameter, key)
        )
        return whole

    def _saved(
        self,
        parameter: torch.nn.Parameter,
        entry: ShardedTensor,
        key: str | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What is saved of a parameter: on the host, and only where it is written from."""
        whole = self._whole(parameter, key)
        if is_main_replica(entry.replica_id):
            return whole.detach().to("cpu", dtype, copy=True)
        return torch.empty((), dtype=dtype).expand(self._shapes[parameter])

    def _tensor(
        self,
        parameter: torch.nn.Parameter,
        entry: ShardedTensor,
        key: str | None,
        dtype: torch.dtype,
        *,
        is_loading: bool,
    ) -> torch.Tensor:
        if is_loading:
            return torch.empty(self._shapes[parameter], dtype=dtype)
        return self._saved(parameter, entry, key, dtype)

    def shape_of(self, parameter: torch.nn.Parameter) -> torch.Size:
        """See `Student`."""
        return self._shapes[parameter]

    def weight_entries(self) -> dict[torch.nn.Parameter, ShardedTensor]:
        """See `Student`."""
        return {
            entry.data: entry
            for entry in self._template.values()
            if isinstance(entry.data, torch.nn.Parameter)
        }

    def model_state(self, *, is_loading: bool) -> ShardedStateDict:
        """See `Student`."""

        def filled(entry: ShardedTensor) -> ShardedTensor:
            if not isinstance(entry.data, torch.nn.Parameter):
                return replace(entry)
            parameter = entry.data
            data = self._tensor(parameter, entry, None, parameter.dtype, is_loading=is_loading)
            return replace(entry, data=data)

        return {"model": {name: filled(entry) for name, entry in self._template.items()}}

    def optimizer_state(
        self, model_state: ShardedStateDict, *, is_loading: bool
    ) -> ShardedStateDict:
        """See `Student`."""
        entries = self.weight_entries()
        sharded: dict[int, ShardedTensor] = {}
        state: dict[int, dict[str, torch.Tensor]] = {}
        masters: list[list[ShardedTensor]] = []
        groups: list[dict[str, object]] = []

        def tensor(parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
            entry = entries[parameter]
            return self._tensor(parameter, entry, key, torch.float32, is_loading=is_loading)

        for group, parameters in zip(self.optimizer.param_groups, self._grouped, strict=True):
            ids = list(range(len(state), len(state) + len(parameters)))
            settings = {key: group[key] for key in sorted(self._group_keys)}
            groups.append({**settings, "params": ids, "step": self._steps_done()})
            for number, parameter in zip(ids, parameters, strict=True):
                sharded[number] = entries[parameter]
                state[number] = {moment: tensor(parameter, moment) for moment in MOMENTS}
            if self._keeps_masters:
                masters.append(
                    [
                        make_sharded_optimizer_tensor(
                            entries[parameter],
                            tensor(parameter, None),
                            prefix="optimizer.state.fp32_param",
                        )
                        for parameter in parameters
                    ]
                )
        adam = {"state": state, "param_groups": groups}
        optim_state_to_sharding_state(adam, sharded)
        return {"optimizer": adam, "fp32_from_fp16_params": masters} if masters else adam

    def _steps_done(self) -> int:
        return int(self.optimizer.state[self._flat_masters(self.optimizer)[0]]["step"])

    def load_model_state(self, loaded: StateDict) -> None:
        """See `Student`."""
        for name, entry in self._template.items():
            if isinstance(entry.data, torch.nn.Parameter):
                self.set_weights(entry.data, loaded["model"][name])

    def set_weights(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
        """See `Student`."""
        self._load_weights(parameter, values)
        self._load_shard(parameter, None, values)

    def load_optimizer_state(self, loaded: StateDict) -> None:
        """See `Student`."""
        adam = loaded["optimizer"] if self._keeps_masters else loaded
        parameters = [parameter for group in self._grouped for parameter in group]
        for number, parameter in enumerate(parameters):
            for moment in MOMENTS:
                self._load_shard(parameter, moment, adam["state"][number][moment])
        if self._keeps_masters:
            masters = [master for group in loaded["fp32_from_fp16_params"] for master in group]
            for parameter, master in zip(parameters, masters, strict=True):
                self._load_shard(parameter, None, master)
        (steps,) = {int(group["step"]) for group in adam["param_groups"]}
        for flat in self._flat_masters(self.optimizer):
            self.optimizer.state[flat]["step"].fill_(steps)

    def _load_weights(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """Load the weights that the forward pass uses."""
        with (
            torch.no_grad(),
            self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0),
        ):
            parameter.copy_(whole)

    def _load_shard(
        self, parameter: torch.nn.Parameter, key: str | None, whole: torch.Tensor
    ) -> None:
        """This rank's part of a moment or (key None) of the master weights."""
        utils = self._deepspeed.utils
        if not self._shards_weights:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's own splitting of a whole tensor forgets that the last part is padded.
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(self.groups.data)  # type: ignore[attr-defined]
        missing = size * dist.get_world_size(self.groups.data) - whole.numel()
        shard = torch.nn.functional.pad(whole.flatten(), (0, missing))[size * rank :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, shard)
        else:
            utils.safe_set_local_optimizer_state(parameter, shard, key)
