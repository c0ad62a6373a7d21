"""Measures what distillation, and this project, add to a training step of megatron-core.

    torchrun --nproc-per-node=2 tools/bench_step.py RECIPE.yaml [section.key=value ...] [--output FILE.json]

The recipe is one of `train`, with a cache. In one run and in turns, so that all see the same machine: steps of a
student that learns from the cache, of the same student on the text alone, and of a bare loop of the same model:
megatron-core's schedule, its vocabulary-parallel cross-entropy and its optimizer, on tensors that are there already.
Prints Markdown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reporting import append_line, command_line, environment, run, write_json

from distill_pretrain.config import load_recipe, require
from distill_pretrain.contracts import TokenBatch
from distill_pretrain.data.batches import StudentBatches, micro_batches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.data.sources import open_sources
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.mcore.runtime.parallel import model_parallel
from distill_pretrain.processes.process import local_device, process_group, set_cpu_threads
from distill_pretrain.train.callbacks import Verdict
from distill_pretrain.train.guard import StepGuard
from distill_pretrain.train.job import make_objective

WARMUP, STEPS_PER_ROUND = 3, 3
CE = ObjectiveConfig(ce_weight=1.0, kd_weight=0.0)
Step = Callable[[], None]


def student_step(
    recipe: Recipe,
    sources: Any,
    groups: Any,
    reading: ExitStack,
    objective: ObjectiveConfig,
    *,
    num_steps: int,
) -> Any:
    """(one step as `train` takes it, the student, its batches): data, loss, guard and update included."""
    from distill_pretrain.mcore.student.build import student_class

    assert recipe.data and recipe.model and recipe.train
    with_targets = objective.peak_kd_weight > 0
    batches = StudentBatches(
        [source.for_batches for source in sources],
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        data_rank=dist.get_rank(groups.data),
        data_size=dist.get_world_size(groups.data),
        device=local_device(),
        context_rank=dist.get_rank(groups.context),
        context_size=dist.get_world_size(groups.context),
    )
    vocab_size = sources[0].sequences.vocab_size
    loss = make_objective(
        objective, teacher=None, vocab_size=vocab_size, tensor_group=groups.tensor
    )
    student = student_class(recipe.optimizer)(
        model=recipe.model,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        groups=groups,
        vocab_size=vocab_size,
        seq_len=recipe.data.seq_len,
        precision=recipe.train.precision,
        seed=recipe.train.seed,
        steps=10**6,
        micro_batch_size=recipe.train.micro_batch_size,
        num_micro_batches=batches.num_micro_batches,
        loss_function=loss,
        num_terms=len(loss.term_names),
    )
    steps = range(num_steps)
    prefetched = reading.enter_context(
        PrefetchedBatches(
            batches,
            steps=steps,
            depth=recipe.data.prefetch_steps,
            with_targets=with_targets and student.is_last_stage,
        )
    )
    numbers, guard = iter(steps), StepGuard(recipe.train.bad_steps)

    def step() -> None:
        number = next(numbers)
        read = prefetched.host_batches(number)
        loss.begin_step(number + 1)
        student.step(
            micro_batches(read, batches.device, readers=len(student.chunks)),
            lambda seen: guard.judge(number, seen.terms[0].item(), seen.grad_norm) is Verdict.APPLY,
        )

    return step, student, batches


def bare_step(student: Any, batches: StudentBatches) -> Step:
    """One step of megatron-core alone: the model of `student` with its own cross-entropy, always on one batch."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.mcore.runtime.core import get_forward_backward_func, tensor_parallel

    def cross_entropy(logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        labels = batch.labels.clamp(min=0).transpose(0, 1).contiguous()
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)
        return (losses * (batch.labels >= 0).transpose(0, 1)).sum()

    def summed(num_tokens: torch.Tensor, loss: torch.Tensor) -> Any:
        return loss, num_tokens, {"loss": loss.detach()}

    def forward(iterator: Iterator[TokenBatch], model: torch.nn.Module) -> Any:
        batch = next(iterator)
        positions = torch.arange(batch.tokens.size(1), device=batch.tokens.device)
        output = model(batch.tokens, positions.expand_as(batch.tokens), None, labels=batch)
        return output, partial(summed, (batch.labels >= 0).sum().to(torch.int))

    for chunk in student.chunks:
        unwrap(chunk).loss_function = cross_entropy
    micro_batches = batches.step_batches(0, with_targets=False)
    schedule = get_forward_backward_func()

    def step() -> None:
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        student.optimizer.zero_grad()
        iterators = [iter(micro_batches) for _ in student.chunks]
        schedule(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=student.chunks,
            num_microbatches=batches.num_micro_batches,
            seq_length=batches.seq_len,
            micro_batch_size=student.micro_batch_size,
            forward_only=False,
        )
        student.optimizer.step()
        student.scheduler.step(increment=1)

    return step


def timed(
    steps: dict[str, Step], num_rounds: int, after_round: Callable[[dict[str, float]], None]
) -> dict[str, list[float]]:
    """Seconds per step of each, a figure per round; the order turns from round to round."""
    for step in steps.values():
        for _ in range(WARMUP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(num_rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            started = time.perf_counter()
            for _ in range(STEPS_PER_ROUND):
                steps[name]()
            dist.barrier()
            seconds[name].append((time.perf_counter() - started) / STEPS_PER_ROUND)
        after_round({name: values[-1] for name, values in seconds.items()})
    return seconds


def report(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians, spreads, and the ratios of speeds taken round by round."""

    def ratio(fast: str, slow: str) -> dict[str, float]:
        of_rounds = np.array(seconds[slow]) / np.array(seconds[fast])
        low, middle, high = np.quantile(of_rounds, [0.25, 0.5, 0.75])
        return {"median": float(middle), "low_quartile": float(low), "high_quartile": float(high)}

    return {
        "tokens_per_step": tokens,
        "seconds_per_step": {
            name: {
                "median": float(np.median(values)),
                "fastest": min(values),
                "slowest": max(values),
            }
            for name, values in seconds.items()
        },
        "speed_ratios": {
            "KD / CE": ratio("KD", "CE"),
            "KD / bare megatron-core": ratio("KD", "bare megatron-core"),
            "CE / bare megatron-core": ratio("CE", "bare megatron-core"),
        },
    }


def append_summary(path: Path | None, figures: dict[str, Any]) -> None:
    """A line of JSON for every kind of step and every ratio."""
    for name, found in figures["seconds_per_step"].items():
        speed = round(figures["tokens_per_step"] / found["median"], 1)
        line = {"figure": "step", "way": name, "seconds": found["median"]}
        append_line(path, {**line, "tokens_per_second": speed})
    for name, found in figures["speed_ratios"].items():
        append_line(path, {"figure": "ratio", "ratio": name, **found})


def main() -> None:
    """Measure, print, write."""
    parser = command_line(__doc__, recipe=True, figures=True)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    recipe = load_recipe(Recipe, arguments.recipe, arguments.overrides)
    require(recipe, "bench_step", "data", "model", "train")
    assert recipe.data and recipe.train
    set_cpu_threads(recipe.train.threads)
    with (
        process_group(),
        open_sources(recipe.data, kd_weight=1.0) as sources,
        model_parallel(recipe.parallel, seed=recipe.train.seed) as groups,
        ExitStack() as reading,
    ):
        num_steps = WARMUP + arguments.rounds * STEPS_PER_ROUND
        make = partial(student_step, recipe, sources, groups, reading, num_steps=num_steps)

        def show(seconds: dict[str, float]) -> None:
            if dist.get_rank() == 0:
                append_line(arguments.figures, {"figure": "round", "seconds": seconds})

        kd, _, _ = make(recipe.objective)
        ce, _, _ = make(CE)
        _, student, batches = make(CE)
        steps = {"KD": kd, "CE": ce, "bare megatron-core": bare_step(student, batches)}
        seconds = timed(steps, arguments.rounds, show)
        if dist.get_rank() == 0:
            tokens = recipe.train.global_batch_size * recipe.data.seq_len
            figures = {**environment("torch", "megatron-core"), **report(seconds, tokens)}
            print("| step | median s | fastest | slowest | tokens/s |\n|:--|--:|--:|--:|--:|")
            for name, found in figures["seconds_per_step"].items():
                print(
                    f"| {name} | {found['median']:.4f} | {found['fastest']:.4f} | {found['slowest']:.4f} "
                    f"| {tokens / found['median']:,.0f} |"
                )
            print()
            for name, found in figures["speed_ratios"].items():
                print(
                    f"- {name}: {found['median']:.3f} "
                    f"({found['low_quartile']:.3f} to {found['high_quartile']:.3f})"
                )
            append_summary(arguments.figures, figures)
            write_json(arguments.output, figures)


if __name__ == "__main__":
    run(main)
