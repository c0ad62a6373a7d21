"""The planner's parameters and memory against students that are built and trained here, under several layouts."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import replica_size
from distill_pretrain.planning.memory import fullest_rank, rank_memory
from distill_pretrain.planning.parameters import num_parameters, rank_shapes
from distill_pretrain.planning.student_job import StudentJob
from distill_pretrain.processes.process import process_group
from tests.support.distributed import run_distributed
from tests.support.live_memory import LiveMemory

SEQ_LEN, MICRO_BATCH, MICRO_BATCHES, ENTRIES = 64, 4, 2, 12
COMMON = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 320, "num_attention_heads": 4}
LLAMA = {**COMMON, "arch": "llama"}
GPT2 = {**COMMON, "arch": "gpt2", "tie_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "llama bf16, grouped heads": {"model": {**LLAMA, "num_query_groups": 2}, "precision": "bf16"},
    "llama fp32, grouped heads, tp": {
        "model": {**LLAMA, "num_query_groups": 2, "qk_norm": True, "qkv_bias": True},
        "parallel": {"tensor": 2, "sequence_parallel": True},
    },
    "llama bf16, distributed optimizer": {
        "model": {**LLAMA, "norm_placement": "post"},
        "parallel": {"distributed_optimizer": True},
        "precision": "bf16",
    },
    "gpt2 bf16, pp": {"model": GPT2, "parallel": {"pipeline": 2}, "precision": "bf16"},
    "llama, interleaved pp": {
        "model": {**LLAMA, "num_layers": 4},
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
    },
    "gpt2, distributed optimizer, padding": {
        "model": {**GPT2, "vocab_divisor": 96},
        "parallel": {"distributed_optimizer": True},
    },
}
# A rank of context parallelism is not given slices here: its batches are as long as its part of a sequence.
CASES |= {
    "llama bf16, context, distributed optimizer": {
        "model": LLAMA,
        "parallel": {"context": 2, "distributed_optimizer": True},
        "precision": "bf16",
    },
    "llama, full recomputation, uneven pp": {
        "model": {**LLAMA, "num_layers": 4},
        "parallel": {"pipeline": 2, "first_stage_layers": 1, "recompute": "full"},
    },
    "gpt2 bf16, selective recomputation": {
        "model": {**GPT2, "num_layers": 4},
        "parallel": {"recompute": "selective"},
        "precision": "bf16",
    },
}
OLMO = {"norm_placement": "reordered", "qk_norm_whole": True, "attention_layers": "wf"}
BIASED = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
CASES |= {
    "olmo 3, tp": {
        "model": {**LLAMA, **OLMO, "sliding_window": 16, "num_query_groups": 2},
        "parallel": {"tensor": 2, "sequence_parallel": True},
    },
    "gemma 3": {
        "model": {
            **LLAMA,
            "norm_placement": "sandwich",
            "zero_centred_norms": True,
            "qk_norm": True,
            "attention_layers": "wf",
            "sliding_window": 16,
        },
        "precision": "bf16",
    },
    "gemma 2, tp": {
        "model": {
            **LLAMA,
            "norm_placement": "sandwich",
            "zero_centred_norms": True,
            "num_query_groups": 2,
            "attention_layers": "wf",
            "sliding_window": 16,
            "attention_logit_cap": 50.0,
            "logit_cap": 30.0,
        },
        "parallel": {"tensor": 2, "sequence_parallel": True},
    },
    "biases, attention temperature, yarn, layers without rope": {
        "model": {
            **LLAMA,
            **BIASED,
            "attention_layers": "fn",
            "attention_temperature": 0.1,
            "attention_temperature_positions": 8,
            "yarn": {"factor": 4.0, "original_positions": 16},
        },
        "precision": "bf16",
    },
}
EXPERTS = {**LLAMA, "experts": {"number": 4, "per_token": 2}}
CASES |= {
    "experts": {"model": EXPERTS, "parallel": {"expert": 2}},
    "experts bf16, tp, distributed optimizer": {
        "model": EXPERTS,
        "parallel": {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True},
        "precision": "bf16",
    },
    "gpt-oss bf16": {
        "model": {
            **LLAMA,
            "attention_sinks": True,
            "qkv_bias": True,
            "attention_output_bias": True,
            "attention_layers": "wf",
            "sliding_window": 16,
            "num_query_groups": 2,
            "experts": {"number": 4, "per_token": 2, "biases": True, "swiglu_limit": 7.0},
        },
        "precision": "bf16",
    },
    "experts, selective recomputation": {"model": EXPERTS, "parallel": {"recompute": "selective"}},
}
CASES |= {
    "llama, chunked head, tp": {
        "model": LLAMA,
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "chunk_tokens": 100,
        "vocab_size": 10000,
    },
    "gpt2 bf16, chunked head": {
        "model": GPT2,
        "precision": "bf16",
        "chunk_tokens": 64,
        "vocab_size": 5000,
    },
}
VOCAB_SIZE = 1000


def planned(case: dict[str, Any]) -> StudentJob:
    parallel = ParallelConfig(**case.get("parallel", {}))
    return StudentJob(
        model=ModelConfig(**case["model"]),
        parallel=parallel,
        optimizer=OptimizerConfig(),
        vocab_size=case.get("vocab_size", VOCAB_SIZE),
        seq_len=SEQ_LEN,
        precision=case.get("precision", "fp32"),
        micro_batch_size=MICRO_BATCH,
        num_micro_batches=MICRO_BATCHES,
        data_parallel=2 // replica_size(parallel),
        entries=ENTRIES,
        chunk_tokens=case.get("chunk_tokens"),
    )


def micro_batch(num_positions: int) -> TokenBatch:
    shape = (MICRO_BATCH, num_positions)
    rows = torch.rand(*shape, VOCAB_SIZE).topk(ENTRIES, dim=-1).indices
    return TokenBatch(
        tokens=torch.randint(0, VOCAB_SIZE, shape),
        labels=torch.randint(0, VOCAB_SIZE, shape),
        targets=SparseTargets(ids=rows, probs=torch.full(rows.shape, 1 / ENTRIES)),
    )


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Moments, and masters beside bf16 weights."""
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [t for o in inner for s in o.state.values() for t in s.values()]
    masters = [p for o in inner for g in o.param_groups for p in g["params"]]
    own = masters if optimizer.config.bf16 else []
    return sum(t.numel() * t.element_size() for t in [*states, *own] if torch.is_tensor(t))


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """What one rank holds after a step, and the most it held during the next."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.build import student_class

    job = planned(case)
    with model_parallel(job.parallel, seed=1) as groups:
        memory = LiveMemory()
        with memory:
            loss = DistillationObjective(
                ObjectiveConfig(ce_weight=0.5, kd_weight=0.5),
                vocab_size=job.vocab_size,
                tensor_group=groups.tensor,
                chunk_tokens=job.chunk_tokens,
                logit_cap=job.model.logit_cap,
            )
            student = student_class(job.optimizer)(
                model=job.model,
                parallel=job.parallel,
                optimizer=job.optimizer,
                groups=groups,
                vocab_size=job.vocab_size,
                seq_len=SEQ_LEN,
                precision=job.precision,
                seed=1,
                steps=4,
                micro_batch_size=MICRO_BATCH,
                num_micro_batches=MICRO_BATCHES,
                loss_function=loss,
                num_terms=len(loss.term_names),
            )
            own = SEQ_LEN // job.parallel.context
            batches = [micro_batch(own) for _ in range(MICRO_BATCHES)]
            student.step([iter(batches) for _ in student.chunks])
            gc.collect()
            memory.peak = memory.now
            student.step([iter(batches) for _ in student.chunks])
        parameters = [p for chunk in student.chunks for p in chunk.parameters()]
        return {
            "stage": dist.get_rank(groups.pipeline),
            "shapes": sorted(list(p.shape) for p in parameters),
            "weights": storage_bytes([p.data for p in parameters]),
            "gradients": storage_bytes([p.main_grad for p in parameters]),
            "optimizer": optimizer_bytes(student.optimizer),
            "peak": memory.peak,
        }


def measure_all(cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Case -> what every rank measured."""
    torch.set_num_threads(1)
    with process_group():
        results = {}
        for name, case in cases.items():
            ranks: list[Any] = [None, None]
            dist.all_gather_object(ranks, measure(case))
            results[name] = ranks
        return results


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, Any]]]:
    return run_distributed(measure_all, 2, cases=CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_every_rank_is_foreseen(measured, name):
    job = planned(CASES[name])
    for rank in measured[name]:
        shapes = rank_shapes(
            job.model,
            job.parallel,
            vocab_size=job.vocab_size,
            seq_len=SEQ_LEN,
            stage=rank["stage"],
        )
        assert sorted(map(list, shapes)) == rank["shapes"]


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimizer_state_are_exact(measured, name):
    job = planned(CASES[name])
    memory = [rank_memory(job, rank["stage"]) for rank in measured[name]]
    for foreseen, rank in zip(memory, measured[name], strict=True):
        assert foreseen.weights == rank["weights"]
        assert foreseen.gradients == rank["gradients"]
    # Shards of the distributed optimizer differ by a parameter or so, and have no padding.
    tolerance = 0.02 if job.parallel.distributed_optimizer else 0
    assert sum(m.optimizer for m in memory) == pytest.approx(
        sum(rank["optimizer"] for rank in measured[name]), rel=tolerance
    )


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step_is_foreseen_within_15_percent(measured, name):
    job = planned(CASES[name])
    for rank in measured[name]:
        foreseen = rank_memory(job, rank["stage"])
        states = sum(rank[key] for key in ("weights", "gradients", "optimizer"))
        assert foreseen.total == pytest.approx(rank["peak"], rel=0.15), asdict(foreseen)
        assert foreseen.total - foreseen.states == pytest.approx(rank["peak"] - states, rel=0.15)


def test_the_size_of_a_published_model_is_its_own():
    llama_8b = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
    )
    assert num_parameters(llama_8b, vocab_size=128256, seq_len=8192) == 8_030_261_248


def test_an_average_takes_four_bytes_of_a_parameter_and_is_shared_out():
    for distributed in (False, True):
        parallel = {"distributed_optimizer": distributed}
        job = planned({"model": LLAMA, "precision": "bf16", "parallel": parallel})
        averaged = rank_memory(replace(job, optimizer=OptimizerConfig(ema_decay=0.9)), 0)
        plain = rank_memory(job, 0)
        assert averaged.optimizer == pytest.approx(plain.optimizer * (8 + 4 + 4) / (8 + 4))
        assert averaged.total - plain.total == averaged.optimizer - plain.optimizer


def test_sharding_divides_the_optimizer_state_alone():
    job = planned({"model": LLAMA, "precision": "bf16"})
    whole = rank_memory(job, 0)
    sharded = rank_memory(
        StudentJob(
            **{
                **{field: getattr(job, field) for field in job.__dataclass_fields__},
                "parallel": ParallelConfig(distributed_optimizer=True),
                "data_parallel": 64,
            }
        ),
        0,
    )
    assert sharded.optimizer == pytest.approx(whole.optimizer / 64, rel=0.02)
    assert sharded.activations == whole.activations
    assert fullest_rank(job).total == whole.total
    assert math.isclose(whole.optimizer / whole.weights, 6)
