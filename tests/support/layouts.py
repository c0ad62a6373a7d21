"""Trains one tiny model under a parallel layout and returns its curves."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill_pretrain.contracts import IGNORED_LABEL, RaggedTargets
from distill_pretrain.data.batches import BatchSource, StudentBatches
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import check_layout
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import local_device, process_group, released_groups

SEQ_LEN = 32
VOCAB_SIZE = 150  # not a multiple of the vocabulary divisor: padding columns exist
GLOBAL_BATCH = 8
MICRO_BATCH = 2

LLAMA = {
    "arch": "llama",
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_divisor": 64,
}
GPT2 = {
    "arch": "gpt2",
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "tie_embeddings": True,
    "vocab_divisor": 64,
}

EXPERTS = {
    **LLAMA,
    "num_layers": 2,
    "qk_norm": True,
    "experts": {"number": 8, "per_token": 3, "load_balancing": 0.05, "z_loss": 0.01},
}

GPT_OSS = {
    **LLAMA,
    "num_layers": 2,
    "attention_sinks": True,
    "attention_layers": "wf",
    "sliding_window": 7,
    "qkv_bias": True,
    "attention_output_bias": True,
    "yarn": {"factor": 4.0, "original_positions": 8, "truncate": False},
    "experts": {"number": 4, "per_token": 2, "biases": True, "swiglu_limit": 0.2},
}


class WalkPlan:
    """Sequences that walk a fixed permutation with noise: learnable in tens of steps."""

    def __init__(self, num_sequences: int = 64) -> None:
        self.num_sequences = num_sequences
        self.seq_len = SEQ_LEN
        rng = np.random.Generator(np.random.Philox(7))
        step = rng.permutation(VOCAB_SIZE)
        stream = np.empty((num_sequences, SEQ_LEN + 1), dtype=np.int32)
        stream[:, 0] = rng.integers(0, VOCAB_SIZE, num_sequences)
        for i in range(SEQ_LEN):
            noise = rng.random(num_sequences) < 0.1
            random_ids = rng.integers(0, VOCAB_SIZE, num_sequences)
            stream[:, i + 1] = np.where(noise, random_ids, step[stream[:, i]])
        self.stream = stream

    def read(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.stream[sequences]
        labels = rows[:, 1:].copy()
        labels[sequences % 5 == 0, -3:] = (
            IGNORED_LABEL  # ranks hold unequal numbers of valid tokens
        )
        return rows[:, :-1].copy(), labels


class WalkTargets:
    """Targets keyed by sequence: the next token with most of the mass and a few others."""

    num_draws = 10

    def __init__(self, plan: WalkPlan) -> None:
        self.plan = plan

    def read(
        self, sequence: int, tokens: np.ndarray, start: int = 0, stop: int | None = None
    ) -> RaggedTargets:
        rng = np.random.Generator(np.random.Philox(sequence))
        following = self.plan.stream[sequence, 1:]
        _, labels = self.plan.read(np.array([sequence]))
        entries, ids, counts = [], [], []
        for i, truth in enumerate(following):
            if labels[0, i] == IGNORED_LABEL:
                entries.append(0)
                ids.append(np.empty(0, np.int32))
                counts.append(np.empty(0, np.int32))
                continue
            draws = np.where(rng.random(10) < 0.7, truth, rng.integers(0, VOCAB_SIZE, 10))
            unique, count = np.unique(draws, return_counts=True)
            entries.append(len(unique))
            ids.append(unique)
            counts.append(count)
        return RaggedTargets(
            kind="counts",
            num_draws=10,
            entries_per_token=np.array(entries[start:stop], dtype=np.int32),
            ids=np.concatenate(ids[start:stop]).astype(np.int32),
            values=np.concatenate(counts[start:stop]).astype(np.int32),
        )


def uneven_weights(scale: float, sequences: np.ndarray) -> np.ndarray:
    """Weights that differ from sequence to sequence and halfway through each, times a scale."""
    weights = np.repeat(np.array([0.25, 1.0, 3.0], np.float32)[sequences % 3, None], SEQ_LEN, 1)
    weights[:, SEQ_LEN // 2 + 3 :] *= 2
    return weights * np.float32(scale)


def make_job(
    model: dict[str, Any],
    layout: ParallelConfig,
    groups: ParallelGroups,
    *,
    kd: bool,
    steps: int,
    precision: str = "fp32",
    optimizer: dict[str, Any] | None = None,
    chunk_tokens: int | None = None,
    document_end: int | None = None,
    weighted: float | None = None,
) -> tuple[Any, StudentBatches]:
    """A student and its batches on this rank; the process groups of the layout must exist."""
    from distill_pretrain.mcore.student.build import student_class

    model_config = ModelConfig(**model)
    optimizer_config = OptimizerConfig(**{"lr": 3e-3, "warmup_steps": 3, **(optimizer or {})})
    check_layout(
        model_config,
        layout,
        world_size=dist.get_world_size(),
        micro_batch_size=MICRO_BATCH,
        global_batch_size=GLOBAL_BATCH,
        seq_len=SEQ_LEN,
        optimizer=optimizer_config,
    )
    plan = WalkPlan()
    cache = WalkTargets(plan) if kd else None
    batches = StudentBatches(
        [
            BatchSource(
                plan=plan,
                cache=cache,
                num_sequences=plan.num_sequences,
                document_end=document_end,
                label_weights=None if weighted is None else partial(uneven_weights, weighted),
            )
        ],
        seed=3,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        data_rank=dist.get_rank(groups.data),
        data_size=dist.get_world_size(groups.data),
        device=local_device(),
        context_rank=dist.get_rank(groups.context),
        context_size=dist.get_world_size(groups.context),
    )
    student = student_class(optimizer_config)(
        model=model_config,
        parallel=layout,
        optimizer=optimizer_config,
        groups=groups,
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
        precision=precision,
        seed=5,
        steps=steps,
        micro_batch_size=MICRO_BATCH,
        num_micro_batches=batches.num_micro_batches,
        loss_function=DistillationObjective(
            ObjectiveConfig(ce_weight=0.3 if kd else 1.0, kd_weight=0.7 if kd else 0.0),
            vocab_size=VOCAB_SIZE,
            tensor_group=groups.tensor,
            chunk_tokens=chunk_tokens,
            logit_cap=model_config.logit_cap,
        ),
        num_terms=len(DistillationObjective.TERMS),
    )
    return student, batches


def take_step(student: Any, batches: StudentBatches, step: int) -> Any:
    """One optimizer step on the global batch of `step`."""
    micro_batches = batches.step_batches(step, with_targets=student.is_last_stage)
    return student.step([iter(micro_batches) for _ in student.chunks])


def train_curves(
    *,
    model: dict[str, Any],
    parallel: dict[str, Any],
    kd: bool,
    steps: int,
    precision: str = "fp32",
    optimizer: dict[str, Any] | None = None,
    chunk_tokens: int | None = None,
    document_end: int | None = None,
    weighted: float | None = None,
) -> dict[str, list[float]]:
    """Loss, CE, KL, gradient norm and losses of routers of every step, on every rank."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    layout = ParallelConfig(**parallel)
    # Many layouts in one process would leave hundreds of threads of their process groups.
    with released_groups(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(
            model,
            layout,
            groups,
            kd=kd,
            steps=steps,
            precision=precision,
            optimizer=optimizer,
            chunk_tokens=chunk_tokens,
            document_end=document_end,
            weighted=weighted,
        )
        curves: dict[str, list[float]] = {"loss": [], "ce": [], "kl": [], "grad_norm": []}
        for step in range(steps):
            result = take_step(student, batches, step)
            for name, value in zip(DistillationObjective.TERMS, result.terms.tolist(), strict=True):
                curves[name].append(value)
            curves["grad_norm"].append(result.grad_norm)
            for name, value in result.router.items():
                curves.setdefault(name, []).append(value)
        return curves


def run_cases(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Every case in one process group."""
    torch.set_num_threads(1)
    with process_group():
        return {name: train_curves(**case) for name, case in cases.items()}
