"""One optimizer step: forward and backward passes, gradient averaging, Adam, learning rate.

A step is the same whatever shards the optimizer: `megatron.MegatronStudent` is megatron-core's schedule and optimizers,
`deepspeed.DeepSpeedStudent` is ZeRO.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.mcore.model.chunks import (
    build_model_chunks,
    load_chunks,
    sharded_chunks,
    unwrap,
)
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.model.experts import ROUTER_LOSSES, router_losses
from distill_pretrain.mcore.model.head import LossFunction
from distill_pretrain.mcore.model.modules import require_documents_apart
from distill_pretrain.mcore.runtime.core import (
    OptimizerParamScheduler,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
    parallel_state,
)
from distill_pretrain.mcore.student.average import WeightAverage
from distill_pretrain.processes.context import context_spans
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.host_copy import HostCopy

Reduced = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""A micro-batch's sums: the loss to minimise, the valid tokens, and by name what is reported.

What is reported, "sums", ends with the weight of the valid tokens and their number."""


class Optimizer(Protocol):
    """What every student asks of an optimizer."""

    param_groups: list[dict[str, float]]
    """The settings of each group of parameters; those that are read here are numbers."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        terms: fp64[num_terms], means over the valid tokens of the global batch, by their weights.
        num_tokens: valid tokens in the global batch.
        grad_norm: before clipping.
        learning_rate: used by this step.
        applied: False when the update was skipped.
        router: of a model with experts, losses of its routers by name, without their coefficients: means over layers
            and sequences. The terms do not have them.
    """

    terms: torch.Tensor
    num_tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool
    router: dict[str, float] = field(default_factory=dict)


def reduce_terms(
    num_tokens: torch.Tensor, total_weight: torch.Tensor, terms: torch.Tensor
) -> Reduced:
    """Add up a micro-batch's loss terms; the first is minimised."""
    counts = torch.stack((total_weight, num_tokens.double()))
    report = torch.cat((terms.detach().double(), counts))
    # A view would not be freed by the pipeline schedule.
    return terms[0].clone(), num_tokens, {"sums": report}


def context_positions(num_positions: int, device: torch.device) -> torch.Tensor:
    """Return the places in their sequence of the columns of this rank's micro-batches, int64[num_positions]."""
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    spans = context_spans(num_positions * size, rank, size)
    return torch.cat([torch.arange(*span, device=device) for span in spans])


def forward_micro_batch(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Compute what this rank's part of the model makes of a micro-batch: loss terms on the last pipeline stage."""
    positions = context_positions(batch.tokens.size(1), batch.tokens.device)
    if batch.pieces is None:
        positions = positions.expand_as(batch.tokens)
    else:
        positions = piece_positions(batch.pieces, len(batch.tokens), positions)
    # In place of a mask, which would be a matrix, attention gets the documents themselves.
    output: torch.Tensor = model(batch.tokens, positions, batch.pieces, labels=batch)
    return output


def piece_positions(pieces: torch.Tensor, num_rows: int, positions: torch.Tensor) -> torch.Tensor:
    """Return places in their documents, int64[B, P], on the device of this rank's places in a sequence int64[P]."""
    places = torch.cat([torch.arange(stop - start) for _, start, stop in pieces.tolist()])
    return places.view(num_rows, -1).to(positions.device, non_blocking=True)[:, positions]


def valid_tokens(batch: TokenBatch) -> torch.Tensor:
    """Count the positions of a micro-batch that have a label, int32[]."""
    return (batch.labels >= 0).sum().to(torch.int)


def valid_weight(batch: TokenBatch) -> torch.Tensor:
    """Add up the weights of the positions of a micro-batch that have a label, fp64[]."""
    valid = batch.labels >= 0
    return (valid if batch.weights is None else batch.weights * valid).sum(dtype=torch.float64)


def divisor(total_weight: torch.Tensor) -> torch.Tensor:
    """Return what the sums over a global batch are divided by: its weight, fp64[], or 1 where it has none."""
    return torch.where(total_weight > 0, total_weight, 1.0)


class Student(ABC):
    """A megatron-core model with its optimizer and schedule, on this rank.

    Attributes:
        chunks: model chunks of this rank.
        config: megatron-core's configuration of the model.
        optimizer: has `param_groups`, and updates them.
        scheduler: sets their learning rate and weight decay.
        average: of the weights; None where optimizer.ema_decay is not set.

    Args:
        model: architecture.
        parallel: layout; its process groups must exist.
        optimizer: AdamW and learning-rate schedule.
        groups: this rank's process groups.
        vocab_size: V, real vocabulary.
        seq_len: L.
        precision: "fp32" or "bf16".
        seed: of the initial weights; None leaves them to be set.
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
        seed: int | None,
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
            fuse_gradient_accumulation=parallel.fuse_gradient_accumulation,
        )
        self.config = unwrap(modules[0]).config
        self.chunks: list[torch.nn.Module] = modules
        self.optimizer: Optimizer = self._attach_optimizer(model, parallel, optimizer, precision)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(optimizer.decay_steps or steps, optimizer.warmup_steps + 1),
            lr_decay_style="WSD" if optimizer.decay_style == "wsd" else optimizer.decay_style,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
            wsd_decay_steps=optimizer.wsd_decay_steps,
            lr_wsd_decay_style=optimizer.wsd_decay_style,
        )
        decay = optimizer.ema_decay
        self.average = None if decay is None else WeightAverage(self, decay)

    @abstractmethod
    def _attach_optimizer(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: str,
    ) -> Optimizer:
        """Make the optimizer of the bare model chunks; may wrap the chunks."""

    @abstractmethod
    def _accumulate_gradients(
        self, iterators: list[Iterator[TokenBatch]]
    ) -> list[dict[str, torch.Tensor]]:
        """Run every micro-batch forward and backward; what `reduce_terms` reports of each on the last stage."""

    @abstractmethod
    def _forward_only(self, iterators: list[Iterator[TokenBatch]]) -> list[dict[str, torch.Tensor]]:
        """Run every micro-batch forward; what `reduce_terms` reports of each on the last stage."""

    @abstractmethod
    def _update_weights(self, accepts: Callable[[float], bool]) -> tuple[bool, float]:
        """Clip and apply the gradients of this step, if their norm is accepted: (applied, norm before clipping)."""

    def require_documents_apart(self) -> None:
        """Raise ConfigError where a layer of this rank would carry something from one document into the next."""
        for chunk in self.chunks:
            require_documents_apart(unwrap(chunk).decoder.layers)

    def gather_weights(self) -> None:
        """Make this rank's weights those of the last update, where they would be gathered by the next forward pass.

        Every rank calls it, before weights are read.
        """
        for chunk in self.chunks:
            settings = getattr(chunk, "ddp_config", None)
            if settings is not None and settings.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]

    @abstractmethod
    def optimizer_state(
        self, model_state: ShardedStateDict, *, is_loading: bool
    ) -> ShardedStateDict:
        """Return the optimizer as megatron-core's dist_checkpointing saves it, beside what `model_state` returned.

        Without the distributed optimizer it has one form, so that backends load each other's.
        """

    @abstractmethod
    def load_optimizer_state(self, loaded: StateDict) -> None:
        """Restore what was loaded into `optimizer_state`; after `load_model_state`."""

    def model_state(self, *, is_loading: bool) -> ShardedStateDict:
        """Return the weights as dist_checkpointing saves them, under any backend."""
        if not is_loading:
            self.gather_weights()
        return sharded_chunks(self.chunks)

    def load_model_state(self, loaded: StateDict) -> None:
        """Restore what was loaded into `model_state`."""
        load_chunks(self.chunks, loaded)

    def shape_of(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Return the shape of this tensor-parallel rank's slice of a parameter, under any backend."""
        return parameter.shape

    def weight_entries(self) -> dict[torch.nn.Parameter, ShardedTensor]:
        """Return how dist_checkpointing saves each parameter of this rank."""
        return {
            entry.data: entry
            for state in sharded_chunks(self.chunks).values()
            for entry in state.values()
            if isinstance(entry.data, torch.nn.Parameter)
        }

    @abstractmethod
    def set_weights(self, parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
        """Give a parameter, and the optimizer's fp32 master of it, other values before the first step.

        Data-parallel ranks call it together, for one parameter after another.

        Args:
            parameter: of this rank.
            values: fp32, of `shape_of`.
        """

    @property
    def shares_updates(self) -> bool:
        """Whether each data-parallel rank updates a share of the weights alone."""
        return False

    def own_span(self, parameter: torch.nn.Parameter) -> tuple[int, int] | None:
        """Return where, in the flattened parameter, what this rank updates begins and ends; None where others do."""
        return 0, parameter.numel()

    def own_weights(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the fp32 weights that this rank updates: of each parameter, flattened, `own_span`."""
        raise NotImplementedError("refused by the section optimizer")

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss, and so needs targets."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    def step(
        self,
        iterators: list[Iterator[TokenBatch]],
        accepts: Callable[[StepResult], bool] = lambda result: True,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Train on one global batch.

        The host waits for the device once: for the gradient norm. The losses are copied before it, and so is what
        `meanwhile` copies.

        Args:
            iterators: one per model chunk of this rank, each yielding this rank's micro-batches in order.
            accepts: told what is known before the update; where it says no on every rank, the weights stay.
            meanwhile: called once the forward and backward passes are under way.
        """
        # The scheduler's own count is of finished steps; the first update must not run at learning rate 0.
        self.scheduler.step(increment=1)
        learning_rate = max(float(g["lr"]) for g in self.optimizer.param_groups)
        totals = self._global_sums(self._accumulate_gradients(iterators))
        sequences = self.micro_batch_size * self.num_micro_batches
        sequences *= dist.get_world_size(self.groups.data)
        sums = HostCopy(torch.cat((totals, router_losses(self.chunks, sequences).to(totals))))
        meanwhile()
        judged: list[StepResult] = []

        def accepted(grad_norm: float) -> bool:
            values, router = sums.read().tensor_split((self.num_terms + 2,))
            seen = StepResult(
                terms=values[:-2] / divisor(values[-2]),
                num_tokens=int(values[-1]),
                router=dict(zip(ROUTER_LOSSES, router.tolist(), strict=False)),
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                applied=False,
            )
            judged.append(seen)
            return accepts(seen)

        applied, grad_norm = self._update_weights(accepted)
        return replace(judged[0], applied=applied, grad_norm=grad_norm)

    @torch.no_grad()
    def evaluate(self, iterators: list[Iterator[TokenBatch]]) -> tuple[torch.Tensor, float]:
        """Compute the loss terms of one global batch, without dropout; weights and optimizer stay as they are.

        Args:
            iterators: see `step`.

        Returns:
            fp64[num_terms], sums over the valid tokens of the global batch, and how many these are (or, where they have
            weights, the sum of them); on every rank.
        """
        for chunk in self.chunks:
            chunk.eval()
        try:
            sums = self._global_sums(self._forward_only(iterators)).cpu()
        finally:
            for chunk in self.chunks:
                chunk.train()
        return sums[:-2], float(sums[-2].item())

    def _global_sums(self, reports: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Sum over micro-batches and the ranks of other positions, made known to every stage: fp64[terms + 2]."""
        if self.is_last_stage:
            sums = torch.stack([report["sums"] for report in reports]).sum(0)
            dist.all_reduce(sums, group=self.groups.data_context)
        else:
            device = next(self.chunks[0].parameters()).device
            sums = torch.zeros(self.num_terms + 2, dtype=torch.float64, device=device)
        dist.broadcast(sums, self.groups.pipeline_last_rank, group=self.groups.pipeline)
        return sums
