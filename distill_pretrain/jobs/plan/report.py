"""The parts of a plan, from the sections of a recipe; formulas are in `planning`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_pretrain.jobs.plan.disk import disk_part
from distill_pretrain.jobs.plan.student import (
    Corpus,
    corpus_of,
    memory_part,
    online_teacher_bytes,
    plan_settings,
    student_job,
)
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.model.layout import replica_size
from distill_pretrain.planning.cache_size import (
    CacheGeometry,
    Density,
    Pilot,
    Targets,
    cache_bytes,
    density_without_pilot,
    load_pilot,
    tables_bytes,
)
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.costs import (
    BreakEven,
    RunSpeed,
    gpu_hours,
    hf_parameters,
    model_speed,
    reading,
    telemetry_speed,
)
from distill_pretrain.planning.figures import (
    Basis,
    Figure,
    Part,
    PlanReport,
    Table,
    quantity,
)
from distill_pretrain.planning.memory import StudentJob
from distill_pretrain.planning.parameters import num_parameters
from distill_pretrain.teacher.config import CaptureConfig, TeacherConfig

TB = 1e12


def plan_report(recipe: Recipe) -> PlanReport:
    """Every part that the recipe's sections allow.

    Raises:
        ConfigError: sizes that must be known are not.
        LayoutError: the student's layout does not fit.
    """
    assert recipe.data
    settings = plan_settings(recipe)
    corpus = corpus_of(recipe)
    pilot = load_pilot(settings.pilot)
    report = PlanReport()
    speed, capture_hours, stored = None, None, None
    if recipe.capture:
        stored = _Stored.of(recipe.capture, corpus, pilot)
        report.parts.append(stored.part())
        if pilot is not None and pilot.figures:
            report.parts.append(_samplers(pilot, stored.geometry, recipe.capture))
    if recipe.capture and recipe.teacher:
        speed = _teacher_speed(recipe.teacher, recipe.capture, settings)
        part, capture_hours = _capture(recipe.teacher, stored, speed)
        report.parts.append(part)
    if recipe.model and recipe.train:
        job = student_job(recipe, corpus, world_size=settings.gpus)
        beside = online_teacher_bytes(recipe, corpus)
        on_cpu = student_job(recipe, corpus, world_size=settings.gpus, on_gpu=False)
        report.parts.append(memory_part(job, settings, beside, on_cpu=on_cpu))
        report.parts.append(disk_part(job, recipe.train))
        report.parts.append(_student(recipe, job, stored))
        if stored and speed and capture_hours is not None and recipe.teacher:
            report.parts.append(
                _break_even(recipe, job, recipe.teacher, stored, speed, capture_hours)
            )
    return report


class _Stored:
    """The caches of a capture: kind of targets -> bytes."""

    def __init__(self, geometry: CacheGeometry, kinds: dict[str, tuple[Targets, Density]]) -> None:
        self.geometry = geometry
        self.kinds = kinds

    @classmethod
    def of(cls, capture: CaptureConfig, corpus: Corpus, pilot: Pilot | None) -> _Stored:
        geometry = CacheGeometry(
            num_sequences=capture.num_sequences or corpus.num_sequences,
            seq_len=corpus.seq_len,
            block_tokens=capture.block_tokens,
            shard_sequences=capture.shard_sequences,
            vocab_size=corpus.vocab_size,
            codec=capture.codec,
        )
        kinds = {}
        for folder, kept in capture.targets.items():
            wanted = Targets(sampler=kept.sampler, num_draws=kept.num_draws, top_p=kept.top_p)
            density = pilot.density(wanted) if pilot else density_without_pilot(wanted)
            kinds[str(folder)] = (wanted, density)
        return cls(geometry, kinds)

    def size(self, folder: str) -> float:
        """Bytes of one cache."""
        return cache_bytes(self.geometry, *self.kinds[folder])

    @property
    def total(self) -> float:
        """Bytes of all caches."""
        return sum(map(self.size, self.kinds))

    @property
    def largest_per_position(self) -> float:
        """Bytes per position of the largest cache: a student reads one of them."""
        return max(map(self.size, self.kinds)) / self.geometry.positions

    @property
    def basis(self) -> Basis:
        """The weakest of the densities'."""
        order: list[Basis] = ["assumption", "estimate", "pilot"]
        return min((density.basis for _, density in self.kinds.values()), key=order.index)

    def part(self) -> Part:
        figures = [
            Figure(
                name="positions",
                value=self.geometry.positions,
                unit="tokens",
                basis="exact",
                how=f"{self.geometry.num_sequences:,} sequences x {self.geometry.seq_len:,}",
            ),
            Figure(
                name="files",
                value=self.geometry.files * len(self.kinds),
                basis="exact",
                how=f"2 x {self.geometry.shards:,} shards and their records + 5, per cache",
            ),
        ]
        for folder, (targets, density) in self.kinds.items():
            size = self.size(folder)
            figures += [
                Figure(
                    name=f"entries per position, {targets}",
                    value=density.entries,
                    basis=density.basis,
                    how=density.how,
                ),
                Figure(
                    name=f"bytes per position, {targets}",
                    value=size / self.geometry.positions,
                    unit="bytes",
                    basis=density.basis,
                    how=self._bytes_how(targets, density),
                ),
                Figure(
                    name=f"cache {folder}",
                    value=size,
                    unit="B",
                    basis=density.basis,
                    how=f"bytes per position x positions; shards of {quantity(size / self.geometry.shards, 'B')}",
                ),
            ]
        return Part(title="Cache", figures=figures)

    def _bytes_how(self, targets: Targets, density: Density) -> str:
        if self.geometry.codec == "raw":
            return "fixed-width entries, frames and records (FORMAT.md)"
        tables = quantity(tables_bytes(self.geometry, targets), "B")
        bits = 8 * density.hc_bytes
        return f"{bits:.2f} bits per entry + frames, records, tables of {tables}"


def _samplers(pilot: Pilot, geometry: CacheGeometry, capture: CaptureConfig) -> Part:
    """Bias and variance of every sampler that the pilot measured, and what its cache would take."""
    rows = []
    for record, (targets, density) in zip(pilot.figures, pilot.densities.items(), strict=True):
        size = cache_bytes(geometry, targets, density)
        renormalised = record.get("error_renormalised")
        rows.append(
            (
                str(targets),
                f"{record['error']:.3g}",
                "" if renormalised is None else f"{renormalised:.3g}",
                _bias(record),
                f"{density.entries:.1f}",
                f"{size / geometry.positions:.1f}",
                quantity(size, "B"),
            )
        )
    table = Table(
        columns=("sampler", "error", "renormalised", "bias", "ids", "bytes/position", "cache"),
        rows=tuple(rows),
        how=f"error: E||target - t||^2 per position, all variance for the unbiased samplers; bias: L1; "
        f"{pilot.positions:,} positions of {pilot.source}; cache: this recipe's sequences, codec {capture.codec}",
    )
    return Part(title="Samplers on the pilot", tables=[table])


def _bias(record: dict[str, Any]) -> str:
    bias = float(record["bias"])
    return "0" if bias < 1e-4 else f"{bias:.3g}"


def _teacher_speed(teacher: TeacherConfig, capture: CaptureConfig, settings: PlanConfig) -> Figure:
    """Positions per second of one replica of the teacher."""
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
    parameters = settings.teacher_parameters or hf_parameters(teacher.path)
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


def _capture(
    teacher: TeacherConfig, stored: _Stored | None, speed: Figure
) -> tuple[Part, float | None]:
    """Teacher hours; and the same as a number."""
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
            basis=_weaker(speed.basis),
            how="positions / speed x GPUs of a replica / 3600; any number of replicas share it",
        ),
        Figure(
            name="time with 1 / 8 / 32 replicas",
            value=" / ".join(f"{alone / n:.3g}" for n in (1, 8, 32)) + " h",
            basis=_weaker(speed.basis),
            how="replicas do not wait for each other; the last shard of each is idle time, left out here",
        ),
    ]
    return Part(title="Capture", figures=figures), hours


def _weaker(basis: Basis) -> Basis:
    """What follows from a figure of this basis."""
    return "estimate" if basis in ("given", "measured") else basis


def _student_speed(recipe: Recipe, job: StudentJob, gpus: int) -> Figure:
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
    parameters = num_parameters(job.model, vocab_size=job.vocab_size, seq_len=job.seq_len)
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
    """Processes of a student's job."""
    return job.data_parallel * replica_size(job.parallel)


def _student(recipe: Recipe, job: StudentJob, stored: _Stored | None) -> Part:
    """Speed, length, and what distillation adds."""
    assert recipe.train and recipe.data
    gpus = job_gpus(job)
    speed = _student_speed(recipe, job, gpus)
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
            basis=_weaker(speed.basis),
            how=f"tokens / speed x {gpus} GPUs / 3600; loss and loader not counted",
        ),
    ]
    if stored:
        figures += _reading(plan_settings(recipe), job, stored, speed.value)
    figures += list(_overhead(plan_settings(recipe), job, speed.value))
    return Part(title="Student", figures=figures)


def _reading(settings: PlanConfig, job: StudentJob, stored: _Stored, speed: float) -> list[Figure]:
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


def _break_even(
    recipe: Recipe,
    job: StudentJob,
    teacher: TeacherConfig,
    stored: _Stored,
    speed: Figure,
    capture_hours: float,
) -> Part:
    """Online or offline, in GPU-hours of the teacher's part."""
    assert recipe.train and recipe.data
    settings = plan_settings(recipe)
    student = _student_speed(recipe, job, job_gpus(job)).value
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
    basis = _weaker(speed.basis)
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
        _break_even_figure("break-even", costs, basis),
        _break_even_figure("break-even, none repeated", ideal, basis),
    ]
    return Part(
        title=f"Online or offline, {settings.students} students",
        figures=figures,
        notes=[_advice(costs, teacher, settings.students)],
    )


def _break_even_figure(name: str, costs: BreakEven, basis: Basis) -> Figure:
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
