"""Online or offline: from how many students on a cache pays."""

from __future__ import annotations

from distill_pretrain.jobs.plan.cache import StoredTargets
from distill_pretrain.jobs.plan.student import plan_settings
from distill_pretrain.jobs.plan.training import job_gpus, kd_overhead, student_speed
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.planning.costs import (
    BreakEven,
    gpu_hours,
)
from distill_pretrain.planning.figures import (
    Basis,
    Figure,
    Part,
    derived,
)
from distill_pretrain.planning.student_job import StudentJob
from distill_pretrain.teacher.config import TeacherConfig

TB = 1e12


def break_even_part(
    recipe: Recipe,
    job: StudentJob,
    teacher: TeacherConfig,
    stored: StoredTargets,
    speed: Figure,
    capture_hours: float,
) -> Part:
    """Compare online with offline, in GPU-hours of the teacher's part."""
    assert recipe.train and recipe.data
    settings = plan_settings(recipe)
    student = student_speed(recipe, job, job_gpus(job)).value
    assert isinstance(student, (int, float)) and isinstance(speed.value, (int, float))
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len
    per_device = speed.value / teacher.processes
    repeats = job.parallel.tensor * job.parallel.pipeline
    shared = gpu_hours(tokens, per_device, 1)
    costs = BreakEven(
        capture=capture_hours,
        storage=stored.total
        / TB
        * settings.storage_months
        * settings.storage_gpu_hours_per_tb_month,
        per_student_online=shared * repeats,
        per_student_offline=gpu_hours(tokens, student, job_gpus(job))
        * kd_overhead(settings, job, student),
    )
    ideal = BreakEven(
        capture=costs.capture,
        storage=costs.storage,
        per_student_online=shared,
        per_student_offline=costs.per_student_offline,
    )
    basis = derived(speed.basis)
    figures = [
        Figure(
            name="offline, once",
            value=costs.capture + costs.storage,
            unit="GPU-hours",
            basis=basis,
            how=f"capture {costs.capture:,.1f} + storage {costs.storage:,.1f} ({settings.storage_months:g} months at "
            f"{settings.storage_gpu_hours_per_tb_month:g} GPU-hours per TB and month)",
        ),
        Figure(
            name="offline, per student",
            value=costs.per_student_offline,
            unit="GPU-hours",
            basis="estimate",
            how="student GPU-hours x what distillation adds to a step",
        ),
        Figure(
            name="online, per student",
            value=costs.per_student_online,
            unit="GPU-hours",
            basis=basis,
            how=f"tokens trained on / speed per GPU x {repeats} (tensor x pipeline ranks repeat it or wait), as "
            "objective.target=teacher runs it; the teacher's logits not counted",
        ),
        Figure(
            name="online, per student, none repeated",
            value=ideal.per_student_online,
            unit="GPU-hours",
            basis=basis,
            how="the same without repeats: a bound for any online teacher of this speed",
        ),
        _figure("break-even", costs, basis),
        _figure("break-even, none repeated", ideal, basis),
    ]
    return Part(
        title=f"Online or offline, {settings.students} students",
        figures=figures,
        notes=[_advice(costs, teacher, settings.students)],
    )


def _figure(name: str, costs: BreakEven, basis: Basis) -> Figure:
    least = costs.students
    return Figure(
        name=name,
        value=None if least is None else float(least),
        unit="students",
        basis=basis,
        how="least whole number above (capture + storage) / (online - offline, per student)"
        if least is not None
        else "never: a student's job pays more for the cache than for the teacher",
    )


def _advice(costs: BreakEven, teacher: TeacherConfig, students: int) -> str:
    offline, online = costs.offline(students), costs.online(students)
    sums = f"{offline:,.1f} GPU-hours offline, {online:,.1f} online"
    if teacher.processes > 1:
        return (
            f"Advice: offline ({sums}); an online teacher must fit on one device, "
            f"this one is split over {teacher.processes}."
        )
    if offline <= online:
        return f"Advice: offline ({sums}); a cache also serves students that are planned later."
    return f"Advice: online, objective.target=teacher ({sums}), unless more students follow."
