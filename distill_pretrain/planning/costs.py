"""Time and traffic of a capture and its students: teacher hours, reading, what distillation adds, online or offline."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.errors import ConfigError

FORWARD_OPERATIONS = 2
"""Operations per parameter and token of a forward pass; a training step has three times as many."""
SKIPPED_STEPS = 5
"""First steps of a run, in which memory is allocated and kernels are chosen."""


def gpu_hours(tokens: float, tokens_per_second: float, gpus: int) -> float:
    """Return the GPU-hours of so many tokens at a speed that so many GPUs reach together."""
    return tokens / tokens_per_second * gpus / 3600


def model_speed(
    parameters: float, *, gpus: int, tflops: float, utilization: float, training: bool
) -> float:
    """Return tokens per second: gpus x tflops x utilization / (2 parameters forward, 6 in training)."""
    operations = FORWARD_OPERATIONS * parameters * (3 if training else 1)
    return gpus * tflops * 1e12 * utilization / operations


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the loaders of a job read, in bytes or positions per second.

    Attributes:
        per_rank: bytes per second of a rank of the last pipeline stage.
        busiest_node: bytes per second that processes of one node read, page cache included.
        from_storage: the same when tensor-parallel ranks of a node share the page cache.
        positions_per_rank: that each loader thread must decode.
    """

    per_rank: float
    busiest_node: float
    from_storage: float
    positions_per_rank: float


def reading(
    *,
    tokens_per_second: float,
    bytes_per_position: float,
    data_parallel: int,
    tensor: int,
    gpus: int,
    gpus_per_node: int,
) -> Reading:
    """Compute the traffic of a training job.

    Each of the tensor-parallel ranks of the last stage reads its replica's targets; those ranks are next to each other.

    Args:
        tokens_per_second: of the whole job.
        bytes_per_position: of the cache.
        data_parallel: replicas.
        tensor: tensor-parallel size.
        gpus: of the job.
        gpus_per_node: of a node.
    """
    positions = tokens_per_second / data_parallel
    readers = min(gpus_per_node, gpus, tensor * data_parallel)
    replicas = -(-readers // tensor)
    return Reading(
        per_rank=positions * bytes_per_position,
        busiest_node=readers * positions * bytes_per_position,
        from_storage=replicas * positions * bytes_per_position,
        positions_per_rank=positions,
    )


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """When a cache is cheaper than a teacher in every student's job, in GPU-hours.

    Attributes:
        capture: one pass of the teacher over what is captured.
        storage: its price in GPU-hours.
        per_student_online: the teacher's forward passes in one student's job.
        per_student_offline: what the cache adds to one student's job.
    """

    capture: float
    storage: float
    per_student_online: float
    per_student_offline: float

    @property
    def students(self) -> int | None:
        """The least number of students with which the cache costs less; None if there is none."""
        saved = self.per_student_online - self.per_student_offline
        if saved <= 0:
            return None
        return math.floor((self.capture + self.storage) / saved) + 1

    def offline(self, students: int) -> float:
        """Return the GPU-hours of the teacher's part with a cache."""
        return self.capture + self.storage + students * self.per_student_offline

    def online(self, students: int) -> float:
        """Return the GPU-hours of the teacher's part without one."""
        return students * self.per_student_online


@dataclass(frozen=True, kw_only=True)
class RunSpeed:
    """Medians over the steps of a finished run, the first few left out.

    Attributes:
        seconds: of a step.
        data_wait: of it, waiting for data.
        tokens_per_second: of the job.
    """

    seconds: float
    data_wait: float
    tokens_per_second: float

    @classmethod
    def of(cls, folder: Path, key: str) -> RunSpeed:
        """Read metrics.jsonl of a run.

        Args:
            folder: the run.
            key: recipe key that names it.

        Raises:
            ConfigError: there are too few steps, or none.
        """
        records = _records(folder / "metrics.jsonl")[SKIPPED_STEPS:]
        if not records:
            raise ConfigError(
                "the run says nothing of speed",
                where=key,
                found=folder,
                expected=f"metrics.jsonl with more than {SKIPPED_STEPS} steps",
                remedy="train a few dozen steps first, or leave the key out",
            )

        def median(name: str) -> float:
            return statistics.median(float(record[name]) for record in records)

        return cls(
            seconds=median("seconds"),
            data_wait=median("data_wait"),
            tokens_per_second=median("tokens_per_second"),
        )


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the torn last line of a killed run
            continue
    return records


def telemetry_speed(folder: Path) -> float | None:
    """Read the positions per second of one replica from the telemetry beside a cache; None if there is none."""
    speeds = [
        float(record["positions_per_s"])
        for path in sorted(folder.parent.glob(f"{folder.name}.telemetry/*.jsonl"))
        for record in _records(path)
        if record.get("positions_per_s")
    ]
    return statistics.median(speeds) if speeds else None


def hf_parameters(folder: Path, *, active: bool = False) -> float | None:
    """Count the parameters of a llama-like model by its config.json; None where it does not say enough.

    Args:
        folder: of the model.
        active: only those that a token meets, of a model with experts.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        groups = config.get("num_key_value_heads") or heads
        attention = 2 * hidden * heads * width + 2 * hidden * groups * width
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next((config[key] for key in counts if config.get(key)), 1)
        inner = config["intermediate_size"]
        taken = experts
        if experts > 1:
            inner = config.get("moe_intermediate_size") or inner
            taken = config["num_experts_per_tok"] if active else experts
        feed_forward = 3 * hidden * inner * taken + (hidden * experts if experts > 1 else 0)
        vocabulary = config["vocab_size"] * hidden
        tied = bool(config.get("tie_word_embeddings", False))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    norms = (2 * layers + 1) * hidden
    return float(layers * (attention + feed_forward) + norms + vocabulary * (1 if tied else 2))
