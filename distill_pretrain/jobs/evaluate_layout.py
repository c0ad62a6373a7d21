"""How the processes of an evaluation hold its models and its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_pretrain.errors import LayoutError
from distill_pretrain.processes.env import launch_world_size
from distill_pretrain.teacher.engines import require_processes
from distill_pretrain.teacher.loading import load_teacher

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.eval.config import EvalConfig
    from distill_pretrain.teacher.config import TeacherConfig


def check_layout(config: EvalConfig, teacher: TeacherConfig | None) -> None:
    """Raise LayoutError where the job's processes cannot hold the models and the teacher as they are told to.

    Those in parts are so over the same processes, since these score the same sequences; what is whole is so in each.
    """
    found = f"eval.tensor={config.tensor}, eval.pipeline={config.pipeline}"
    world, each = launch_world_size(), config.tensor * config.pipeline
    if world % each:
        raise LayoutError(
            "the processes cannot be shared out among copies of the models",
            where="eval.tensor, eval.pipeline",
            found=f"{world} processes, {each} to a copy",
            expected=f"a multiple of {each} processes",
        )
    if teacher is None or not teacher.is_split:
        return
    require_processes(teacher)
    if teacher.kind == "megatron":
        fits = (teacher.tensor, teacher.pipeline) == (config.tensor, config.pipeline)
    else:
        # Their copies are of neighbouring ranks, as megatron-core's are without a pipeline.
        fits = each == 1 or (config.pipeline == 1 and config.tensor == teacher.processes)
    if not fits:
        raise LayoutError(
            "the models and the teacher are in parts over different processes",
            where="eval.tensor, eval.pipeline, teacher",
            found=f"{found}; teacher of kind {teacher.kind} over {teacher.processes} processes",
            expected="for kind megatron the teacher's own tensor and pipeline; for others eval.tensor=1, or as many "
            "as the teacher has processes",
            remedy=f"set eval.tensor={teacher.tensor} eval.pipeline={teacher.pipeline}, or hold the teacher whole in "
            "each process"
            if teacher.kind == "megatron"
            else "set eval.tensor=1 eval.pipeline=1, or hold the teacher whole in each process",
        )


def teacher_before(
    data: DataConfig, config: EvalConfig, teacher: TeacherConfig | None, held_out: SequenceData
) -> LogitsEngine | None:
    """Open a teacher of kind megatron that is whole beside models in parts: it needs process groups of its own."""
    is_split = config.tensor * config.pipeline > 1
    if teacher is None or teacher.is_split or not is_split:
        return None
    if all(member.kind != "megatron" for member in teacher.members):
        return None
    from distill_pretrain.mcore.runtime.whole import WholeEngine

    return WholeEngine(lambda: whole_teacher(data, teacher, held_out))


def whole_teacher(data: DataConfig, teacher: TeacherConfig, held_out: SequenceData) -> LogitsEngine:
    """Load the section's model whole in this process."""
    assert data.held_out_tokens
    return load_teacher(
        teacher, held_out, data.held_out_tokens, head_chunk_tokens=teacher.head_chunk_tokens
    )
