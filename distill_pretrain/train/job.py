"""The train verb: checks everything that can be checked, then builds the student and trains it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from distill_pretrain.checkpoint.identity import VERSION, at_default, described
from distill_pretrain.checkpoint.ownership import job_owning, require_shared_folder
from distill_pretrain.checkpoint.phase import FACTS
from distill_pretrain.checkpoint.start import Start, StartingWeights
from distill_pretrain.checkpoint.store import CheckpointStore, drop_unfinished
from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.data.batches import StudentBatches
from distill_pretrain.data.blend import blend_splits
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import (
    SequenceData,
    TrainingSource,
    open_sources,
    require_caches,
)
from distill_pretrain.files.ownership import owner_of
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.dense_kd import TeacherObjective
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.losses.terms import Objective
from distill_pretrain.mcore.init.deep import residual_identity
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.model.flops import training_flops_per_token
from distill_pretrain.mcore.model.layout import (
    check_layout,
    require_algorithm,
    require_backend,
    require_fusion,
    require_implementation,
    require_schedule,
    require_spec,
)
from distill_pretrain.processes.env import launch_rank, launch_world_size
from distill_pretrain.processes.groups import ParallelGroups
from distill_pretrain.processes.process import (
    local_device,
    on_first_rank,
    process_group,
    set_cpu_threads,
)
from distill_pretrain.train.averaging import Averaging
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.evaluation import HeldOutEvaluation, open_held_out, require_held_out
from distill_pretrain.train.exports import RunExports
from distill_pretrain.train.metrics import EventLog
from distill_pretrain.train.preflight import (
    check_kernels,
    check_positions,
    check_targets,
    check_teacher,
    ignored_caches,
)
from distill_pretrain.train.profiling import StepProfile
from distill_pretrain.train.standard import standard_callbacks
from distill_pretrain.train.throughput import Throughput, peak_tflops
from distill_pretrain.train.trackers import require_trackers

_log = logging.getLogger(__name__)

OpenTeacher = Callable[[SequenceData], LogitsEngine]
"""Loads the teacher of objective.target=teacher for the vocabulary and length of these sequences."""


def run_identity(
    sources: Sequence[TrainingSource],
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
    teacher: LogitsEngine | None = None,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that goes on from it; see `checkpoint.identity`.

    Megatron-core restores Adam's settings and each group's rates from the checkpoint, so a changed recipe would be
    ignored without a word; and the distributed optimizer's state has a layout of its own.
    """
    schedule = described("optimizer", optimizer)
    if optimizer.decay_style != "constant":
        schedule["decay_steps"] = optimizer.decay_steps or train.steps
    first = sources[0].sequences
    sections = {"model": model, "optimizer": optimizer, "objective": objective}
    identity = {
        "version": VERSION,
        "at_default": at_default(sections),
        **sources[0].identity,
        "optimizer": schedule,
        "distributed_optimizer": parallel.distributed_optimizer,
        "seq_len": first.plan.seq_len,
        "vocab_size": first.vocab_size,
        "tokenizer_sha256": first.tokenizer_sha256,
        "model": described("model", model),
        **({"fp8": [model.fp8, model.fp8_recipe]} if model.fp8 else {}),
        **residual_identity(model),
        "objective": described("objective", objective),
        "precision": train.precision,
        "seed": train.seed,
        "global_batch_size": train.global_batch_size,
    }
    if teacher is not None:
        identity["teacher"] = teacher.identity
    if start is not None:
        identity["start_from"] = start
    if len(sources) > 1:
        identity["blend"] = [source.identity for source in sources[1:]]
        identity["blend_splits"] = list(blend_splits([s.config.weight for s in sources]))
    return identity


def make_objective(
    objective: ObjectiveConfig,
    *,
    teacher: LogitsEngine | None,
    vocab_size: int,
    tensor_group: dist.ProcessGroup,
    decay_left: Callable[[int], float] | None = None,
    logit_cap: float | None = None,
) -> Objective:
    """Make the loss of a recipe; a teacher, where it has one, is asked on the last pipeline stage alone.

    `decay_left` is the learning rate's by step, for weights that go with its decay; `logit_cap` the student's.
    """
    if teacher is not None:
        return TeacherObjective(
            teacher,
            objective,
            vocab_size=vocab_size,
            tensor_group=tensor_group,
            decay_left=decay_left,
            logit_cap=logit_cap,
        )
    return DistillationObjective(
        objective,
        vocab_size=vocab_size,
        tensor_group=tensor_group,
        decay_left=decay_left,
        logit_cap=logit_cap,
        chunk_tokens=objective.chunk_tokens(on_gpu=local_device().type == "cuda"),
    )


def keep_on_last_stage(teacher: LogitsEngine | None, groups: ParallelGroups) -> LogitsEngine | None:
    """Return the teacher where the loss is computed; None elsewhere, so that its memory is freed."""
    return teacher if dist.get_rank() == groups.pipeline_last_rank else None


def train_student(
    *,
    data: DataConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
    save_recipe: Callable[[], None],
    open_teacher: OpenTeacher | None = None,
    start: Start | None = None,
    is_behind: bool = False,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Train, or go on training, the model of a recipe; whether it was asked to stop before the last step.

    Args:
        data: corpora and caches.
        model: architecture.
        parallel: layout.
        optimizer: AdamW and its schedule.
        objective: the loss.
        train: length, batch, output.
        save_recipe: writes the resolved recipe into the run folder; called once, on rank 0.
        open_teacher: loads the teacher; given where objective.target=teacher, and called on every rank.
        start: of train.start_from.
        is_behind: a phase from whose end another has begun: its recipe is compared, its weights are not read again.
        callbacks: of the user; see `train.callbacks`.
    """
    assert (open_teacher is not None) == (objective.target == "teacher")
    check_layout(
        model,
        parallel,
        world_size=launch_world_size(),
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        seq_len=data.seq_len,
        optimizer=optimizer,
        online_teacher=open_teacher is not None,
    )
    check_positions(objective, parallel)
    require_algorithm(optimizer)
    require_backend(optimizer)
    require_schedule(optimizer, train.steps)
    require_spec(model)
    require_implementation(model)
    require_fusion(parallel)
    require_trackers(train.track)
    cached_weight = objective.peak_kd_weight if open_teacher is None else 0.0
    require_caches(data, cached_weight)
    require_held_out(data, train)
    set_cpu_threads(train.threads)
    owner = owner_of(train.output_dir)
    with (
        process_group(),
        job_owning(
            owner, what=train.output_dir, remedy="wait for it, or set another train.output_dir"
        ),
        open_sources(data, kd_weight=cached_weight) as sources,
        open_held_out(data, train, sources[0].sequences) as held_out,
    ):
        checkpoints = CheckpointStore(train.output_dir / "checkpoints")
        started: dict[str, Any] | None = None
        weights: StartingWeights | None = None
        if start is not None:
            plain = run_identity(sources, model, parallel, optimizer, objective, train)
            started, weights = start.look(checkpoints, sources[0].sequences, plain)
        teacher = _open_whole(open_teacher, sources[0].sequences) if open_teacher else None
        identity = run_identity(
            sources, model, parallel, optimizer, objective, train, teacher, started
        )
        for source in sources:
            _log.info(f"{source.config.tokens}: {source.sequences.plan.shares}")
        for ignored in ignored_caches(data, objective, train):
            _log.info(ignored)
        exports = RunExports(train, identity, data.tokens, zero_stage=optimizer.zero_stage)
        newest = checkpoints.find(identity, reads_files=not is_behind)
        if newest is not None and newest.step >= train.steps:
            _log.info(f"already trained: {newest.folder}")
            return False
        if newest is not None:
            weights = None
        check_kernels(objective, logit_cap=model.logit_cap)
        check_targets(sources, objective)
        check_teacher(teacher, sources[0].sequences, objective)
        on_first_rank(lambda: drop_unfinished(train.output_dir))
        require_shared_folder(train.output_dir)
        if launch_rank() == 0:
            save_recipe()

        # Seconds of imports: only once nothing is left that a user could have got wrong.
        from distill_pretrain.mcore.runtime.parallel import model_parallel

        with model_parallel(parallel, seed=train.seed) as groups:
            from distill_pretrain.mcore.student.build import student_class
            from distill_pretrain.mcore.student.state import saved_bytes
            from distill_pretrain.train.trainer import Trainer

            batches_of = partial(
                StudentBatches,
                seed=train.seed,
                global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size,
                data_rank=dist.get_rank(groups.data),
                data_size=dist.get_world_size(groups.data),
                device=local_device(),
                context_rank=dist.get_rank(groups.context),
                context_size=dist.get_world_size(groups.context),
                read_retry_s=data.read_retry_s,
                read_threads=data.threads_to_read,
            )
            batches = batches_of(
                [source.for_batches for source in sources],
                first_sequence=(started or {}).get("first_sequence", 0),
            )
            vocab_size = sources[0].sequences.vocab_size
            has_targets = batches.has_targets or teacher is not None
            loss = make_objective(
                objective,
                teacher=keep_on_last_stage(teacher, groups),
                vocab_size=vocab_size,
                tensor_group=groups.tensor,
                decay_left=partial(optimizer.decay_left, steps=train.steps),
                logit_cap=model.logit_cap,
            )
            scores_kl = teacher is not None or data.held_out_cache is not None
            teacher = None
            student = student_class(optimizer)(
                model=model,
                parallel=parallel,
                optimizer=optimizer,
                groups=groups,
                vocab_size=vocab_size,
                seq_len=data.seq_len,
                precision=train.precision,
                seed=train.seed if weights is None else None,
                steps=train.steps,
                micro_batch_size=train.micro_batch_size,
                num_micro_batches=batches.num_micro_batches,
                loss_function=loss,
                num_terms=len(loss.term_names),
            )
            if weights is not None and start is not None:
                weights.fill(student)
                _log.info(f"starts from {weights.description}: {start.folder}")
            if data.documents == "separate":
                student.require_documents_apart()
            needed = saved_bytes(student, precision=train.precision)
            on_first_rank(lambda: checkpoints.require_room(needed, keep=train.keep_checkpoints))
            own: list[Callback] = [] if student.average is None else [Averaging(student.average)]
            own.append(exports.of(student))
            if held_out is not None:
                evaluation = HeldOutEvaluation(
                    student=student,
                    batches=batches_of([held_out]),
                    term_names=loss.term_names,
                    has_targets=scores_kl,
                    train=train,
                )
                own.append(evaluation)
            if train.profile is not None:
                folder = train.output_dir / "profile"
                profile = StepProfile(*train.profile, folder=folder, rank=launch_rank())
                own.append(profile)
            is_first = launch_rank() == 0
            events = EventLog(train.output_dir / "events.jsonl" if is_first else None)
            if weights is not None and started is not None and "optimizer" in started:
                events.add("phase", 0, **{fact: started[fact] for fact in FACTS})
            trainer = Trainer(
                student=student,
                batches=batches,
                prefetch_steps=data.prefetch_steps,
                checkpoints=checkpoints,
                callbacks=[
                    *own,
                    *callbacks,
                    *standard_callbacks(
                        student,
                        checkpoints,
                        identity=identity,
                        config=train,
                        events=events,
                        device=batches.device,
                        is_first=is_first,
                    ),
                ],
                resume_from=newest,
                identity=identity,
                config=train,
                events=events,
                throughput=Throughput(
                    flops_per_token=training_flops_per_token(
                        model, vocab_size=vocab_size, seq_len=data.seq_len
                    ),
                    num_devices=launch_world_size(),
                    peak_tflops=train.peak_tflops or peak_tflops(local_device(), train.precision),
                ),
                objective=loss,
                has_targets=has_targets,
            )
            return trainer.fit().stopped


def _open_whole(open_teacher: OpenTeacher, sequences: SequenceData) -> LogitsEngine:
    """The teacher, whole in every process whatever the student's layout."""
    from distill_pretrain.mcore.runtime.whole import WholeEngine

    return WholeEngine(lambda: open_teacher(sequences))
