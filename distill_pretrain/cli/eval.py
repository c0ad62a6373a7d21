"""`distill-pretrain eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.cli.console import progress, say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.dist.env import launch_rank, launch_world_size
from distill_pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.eval.results import EvalResults

SECTIONS = ("data", "eval", "teacher")

HELP = """
Scores trained models on held-out text: cross-entropy, perplexity, top-1 accuracy; with a teacher also
KL(teacher || model) over the whole vocabulary and how often both find the same token likeliest.

Reads   data.held_out_tokens (.bin/.idx), eval.models (run or checkpoint folders), teacher.path if there is a teacher
Writes  eval.output (JSON), and eval.output.recipe.yaml: the settings that made it

The teacher is scored too, under the name `teacher`. Under torchrun the sequences are divided
among the processes; the figures are the same. If eval.output already holds the figures of the same models on the same
sequences, nothing is done.

Example
  distill-pretrain eval recipe.yaml
  torchrun --nproc-per-node=2 -m distill_pretrain eval recipe.yaml

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 256}
    teacher: {path: runs/teacher}
    eval:
      models: {ce: runs/ce, kd: runs/kd}
      output: runs/eval.json
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Scores the models of a recipe."""
    require(recipe, "eval", "data", "eval")
    assert recipe.data and recipe.eval
    if recipe.data.held_out_tokens is None:
        raise ConfigError(
            "there is no held-out text to score on",
            where="data.held_out_tokens",
            expected="prefix of a .bin/.idx pair",
            remedy="`distill-pretrain tokenize` writes one, held_out, beside train",
        )
    models = _models(recipe)
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.dist.process import process_group, set_cpu_threads

    set_cpu_threads(0)
    with process_group():
        held_out = open_sequences(recipe.data, recipe.data.held_out_tokens)
        from distill_pretrain.mcore.config import ParallelConfig
        from distill_pretrain.mcore.parallel import model_parallel

        with model_parallel(ParallelConfig(), seed=0):
            results = _score(recipe, models, held_out)
    _print_table(results)
    say("figures are in", recipe.eval.output)


def _models(recipe: Recipe) -> dict[str, Path]:
    """eval.models, less the teacher where it is listed among them."""
    assert recipe.eval
    models = dict(recipe.eval.models)
    if recipe.teacher is None or "teacher" not in models:
        return models
    if models["teacher"].absolute() != recipe.teacher.path.absolute():
        raise ConfigError(
            "the name `teacher` stands for the model in the section teacher",
            where="eval.models.teacher",
            found=models["teacher"],
            expected=f"{recipe.teacher.path}, or another name",
            remedy="rename it",
        )
    del models["teacher"]
    return models


def _score(recipe: Recipe, models: dict[str, Path], held_out: SequenceData) -> EvalResults:
    from distill_pretrain.dist.process import on_first_rank
    from distill_pretrain.eval.heldout import evaluate
    from distill_pretrain.eval.report import installed_versions, today
    from distill_pretrain.eval.results import EvalResults
    from distill_pretrain.teacher.engines import open_engine

    assert recipe.data and recipe.eval

    def open_model(kind: str, path: Path, dtype: str) -> LogitsEngine:
        return open_engine(
            kind,
            path,
            dtype,
            vocab_size=held_out.vocab_size,
            seq_len=held_out.plan.seq_len,
            tokenizer_sha256=held_out.tokenizer_sha256,
        )

    teacher = None
    if recipe.teacher is not None:
        teacher = open_model(recipe.teacher.kind, recipe.teacher.path, recipe.teacher.dtype)
    engines = {
        name: open_model("megatron", path, recipe.eval.dtype) for name, path in models.items()
    }
    available = held_out.plan.num_sequences
    count = min(recipe.eval.num_sequences or available, available)
    inputs = _inputs(recipe, held_out, engines, models, teacher, count)
    output = recipe.eval.output
    done = on_first_rank(lambda: _already_done(output, inputs))
    if done is not None:
        say("already done:", output)
        return done
    share = -(-count // launch_world_size())
    with progress(share, "scoring", unit="sequences per process") as bar:
        scores = evaluate(
            engines,
            teacher,
            held_out.plan,
            num_sequences=count,
            micro_batch_size=recipe.eval.micro_batch_size,
            rank=launch_rank(),
            world_size=launch_world_size(),
            all_reduce_sum=_all_reduce_sum,
            progress=bar.advance,
        )
    results = EvalResults.of(scores, inputs=inputs, software=installed_versions(), date=today())
    if launch_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, output.with_name(f"{output.name}.recipe.yaml"))
        results.save(output)
    return results


def _inputs(
    recipe: Recipe,
    held_out: SequenceData,
    engines: dict[str, LogitsEngine],
    models: dict[str, Path],
    teacher: LogitsEngine | None,
    count: int,
) -> dict[str, Any]:
    """All that decides the figures."""
    reference = None
    if teacher is not None:
        assert recipe.teacher
        reference = {"path": str(recipe.teacher.path), "identity": teacher.identity}
    return {
        "held_out": held_out.index.fingerprint.as_dict(),
        "sequence_plan_id": held_out.plan.plan_id,
        "seq_len": held_out.plan.seq_len,
        "vocab_size": held_out.vocab_size,
        "num_sequences": count,
        "models": {
            name: {"path": str(models[name]), "identity": engine.identity}
            for name, engine in engines.items()
        },
        "teacher": reference,
    }


def _already_done(output: Path, inputs: dict[str, Any]) -> EvalResults | None:
    """The figures of an earlier run with the same inputs."""
    from distill_pretrain.eval.results import EvalFileError, EvalResults

    try:
        results = EvalResults.load(output)
    except EvalFileError:
        return None
    return results if results.inputs == inputs else None


def _all_reduce_sum(state: torch.Tensor) -> None:
    import torch.distributed as dist

    from distill_pretrain.dist.process import local_device

    moved = state.to(local_device())
    dist.all_reduce(moved)
    state.copy_(moved)


def _print_table(results: EvalResults) -> None:
    width = max(map(len, [*results.scores, "model"]))
    say(f"{'model':<{width}}  held-out CE  perplexity  KL(teacher||model)  top-1 agreement")
    for name, score in results.scores.items():
        kl = "-" if score["kl"] is None else f"{score['kl']:.4f}"
        agreement = "-" if score["top1_agreement"] is None else f"{score['top1_agreement']:.1%}"
        say(
            f"{name:<{width}}  {score['ce']:>11.4f}  {score['perplexity']:>10.3f}  {kl:>18}  {agreement:>15}"
        )
