"""How fast the student's job is, and what distillation adds to it."""

from __future__ import annotations

from collections.abc import Iterator

from distill_pretrain.jobs.plan.cache import StoredTargets
from distill_pretrain.jobs.plan.student import plan_settings
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.start import start_folder
from distill_pretrain.mcore.model.layout import replica_size
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.costs import (
    RunSpeed,
    gpu_hours,
    model_speed,
    reading,
)
from distill_pretrain.planning.figures import (
    Figure,
    Part,
    derived,
    quantity,
)
from distill_pretrain.planning.parameters import active_parameters
from distill_pretrain.planning.student_job import StudentJob


def student_speed(recipe: Recipe, job: StudentJob, gpus: int) -> Figure:
    """Return the tokens per second of a student's job: as given, or by its FLOPs on `gpus` devices."""
    settings = plan_settings(recipe)
    name, unit = "student job", "tokens/s"
    if settings.student_tokens_per_second:
        return Figure(
            name=name,
            value=settings.student_tokens_per_second,
            unit=unit,
            basis="given",
            how="plan.student_tokens_per_second",
        )
    parameters = active_parameters(job.model, vocab_size=job.vocab_size, seq_len=job.seq_len)
    return Figure(
        name=name,
        value=model_speed(
            parameters,
            gpus=gpus,
            tflops=settings.gpu_tflops,
            utilization=settings.utilization,
            training=True,
        ),
        unit=unit,
        basis="assumption",
        how=f"{gpus} GPUs x {settings.gpu_tflops:g} TFLOPS x {settings.utilization:g} / "
        f"(6 x {quantity(parameters, 'parameters')})",
    )


def job_gpus(job: StudentJob) -> int:
    """Return the number of processes of a student's job."""
    return job.data_parallel * replica_size(job.parallel)


def training_part(recipe: Recipe, job: StudentJob, stored: StoredTargets | None) -> Part:
    """Return the part of the plan with speed, length, and what distillation adds."""
    assert recipe.train and recipe.data
    gpus = job_gpus(job)
    speed = student_speed(recipe, job, gpus)
    assert isinstance(speed.value, (int, float))
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len
    figures = [
        speed,
        Figure(
            name="tokens trained on",
            value=tokens,
            unit="tokens",
            basis="exact",
            how="steps x global batch x seq_len",
        ),
        Figure(
            name="student GPU-hours",
            value=gpu_hours(tokens, speed.value, gpus),
            unit="GPU-hours",
            basis=derived(speed.basis),
            how=f"tokens / speed x {gpus} GPUs / 3600; loss and loader not counted",
        ),
    ]
    folder = start_folder(recipe)
    if folder is not None:
        figures.append(
            Figure(
                name="initial weights",
                value=f"{folder}",
                basis="exact",
                how="train.start_from, read once, by every rank its share; `train --dry-run` compares it",
            )
        )
    if stored:
        figures += _reading(plan_settings(recipe), job, stored, speed.value)
    figures += list(_overhead(plan_settings(recipe), job, speed.value))
    return Part(title="Student", figures=figures)


def _reading(
    settings: PlanConfig, job: StudentJob, stored: StoredTargets, speed: float
) -> list[Figure]:
    traffic = reading(
        tokens_per_second=speed,
        bytes_per_position=stored.largest_per_position,
        data_parallel=job.data_parallel,
        tensor=job.parallel.tensor,
        gpus=job_gpus(job),
        gpus_per_node=settings.gpus_per_node,
    )
    return [
        Figure(
            name="reading per rank",
            value=traffic.per_rank,
            unit="B/s",
            basis="estimate",
            how="speed / data-parallel size x bytes per position; ranks of the last pipeline stage only",
        ),
        Figure(
            name="reading per node, busiest",
            value=traffic.busiest_node,
            unit="B/s",
            basis="estimate",
            how="readers on the node x reading per rank; tensor-parallel ranks read the same bytes",
        ),
        Figure(
            name="of it from storage",
            value=traffic.from_storage,
            unit="B/s",
            basis="estimate",
            how="replicas on the node x reading per rank, where a page cache serves the others",
        ),
        Figure(
            name="decoding per loader thread",
            value=traffic.positions_per_rank / settings.loader_tokens_per_second,
            unit="of its speed",
            basis="estimate",
            how=f"speed / data-parallel size / {settings.loader_tokens_per_second:,.0f}/s; above 1 the job waits",
        ),
    ]


def _overhead(settings: PlanConfig, job: StudentJob, speed: float) -> Iterator[Figure]:
    """What distillation adds to a step: measured from two runs, else the loader's part by formula."""
    name = "distillation adds to a step"
    if settings.ce_run and settings.kd_run:
        ce = RunSpeed.of(settings.ce_run, "plan.ce_run")
        kd = RunSpeed.of(settings.kd_run, "plan.kd_run")
        yield Figure(
            name=name,
            value=f"{kd.seconds / ce.seconds - 1:+.1%}",
            basis="measured",
            how=f"median step {kd.seconds:.4g} s in {settings.kd_run} against {ce.seconds:.4g} s in {settings.ce_run}",
        )
        yield Figure(
            name="waiting for data",
            value=f"{kd.data_wait / kd.seconds:.1%}",
            basis="measured",
            how=f"data_wait of {settings.kd_run}, median",
        )
        return
    yield Figure(
        name=name,
        value=f"{kd_overhead(settings, job, speed):.1%}",
        basis="estimate",
        how="what the loader cannot hide: max(0, decoding per loader thread - 1); the loss "
        "reads a few entries more per row (the paper measured 2 to 10% in all); plan.ce_run and plan.kd_run measure it",
    )


def kd_overhead(settings: PlanConfig, job: StudentJob, speed: float) -> float:
    """Share of a step that a cache adds: measured if two runs are named, else what the loader cannot hide."""
    if settings.ce_run and settings.kd_run:
        ce = RunSpeed.of(settings.ce_run, "plan.ce_run")
        kd = RunSpeed.of(settings.kd_run, "plan.kd_run")
        return max(0.0, kd.seconds / ce.seconds - 1)
    load = speed / job.data_parallel / settings.loader_tokens_per_second
    return max(0.0, load - 1)
