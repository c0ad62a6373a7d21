"""Engines that turn sequences into next-token logits, for capture and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pretrain.contracts import LogitsEngine, TeacherEngine
from distill_pretrain.errors import ConfigError, LayoutError
from distill_pretrain.processes.env import launch_world_size
from distill_pretrain.teacher.config import NO_TRUST, TeacherConfig, Trust


def open_engine(
    kind: str,
    path: Path,
    dtype: str,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer_digests: tuple[str, ...] = (),
    trust: Trust = NO_TRUST,
    tensor: int = 1,
    pipeline: int = 1,
    head_chunk_tokens: int = 1024,
) -> LogitsEngine:
    """Load a model for scoring, whole in this process, or this process's part of one.

    Args:
        kind: "megatron" (a checkpoint of this project, or a Hugging Face folder that it can convert) or "hf" (any
            local Hugging Face folder).
        path: run, checkpoint or model folder.
        dtype: "fp32" or "bf16", arithmetic of the forward pass.
        vocab_size: V of the corpus to score.
        seq_len: L of the sequences to score.
        tokenizer_digests: of the corpus; compared where the model knows its own.
        trust: what of a folder of kind "hf" may run.
        tensor: processes that split every layer of a megatron engine; `logits` is for whole ones.
        pipeline: processes, or groups of `tensor` of them, that hold its layers in turn.
        head_chunk_tokens: positions of a chunk, where the engine makes chunks.

    Raises:
        TeacherError, CheckpointError: the model cannot be loaded.
        TokenizerMismatch: the model's vocabulary or tokenizer is not the corpus's.
        ConfigError: an engine that splits the model.

    A megatron engine needs the process groups of `mcore.parallel.model_parallel`, of its layout.
    """
    if kind == "megatron":
        from distill_pretrain.teacher.engines.megatron import MegatronEngine

        return MegatronEngine(
            path,
            dtype,
            vocab_size=vocab_size,
            seq_len=seq_len,
            tokenizer_digests=tokenizer_digests,
            tensor=tensor,
            pipeline=pipeline,
            head_chunk_tokens=head_chunk_tokens,
        )
    if kind == "deepspeed":
        raise ConfigError(
            "the teacher is held by several processes only while a cache is captured, or models are evaluated",
            where="teacher.kind",
            found=kind,
            expected="hf or megatron, whole in each process",
            remedy="set teacher.kind=hf; its folder is the same",
        )
    from distill_pretrain.teacher.engines.hf import HFEngine

    return HFEngine(
        path,
        dtype,
        vocab_size=vocab_size,
        seq_len=seq_len,
        head_chunk_tokens=head_chunk_tokens,
        trust=trust,
    )


@contextmanager
def teacher_groups(teacher: TeacherConfig) -> Iterator[None]:
    """Make what `open_teacher_engine` needs of the job's processes, for as long as the block lasts.

    Inside `dist.process.process_group`; every rank of the job enters it.

    Raises:
        LayoutError: the processes cannot be shared out among copies of the teacher.
    """
    require_processes(teacher)
    if all(member.kind != "megatron" for member in teacher.members):
        yield
        return
    from distill_pretrain.mcore.model.layout import scoring_layout
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with model_parallel(scoring_layout(teacher.tensor, teacher.pipeline), seed=0):
        yield


def open_teacher_engine(
    teacher: TeacherConfig,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer_digests: tuple[str, ...] = (),
) -> TeacherEngine:
    """Load this rank's share of one teacher for capture; inside `teacher_groups`, on every rank of the job.

    Args:
        teacher: the section.
        vocab_size: V of the corpus.
        seq_len: L of its sequences.
        tokenizer_digests: of the corpus; compared where the model knows its own.

    Raises:
        TeacherError, CheckpointError: the model cannot be loaded.
        TokenizerMismatch: the model's vocabulary or tokenizer is not the corpus's.
        MissingDependency: a package of an extra, with the line that installs it.
    """
    if teacher.kind == "megatron":
        from distill_pretrain.teacher.engines.megatron import MegatronEngine

        return MegatronEngine(
            teacher.path,
            teacher.dtype,
            vocab_size=vocab_size,
            seq_len=seq_len,
            tokenizer_digests=tokenizer_digests,
            tensor=teacher.tensor,
            pipeline=teacher.pipeline,
            head_chunk_tokens=teacher.head_chunk_tokens,
        )
    if teacher.kind == "hf" and teacher.processes == 1:
        from distill_pretrain.teacher.engines.hf import HFEngine

        return HFEngine(
            teacher.path,
            teacher.dtype,
            vocab_size=vocab_size,
            seq_len=seq_len,
            head_chunk_tokens=teacher.head_chunk_tokens,
            trust=teacher.trust,
        )
    from distill_pretrain.teacher.engines import split_hf

    return split_hf.SplitHFEngine(
        teacher,
        vocab_size=vocab_size,
        seq_len=seq_len,
        open_trunk=(
            split_hf.open_deepspeed_trunk
            if teacher.kind == "deepspeed"
            else split_hf.open_transformers_trunk
        ),
        splits_sequences=teacher.tensor == 1,
    )


def check_model_folder(teacher: TeacherConfig, *, vocab_size: int, seq_len: int) -> None:
    """Find what `open_teacher_engine` would refuse of a Hugging Face folder, from its config.json and headers of files.

    Raises:
        TeacherError, CheckpointError: the model, or its weight files, cannot be used.
        TokenizerMismatch: the model knows fewer ids than the corpus has.
        MissingDependency: a package of an extra, with the line that installs it.
    """
    from distill_pretrain.teacher.engines import folder

    if teacher.kind == "megatron":
        from distill_pretrain.checkpoint.hf import check_hf_weights, read_hf_model

        found = read_hf_model(teacher.path)
        folder.require_known_ids(teacher.path, found.vocab_size, vocab_size)
        folder.require_positions(teacher.path, found.max_positions, seq_len)
        check_hf_weights(teacher.path)
        return
    from distill_pretrain.teacher.engines.known_head import require_known_head
    from distill_pretrain.teacher.engines.weights import meta_model, require_own_weights

    path, trust = teacher.path, teacher.trust
    config = folder.read_config(path, vocab_size=vocab_size, seq_len=seq_len, trust=trust)
    model = meta_model(path, config, trust)
    require_own_weights(path, model, trust)
    require_known_head(path, model)


def require_processes(teacher: TeacherConfig) -> None:
    """Raise LayoutError where the job's processes cannot be shared out among copies of a teacher."""
    world, each = launch_world_size(), teacher.processes
    if world % each:
        raise LayoutError(
            "the processes cannot be shared out among copies of the teacher",
            where="teacher.tensor, teacher.pipeline, teacher.fsdp, teacher.zero",
            found=f"{world} processes, {each} to a copy",
            expected=f"a multiple of {each} processes",
        )
    if teacher.kind == "deepspeed" and world != each:
        raise LayoutError(
            "ZeRO-3 takes all processes of a job for one copy of the teacher",
            where="teacher.zero",
            found=f"{world} processes, zero: {each}",
            remedy=f"set teacher.zero={world}, or start several jobs of {each}: they can share a cache",
        )
