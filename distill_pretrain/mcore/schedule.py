"""One optimizer step: megatron-core's forward/backward schedule, gradient averaging, Adam, learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.dist.groups import ParallelGroups
from distill_pretrain.mcore.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    OptimizerParamScheduler,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
)
from distill_pretrain.mcore.core import OptimizerConfig as MegatronOptimizerConfig
from distill_pretrain.mcore.model import DTYPES, LossFunction, build_model_chunks, unwrap


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        terms: fp64[num_terms], means over the valid tokens of the global batch.
        num_tokens: valid tokens in the global batch.
        grad_norm: before clipping.
        learning_rate: used by this step.
        applied: False when megatron-core skipped the update (overflow).
    """

    terms: torch.Tensor
    num_tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool


def _reduce_terms(num_tokens: torch.Tensor, terms: torch.Tensor) -> Any:
    report = torch.cat((terms.detach().double(), num_tokens.double().reshape(1)))
    # A view would not be freed by the pipeline schedule.
    return terms[0].clone(), num_tokens, {"sums": report}


def _forward_step(data_iterator: Iterator[TokenBatch], model: torch.nn.Module) -> Any:
    batch = next(data_iterator)
    positions = torch.arange(batch.tokens.size(1), device=batch.tokens.device)
    output = model(batch.tokens, positions.expand_as(batch.tokens), None, labels=batch)
    num_tokens = (batch.labels >= 0).sum().to(torch.int)
    return output, partial(_reduce_terms, num_tokens)


class Student:
    """A megatron-core model with its optimizer and schedule, on this rank.

    Args:
        model: architecture.
        parallel: layout; its process groups must exist.
        optimizer: AdamW and learning-rate schedule.
        groups: this rank's process groups.
        vocab_size: V, real vocabulary.
        seq_len: L.
        precision: "fp32" or "bf16".
        seed: of the initial weights.
        steps: optimizer steps of the whole run (the decay's length unless the optimizer section names one).
        micro_batch_size: sequences per forward pass.
        num_micro_batches: forward passes per step and data-parallel rank.
        loss_function: see `model.LossFunction`.
        num_terms: length of what it returns.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        groups: ParallelGroups,
        vocab_size: int,
        seq_len: int,
        precision: str,
        seed: int,
        steps: int,
        micro_batch_size: int,
        num_micro_batches: int,
        loss_function: LossFunction,
        num_terms: int,
    ) -> None:
        self.groups = groups
        self.num_terms = num_terms
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        modules = build_model_chunks(
            model,
            parallel,
            vocab_size=vocab_size,
            seq_len=seq_len,
            precision=precision,
            seed=seed,
            loss_function=loss_function,
        )
        self.config = unwrap(modules[0]).config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            check_for_nan_in_grad=True,
            average_in_collective=False,
        )
        self.chunks: list[torch.nn.Module] = [
            DistributedDataParallel(self.config, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.clip_grad,
                bf16=precision == "bf16",
                params_dtype=DTYPES[precision],
                use_distributed_optimizer=parallel.distributed_optimizer,
            ),
            self.chunks,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(optimizer.decay_steps or steps, optimizer.warmup_steps + 1),
            lr_decay_style=optimizer.decay_style,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self._forward_backward = get_forward_backward_func()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss, and so needs targets."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    def step(self, iterators: list[Iterator[TokenBatch]]) -> StepResult:
        """Train on one global batch.

        Args:
            iterators: one per model chunk of this rank, each yielding this rank's micro-batches in order.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        # The scheduler's own count is of finished steps; the first update must not run at learning rate 0.
        self.scheduler.step(increment=1)
        learning_rate = max(float(g["lr"]) for g in self.optimizer.param_groups)
        reports = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=self.num_micro_batches,
            seq_length=self.seq_len,
            micro_batch_size=self.micro_batch_size,
            forward_only=False,
        )
        applied, grad_norm, _ = self.optimizer.step()
        sums = self._global_sums(reports)
        num_tokens = int(sums[-1].item())
        return StepResult(
            terms=sums[:-1] / max(1, num_tokens),
            num_tokens=num_tokens,
            grad_norm=float(grad_norm or 0.0),
            learning_rate=learning_rate,
            applied=bool(applied),
        )

    def _global_sums(self, reports: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Sum over micro-batches and data-parallel ranks, made known to every pipeline stage: fp64[terms + 1]."""
        if self.is_last_stage:
            sums = torch.stack([report["sums"] for report in reports]).sum(0)
            dist.all_reduce(sums, group=self.groups.data)
        else:
            device = next(self.chunks[0].parameters()).device
            sums = torch.zeros(self.num_terms + 1, dtype=torch.float64, device=device)
        dist.broadcast(sums, self.groups.pipeline_last_rank, group=self.groups.pipeline)
        return sums.cpu()
