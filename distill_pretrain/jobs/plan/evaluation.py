"""What an evaluation takes of a process's memory, from the sections eval and teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.jobs.plan.corpus import Corpus
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import scoring_layout
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.planning.costs import hf_parameters
from distill_pretrain.planning.evaluation import (
    EvaluationMemory,
    ScoredModel,
    evaluation_memory,
)
from distill_pretrain.planning.figures import Figure, Part, quantity
from distill_pretrain.planning.memory import GLIBC_KEEPS
from distill_pretrain.planning.parameters import rank_shapes, stages
from distill_pretrain.planning.student_job import ACTIVATION_BYTES
from distill_pretrain.teacher.config import TeacherConfig

_GB = 1e9


def evaluation_part(recipe: Recipe, corpus: Corpus, settings: PlanConfig) -> Part:
    """Return the part on the memory of a process that evaluates; the recipe has the section eval."""
    assert recipe.eval
    models: dict[str, ScoredModel | None] = {
        name: _student(path, recipe, corpus) for name, path in recipe.eval.models.items()
    }
    if recipe.teacher is not None:
        for number, member in enumerate(recipe.teacher.members):
            models[f"teacher {number + 1}" if number else "teacher"] = _teacher(member, corpus)
    unknown = [name for name, model in models.items() if model is None]
    title = "Memory of a process of eval"
    if unknown:
        how = f"not there, or of an unknown kind: {', '.join(unknown)}"
        return Part(
            title=title,
            figures=[Figure(name="evaluation", value=None, unit="B", basis="estimate", how=how)],
        )
    memory = evaluation_memory(
        [model for model in models.values() if model is not None],
        positions=recipe.eval.micro_batch_size * corpus.seq_len,
        vocab_size=corpus.vocab_size,
        has_teacher=recipe.teacher is not None,
        entries=_entries(recipe.eval.cache),
    )
    return Part(title=title, figures=_figures(memory, len(models), settings))


def _figures(memory: EvaluationMemory, num_models: int, settings: PlanConfig) -> list[Figure]:
    passing = memory.hidden + memory.logits + memory.temporaries
    on_cpu = settings.process_base_gb * _GB + memory.total + min(passing, GLIBC_KEEPS)
    values = (
        ("evaluation weights", memory.weights, f"of {num_models} models, on the fullest process"),
        ("evaluation hidden states", memory.hidden, "of a micro-batch and every model, with sums"),
        ("evaluation logits", memory.logits, "a chunk of head_chunk_tokens positions of each"),
        ("evaluation temporaries", memory.temporaries, "of a layer, or of scoring some rows"),
        (
            "evaluation peak",
            memory.total,
            f"the sum; whole logits of a micro-batch, never made, were {quantity(memory.whole_logits, 'B')}",
        ),
        (
            "evaluation process on a CPU",
            on_cpu,
            f"resident: {settings.process_base_gb:g} GB base (plan.process_base_gb) + peak + what glibc keeps",
        ),
    )
    return [
        Figure(name=name, value=value, unit="B", basis="estimate", how=how)
        for name, value, how in values
    ]


def _student(path: Path, recipe: Recipe, corpus: Corpus) -> ScoredModel | None:
    """A model of eval.models: as its folder describes it, or, before it is trained, the section model."""
    assert recipe.eval
    model = _model_of(path) or recipe.model
    if model is None:
        return None
    layout = scoring_layout(recipe.eval.tensor, recipe.eval.pipeline)
    return _megatron(model, layout, corpus, recipe.eval.dtype, recipe.eval.head_chunk_tokens)


def _model_of(path: Path) -> ModelConfig | None:
    """The architecture in a run, checkpoint or Hugging Face folder; None where there is none that can be read."""
    from distill_pretrain.checkpoint.hf.config import CONFIG, read_hf_model
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint

    try:
        if (path / CONFIG).is_file():
            return read_hf_model(path).model
        checkpoint = find_checkpoint(path)
        return trained_model(checkpoint.identity, checkpoint.folder).model
    except DistillPretrainError:
        return None


def _megatron(
    model: ModelConfig, layout: ParallelConfig, corpus: Corpus, dtype: str, chunk_tokens: int
) -> ScoredModel:
    sizes = {"vocab_size": corpus.vocab_size, "seq_len": corpus.seq_len}
    fullest = max(
        sum(map(math.prod, rank_shapes(model, layout, stage=stage, **sizes)))
        for stage in stages(layout)
    )
    return ScoredModel(
        parameters=fullest,
        hidden_size=model.hidden_size,
        inner_size=model.ffn_hidden_size
        * (model.experts.per_token if model.experts else 1)
        // layout.tensor,
        bytes_per_number=ACTIVATION_BYTES[dtype],
        chunk_tokens=chunk_tokens,
        columns=-(-corpus.vocab_size // layout.tensor),
        is_split=layout.tensor > 1,
    )


def _teacher(teacher: TeacherConfig, corpus: Corpus) -> ScoredModel | None:
    if teacher.kind == "megatron":
        model = _model_of(teacher.path)
        layout = scoring_layout(teacher.tensor, teacher.pipeline)
        if model is None:
            return None
        return _megatron(model, layout, corpus, teacher.dtype, teacher.head_chunk_tokens)
    parameters = hf_parameters(teacher.path)
    if parameters is None:
        return None
    raw: dict[str, Any] = json.loads((teacher.path / "config.json").read_text(encoding="utf-8"))
    return ScoredModel(
        parameters=parameters / teacher.processes,
        hidden_size=raw["hidden_size"],
        inner_size=raw["intermediate_size"] // teacher.tensor,
        bytes_per_number=ACTIVATION_BYTES[teacher.dtype],
        chunk_tokens=teacher.head_chunk_tokens,
        columns=-(-corpus.vocab_size // teacher.processes),
        is_split=teacher.processes > 1,
    )


def _entries(cache: str | None) -> int:
    if cache is None:
        return 0
    from distill_pretrain.cache.reader import load_plan
    from distill_pretrain.files.storage import open_storage

    try:
        return load_plan(open_storage(cache)).max_entries_per_token
    except DistillPretrainError:
        return 0
