"""What decides the memory of a rank that trains a student."""

from __future__ import annotations

from dataclasses import dataclass

from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig

ACTIVATION_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class StudentJob:
    """What decides the memory of a rank.

    Attributes:
        model: architecture.
        parallel: layout.
        optimizer: whose state is counted.
        vocab_size: V, real vocabulary.
        seq_len: positions of a sequence.
        precision: "fp32" or "bf16".
        micro_batch_size: sequences per forward pass.
        num_micro_batches: forward passes per step and data-parallel rank.
        data_parallel: replicas.
        entries: K, the most target entries of a position; 0 without targets.
        chunk_tokens: positions whose logits are made at a time; None for all of a micro-batch.
    """

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    vocab_size: int
    seq_len: int
    precision: str
    micro_batch_size: int
    num_micro_batches: int
    data_parallel: int
    entries: int = 0
    chunk_tokens: int | None = None

    @property
    def positions(self) -> int:
        """T, the positions of a micro-batch."""
        return self.micro_batch_size * self.seq_len // self.parallel.context

    @property
    def optimizer_shards(self) -> int:
        """The number of ranks over which the distributed optimizer divides its state."""
        return self.data_parallel * self.parallel.context

    @property
    def expert_shards(self) -> int:
        """The same for the state of experts: the ranks of a pipeline stage that hold the same ones."""
        return self.optimizer_shards * self.parallel.tensor // self.parallel.expert

    @property
    def bytes_per_activation(self) -> int:
        """Bytes of an activation, e."""
        return ACTIVATION_BYTES[self.precision]

    @property
    def sequence_split(self) -> int:
        """The number of ranks over which activations between tensor-parallel regions are divided."""
        return self.parallel.tensor if self.parallel.sequence_parallel else 1
