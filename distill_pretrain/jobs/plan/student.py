"""A student's job as the planner sees it, from a recipe: sizes, layout and memory. Loads neither torch nor weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill_pretrain.errors import LayoutError
from distill_pretrain.jobs.plan.capture import teacher_parameters
from distill_pretrain.jobs.plan.corpus import Corpus
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.mcore.model.layout import check_layout, replica_size
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.figures import Figure, Part, Table, quantity
from distill_pretrain.planning.memory import (
    GLIBC_KEEPS,
    RankMemory,
    cpu_process_bytes,
    fullest_rank,
)
from distill_pretrain.planning.parameters import active_parameters, num_parameters
from distill_pretrain.planning.student_job import StudentJob

TENSOR_SIZES = (1, 2, 4, 8)
PIPELINE_SIZES = (1, 2, 4, 8)
MOST_LAYOUTS = 10
DEFAULT_ENTRIES = 50
GB = 1e9


def plan_settings(recipe: Recipe) -> PlanConfig:
    """Return the section plan, or its defaults."""
    return recipe.plan or PlanConfig()


def student_job(
    recipe: Recipe, corpus: Corpus, *, world_size: int | None, on_gpu: bool = True
) -> StudentJob:
    """Describe the job of the sections model, parallel, optimizer, objective and train.

    Args:
        recipe: has them.
        corpus: what it trains on.
        world_size: processes; None takes the launcher's.
        on_gpu: what it is to run on.

    Raises:
        LayoutError: the layout does not fit.
    """
    from distill_pretrain.processes.env import launch_world_size

    assert recipe.model and recipe.train
    data_parallel = check_layout(
        recipe.model,
        recipe.parallel,
        world_size=world_size or launch_world_size(),
        micro_batch_size=recipe.train.micro_batch_size,
        global_batch_size=recipe.train.global_batch_size,
        seq_len=corpus.seq_len,
        optimizer=recipe.optimizer,
        online_teacher=recipe.objective.target == "teacher",
    )
    per_pass = recipe.train.micro_batch_size * data_parallel
    return StudentJob(
        model=recipe.model,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        vocab_size=corpus.vocab_size,
        seq_len=corpus.seq_len,
        precision=recipe.train.precision,
        micro_batch_size=recipe.train.micro_batch_size,
        num_micro_batches=recipe.train.global_batch_size // per_pass,
        data_parallel=data_parallel,
        entries=_most_entries(recipe),
        chunk_tokens=recipe.objective.chunk_tokens(on_gpu=on_gpu),
    )


def _most_entries(recipe: Recipe) -> int:
    """K: the N of the cache, of what the recipe captures, or a default; 0 where the loss reads no cache."""
    assert recipe.data
    objective = recipe.objective
    if objective.peak_kd_weight == 0 or objective.target == "teacher":
        return 0
    caches = [source.cache for source in recipe.data.sources if source.cache]
    local = [path for path in map(Path, caches) if (path / "plan.json").is_file()]
    if local:
        from distill_pretrain.cache.reader import load_plan
        from distill_pretrain.files.storage import open_storage

        return max(load_plan(open_storage(path)).max_entries_per_token for path in local)
    if recipe.capture:
        return max(kept.num_draws for kept in recipe.capture.targets.values())
    return DEFAULT_ENTRIES


def online_teacher_bytes(recipe: Recipe, corpus: Corpus) -> int | None:
    """Return weights and logits of objective.target=teacher in every last-stage process; 0 without, None where unknown.

    Weights, and three fp32 buffers [T, V]: logits, and what the dense divergence makes of them (an estimate).
    """
    if recipe.objective.target != "teacher":
        return 0
    assert recipe.teacher and recipe.train
    parameters = plan_settings(recipe).teacher_parameters or teacher_parameters(recipe.teacher)
    if parameters is None:
        return None
    positions = recipe.train.micro_batch_size * corpus.seq_len
    weight = 2 if recipe.teacher.dtype == "bf16" else 4
    return round(weight * parameters) + 3 * 4 * positions * corpus.vocab_size


def memory_part(
    job: StudentJob, settings: PlanConfig, beside: int | None, *, on_cpu: StudentJob
) -> Part:
    """Return the part on the fullest rank's memory under the recipe's layout, and under others.

    `on_cpu` is the same job on CPUs.
    """
    fullest = fullest_rank(job)
    whole = num_parameters(job.model, vocab_size=job.vocab_size, seq_len=job.seq_len)
    room = settings.gpu_memory_gb * GB
    needed = needed_bytes(fullest, settings, beside)
    dp = job.data_parallel
    figures = [
        Figure(
            name="parameters",
            value=whole,
            unit="parameters",
            basis="exact",
            how="whole model, padding of the vocabulary included",
        ),
        *_active_figure(job),
        Figure(
            name="layout",
            value=layout_text(job),
            basis="exact",
            how=f"data parallel {dp}, {job.num_micro_batches} micro-batches per step; fullest stage {fullest.stage}",
        ),
        *memory_figures(job, fullest),
        Figure(
            name="online teacher",
            value=beside,
            unit="B",
            basis="estimate",
            how="weights and three fp32 buffers [T, V] (objective.target=teacher)",
        ),
        Figure(
            name="needed of a GPU",
            value=needed,
            unit="B",
            basis="estimate",
            how=f"peak + online teacher + {settings.gpu_reserve_gb:g} GB reserve (plan.gpu_reserve_gb), of "
            f"{quantity(room, 'B')}: {'fits' if needed <= room else 'DOES NOT FIT'}",
        ),
        Figure(
            name="process on a CPU",
            value=cpu_process_bytes(fullest_rank(on_cpu), settings.process_base_gb * GB),
            unit="B",
            basis="estimate",
            how=f"resident host memory: {settings.process_base_gb:g} GB base (plan.process_base_gb) + peak + what "
            f"glibc keeps of freed memory, at most {quantity(GLIBC_KEEPS, 'B')}",
        ),
    ]
    return Part(
        title="Memory of a student's rank",
        figures=[f for f in figures if f.name != "online teacher" or beside != 0],
        tables=[_layouts(job, settings, beside)],
    )


def _active_figure(job: StudentJob) -> list[Figure]:
    """Of a model with experts, what of it a token meets."""
    experts = job.model.experts
    if experts is None:
        return []
    active = active_parameters(job.model, vocab_size=job.vocab_size, seq_len=job.seq_len)
    how = f"of these, with {experts.per_token} of {experts.number} experts: what a token meets, and what time goes by"
    return [
        Figure(name="active parameters", value=active, unit="parameters", basis="exact", how=how)
    ]


def needed_bytes(memory: RankMemory, settings: PlanConfig, beside: int | None) -> float:
    """Add up the peak, an online teacher, and the reserve."""
    return memory.total + (beside or 0) + settings.gpu_reserve_gb * GB


def memory_figures(job: StudentJob, memory: RankMemory) -> list[Figure]:
    """Return the terms of a rank's memory, and their sum."""
    sharded = ""
    if job.parallel.distributed_optimizer:
        sharded = " / data-parallel size" + (" x context" if job.parallel.context > 1 else "")
        sharded += " (experts: / ranks with the same ones)" if job.model.experts else ""
    deepspeed = job.optimizer.backend == "deepspeed"
    states = "estimate" if deepspeed else "exact"
    how = {
        "weights": f"{job.bytes_per_activation} B per parameter of the rank",
        "gradients": "4 B per parameter (fp32 buffer)",
        "optimizer": f"8 B per parameter (moments){'' if job.precision == 'fp32' else ' + 4 B (masters)'}"
        f"{'' if job.optimizer.ema_decay is None else ' + 4 B (average)'}{sharded}",
        "batch": "tokens, labels and targets of every micro-batch of a step",
        "activations": "what autograd keeps of the layers in flight (planning/memory.py); recomputation: "
        + job.parallel.recompute,
        "loss": "logits [T, V/tp], which become their gradient"
        if job.chunk_tokens is None
        else f"gradients of the LM head; its logits are made by {job.chunk_tokens} tokens (objective.head)",
        "temporaries": "of loss and LM head, or the gradients inside a feed-forward block",
        "step_temporaries": "4 B per updated parameter; activations are gone by then",
    }
    figures = [
        Figure(
            name=name.replace("_", " "),
            value=getattr(memory, name),
            unit="B",
            basis=states  # type: ignore[arg-type]
            if name in ("weights", "gradients", "optimizer")
            else "estimate",
            how=text,
        )
        for name, text in how.items()
    ]
    return [
        *figures,
        Figure(
            name="peak",
            value=memory.total,
            unit="B",
            basis="estimate",
            how="weights + gradients + optimizer + batch + max(activations + loss + temporaries, step temporaries)",
        ),
    ]


def layout_text(job: StudentJob) -> str:
    """Describe a layout in words, such as: tensor 2 + sequence, pipeline 4, distributed optimizer."""
    parallel = job.parallel
    parts = [f"tensor {parallel.tensor}" + (" + sequence" if parallel.sequence_parallel else "")]
    if parallel.pipeline > 1:
        virtual = parallel.virtual_pipeline
        parts.append(f"pipeline {parallel.pipeline}" + (f" x {virtual}" if virtual > 1 else ""))
        ends = (("first", parallel.first_stage_layers), ("last", parallel.last_stage_layers))
        parts += [f"{name} stage {layers} layers" for name, layers in ends if layers is not None]
    if parallel.context > 1:
        parts.append(f"context {parallel.context}")
    if parallel.expert > 1:
        parts.append(f"expert {parallel.expert}")
    if parallel.distributed_optimizer:
        parts.append("distributed optimizer")
    if parallel.recompute != "none":
        parts.append(f"{parallel.recompute} recomputation")
    if job.optimizer.backend == "deepspeed":
        parts.append(f"ZeRO-{job.optimizer.zero_stage or 1}")
    return ", ".join(parts)


def _layouts(job: StudentJob, settings: PlanConfig, beside: int | None) -> Table:
    """The recipe's layout and others on as many GPUs, the smallest first."""
    others = sorted(_other_jobs(job), key=lambda other: fullest_rank(other).total)
    rows = [_row(other, settings, beside) for other in [job, *others[:MOST_LAYOUTS]]]
    return Table(
        columns=(
            "layout",
            "dp",
            "micro-batches",
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "loss",
            "peak",
            "fits",
        ),
        rows=tuple(rows),
        how="fullest stage, estimates; first the recipe's layout, then others on as many GPUs with the same batches, "
        "least memory first: more splitting means less memory and more communication",
    )


def _other_jobs(job: StudentJob) -> list[StudentJob]:
    world = job.data_parallel * replica_size(job.parallel)
    if job.optimizer.backend == "deepspeed":
        return []
    batch = job.micro_batch_size * job.num_micro_batches * job.data_parallel
    recomputation = {
        name: value
        for name, value in job.parallel.model_dump().items()
        if name.startswith("recompute")
    }
    jobs = []
    for tensor in TENSOR_SIZES:
        for pipeline in PIPELINE_SIZES:
            for distributed in (False, True):
                parallel = ParallelConfig(
                    tensor=tensor,
                    pipeline=pipeline,
                    sequence_parallel=tensor > 1,
                    distributed_optimizer=distributed,
                    context=job.parallel.context,
                    expert=job.parallel.expert,
                    **recomputation,
                )
                try:
                    data_parallel = check_layout(
                        job.model,
                        parallel,
                        world_size=world,
                        micro_batch_size=job.micro_batch_size,
                        global_batch_size=batch,
                        seq_len=job.seq_len,
                    )
                except LayoutError:
                    continue
                if parallel != job.parallel:
                    jobs.append(
                        replace(
                            job,
                            parallel=parallel,
                            data_parallel=data_parallel,
                            num_micro_batches=batch // (job.micro_batch_size * data_parallel),
                        )
                    )
    return jobs


def _row(job: StudentJob, settings: PlanConfig, beside: int | None) -> tuple[str, ...]:
    memory = fullest_rank(job)
    terms = ("weights", "gradients", "optimizer", "activations", "loss", "total")
    fits = needed_bytes(memory, settings, beside) <= settings.gpu_memory_gb * GB
    return (
        layout_text(job),
        str(job.data_parallel),
        str(job.num_micro_batches),
        *(quantity(getattr(memory, term), "B") for term in terms),
        "yes" if fits else "no",
    )
