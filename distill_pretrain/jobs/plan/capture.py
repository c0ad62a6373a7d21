"""How fast the teacher is, and what a capture costs."""

from __future__ import annotations

from pathlib import Path

from distill_pretrain.jobs.plan.cache import StoredTargets
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.costs import (
    gpu_hours,
    hf_parameters,
    model_speed,
    telemetry_speed,
)
from distill_pretrain.planning.figures import (
    Figure,
    Part,
    derived,
    quantity,
)
from distill_pretrain.teacher.config import CaptureConfig, TeacherConfig


def teacher_parameters(teacher: TeacherConfig, *, active: bool = False) -> float | None:
    """Return the parameters of a teacher, or of all those of a mixture together; None where any is unknown.

    Args:
        teacher: the section.
        active: only those that a token meets.
    """
    known = [hf_parameters(member.path, active=active) for member in teacher.members]
    return None if None in known else sum(filter(None, known))


def teacher_speed(teacher: TeacherConfig, capture: CaptureConfig, settings: PlanConfig) -> Figure:
    """Return the positions per second of one replica of the teacher."""
    name, unit = "teacher replica", "tokens/s"
    if settings.teacher_tokens_per_second:
        return Figure(
            name=name,
            value=settings.teacher_tokens_per_second,
            unit=unit,
            basis="given",
            how="plan.teacher_tokens_per_second",
        )
    places = [capture.output_dir, *([settings.pilot] if settings.pilot else [])]
    for place in places:
        measured = telemetry_speed(Path(place))
        if measured:
            return Figure(
                name=name,
                value=measured,
                unit=unit,
                basis="measured",
                how=f"median of {place}.telemetry",
            )
    parameters = settings.teacher_parameters or teacher_parameters(teacher, active=True)
    if parameters is None:
        return Figure(
            name=name,
            value=None,
            unit=unit,
            basis="assumption",
            how="set plan.teacher_tokens_per_second (capture prints it) or plan.teacher_parameters",
        )
    return Figure(
        name=name,
        value=model_speed(
            parameters,
            gpus=teacher.processes,
            tflops=settings.gpu_tflops,
            utilization=settings.utilization,
            training=False,
        ),
        unit=unit,
        basis="assumption",
        how=f"{teacher.processes} GPUs x {settings.gpu_tflops:g} TFLOPS x {settings.utilization:g} / "
        f"(2 x {quantity(parameters, 'parameters')})",
    )


def capture_part(
    teacher: TeacherConfig, stored: StoredTargets | None, speed: Figure
) -> tuple[Part, float | None]:
    """Return the part of the plan with the teacher's hours, and these hours as a number."""
    assert stored
    if not isinstance(speed.value, (int, float)):
        return Part(title="Capture", figures=[speed]), None
    hours = gpu_hours(stored.geometry.positions, speed.value, teacher.processes)
    alone = stored.geometry.positions / speed.value / 3600
    figures = [
        speed,
        Figure(
            name="GPUs of a replica",
            value=teacher.processes,
            basis="exact",
            how="teacher.tensor x pipeline x fsdp x zero",
        ),
        Figure(
            name="teacher GPU-hours",
            value=hours,
            unit="GPU-hours",
            basis=derived(speed.basis),
            how="positions / speed x GPUs of a replica / 3600; any number of replicas share it",
        ),
        Figure(
            name="time with 1 / 8 / 32 replicas",
            value=" / ".join(f"{alone / n:.3g}" for n in (1, 8, 32)) + " h",
            basis=derived(speed.basis),
            how="replicas do not wait for each other; the last shard of each is idle time, left out here",
        ),
    ]
    return Part(title="Capture", figures=figures), hours
