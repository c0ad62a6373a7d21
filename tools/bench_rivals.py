"""Measures what other projects' cached targets cost and say, beside ours, on the same logits of one teacher.

    python tools/bench_rivals.py RECIPE.yaml [section.key=value ...] [--sequences N] [--student RUN] [--output FILE]

The recipe has the sections data, teacher, capture and compare, as launch/recipes/real_teacher/compare.yaml. In one run:
the first sequences' logits go through each project's own writer and come back through its own reader; bytes and
processor time of both; squared error and bias against the teacher's distribution, and of the loss's gradient at a
student; the cost of each loss at one shape. Where the comparison of the recipe has been run (launch/real_teacher.sh),
its students are held beside them; --earlier adds them to a report that was made before they were. Prints Markdown.

Megatron-LM's part needs megatron-core 0.19 and zstandard, on Python 3.12 or later: `launch/test.sh --matrix --make
3.12` makes such an environment, .matrix/3.12; `pip install zstandard array-record` there, the latter for MaxText's.
DistillKit is on no index: clone github.com/arcee-ai/DistillKit and put the clone on PYTHONPATH. What cannot be had is
left out with its reason.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import command_line, environment, run, write_json
from rivals.figures import LayoutSums, squared_bias
from rivals.kept import Chunk, Layout, dense, implied
from rivals.losses import costs, cross_entropy, difference, our_loss
from rivals.megatron import MegatronLM, versions
from rivals.others import (
    DISTILLKIT_BUDGET,
    DISTILLKIT_NORMALIZED,
    DISTILLKIT_RECOMMENDED,
    DistillKit,
    MaxText,
    distillkit_bytes,
)
from rivals.ours import Ours
from rivals.students import students
from rivals.tables import markdown

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.config import load_recipe, require
from distill_pretrain.contracts import IGNORED_LABEL, LogitsEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.jobs.capture import open_replica
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.sampling.samplers import Sampler
from distill_pretrain.teacher.capture import make_plans
from distill_pretrain.teacher.estimators import softmax64

SEEDS = 8
BIAS_POSITIONS = 32
"""Of a chunk, on which a sampler draws under other seeds."""
READ_PASSES = 5
OURS = (
    ("systematic", 50, None, "as drawn"),
    ("systematic", 12, None, "as drawn"),
    ("systematic", 300, None, "as drawn"),
    ("systematic", 1024, None, "as drawn"),
    ("multinomial", 50, None, "as drawn"),
    ("topk", 128, None, "ghost"),
    ("topp", 128, 0.95, "ghost"),
)


def layouts(
    folder: Path, plan: CachePlan, rows: int, seed: int
) -> tuple[list[Layout], dict[str, str]]:
    """Every way to keep targets that can be had here, and why the others cannot."""
    made: list[Layout] = []
    missing: dict[str, str] = {}
    for number, (name, draws, top_p, use) in enumerate(OURS):
        sampler = Sampler(name=name, num_draws=draws, seed=seed, top_p=top_p)
        made.append(Ours(sampler, folder / f"ours-{number}", plan, use))  # type: ignore[arg-type]
    shape = {"rows": rows, "seq_len": plan.seq_len, "num_samples": plan.num_sequences}
    others: dict[str, Callable[[], Layout]] = {
        "Megatron-LM 128": lambda: MegatronLM(folder / "megatron", **shape),
        "Megatron-LM top-p 0.95": lambda: MegatronLM(folder / "megatron-p", top_p=0.95, **shape),
        "DistillKit 128": lambda: DistillKit(
            DISTILLKIT_RECOMMENDED, folder / "distillkit-128", plan.vocab_size
        ),
        "DistillKit 128, normalize_t": lambda: DistillKit(
            DISTILLKIT_NORMALIZED, folder / "distillkit-128-normalized", plan.vocab_size
        ),
        "DistillKit 50": lambda: DistillKit(
            DISTILLKIT_BUDGET, folder / "distillkit-50", plan.vocab_size
        ),
        "MaxText 64": lambda: MaxText(64, folder / "maxtext"),
    }
    for name, make in others.items():
        try:
            made.append(make())
        except ImportError as error:
            missing[name] = str(error)
    return made, missing


def chunks(
    engine: LogitsEngine, sequences: SequenceData, count: int, rows: int
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Some sequences at a time with the engine's logits, and their labels int64[T]."""
    length = sequences.plan.seq_len
    for first in range(0, count, rows):
        tokens, labels = sequences.plan.read(np.arange(first, min(first + rows, count)))
        scored = engine.chunks(torch.from_numpy(tokens.astype(np.int64)).to(engine.device))
        logits = np.concatenate([part.logits.cpu().float().numpy() for part in scored])
        logits = np.ascontiguousarray(logits[:, : sequences.vocab_size])
        positions = np.arange(first * length, first * length + len(logits), dtype=np.uint64)
        yield (
            Chunk(logits, tokens, positions),
            torch.from_numpy(labels.reshape(-1).astype(np.int64)),
        )


def unigram(sequences: SequenceData) -> np.ndarray:
    """float64[V]: how often each id is in the corpus, a half added."""
    tokens = sequences.plan.read(np.arange(min(sequences.num_sequences, 4096)))[0]
    seen = np.bincount(tokens.reshape(-1), minlength=sequences.vocab_size) + 0.5
    return seen / seen.sum()


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds of this process's time."""
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def read_seconds(layout: Layout) -> float:
    """Median of some passes over everything, files in the page cache."""
    return float(
        np.median([timed(lambda: [None for _ in layout.read()])[1] for _ in range(READ_PASSES)])
    )


def add_bias(
    layout: Layout, sums: LayoutSums, chunk: Chunk, teacher: np.ndarray, seed: int
) -> None:
    """Estimate a sampler's bias on a few positions: the others' is their error.

    Its loss is linear in the target, so the gradient's bias is the target's with the sign changed.
    """
    if not isinstance(layout, Ours) or layout.use != "as drawn":
        return
    rows = slice(0, min(BIAS_POSITIONS, len(teacher)))
    vocab_size = teacher.shape[1]
    draws = [dense(layout.again(chunk, rows, seed + 1 + n), vocab_size) for n in range(SEEDS)]
    sums.target.biases.append(squared_bias(draws, teacher[rows]))
    sums.gradient.biases.append(sums.target.biases[-1])


def measure(recipe: Recipe, count: int, rows: int, student_run: Path | None) -> dict[str, Any]:
    """Everything but the students of the comparison, as JSON-able figures."""
    assert recipe.capture and recipe.teacher and recipe.data
    seed = recipe.capture.seed
    with open_replica(recipe) as (sequences, engine), tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        plan = next(iter(make_plans(sequences, recipe.capture, engine.identity).values()))
        plan = plan.with_extent(count)
        found, missing = layouts(Path(folder), plan, rows, seed)
        written = dict.fromkeys((layout.name for layout in found), 0.0)
        for chunk, _ in chunks(engine, sequences, count, rows):
            for layout in found:
                written[layout.name] += timed(lambda: layout.write(chunk))[1]  # noqa: B023
        tokens = count * sequences.plan.seq_len
        report: dict[str, Any] = {"layouts": {}, "missing": missing, "tokens": tokens}
        for layout in found:
            size, closing = timed(layout.finish)
            report["layouts"][layout.name] = {
                "basis": layout.basis,
                "use": layout.use,
                "bytes_per_token": size / tokens,
                "write_s_per_mtok": (written[layout.name] + closing) / tokens * 1e6,
                "read_s_per_mtok": read_seconds(layout) / tokens * 1e6,
            }
            if isinstance(layout, Ours):
                report["layouts"][layout.name]["table_bytes"] = layout.table_bytes
        figures, losses, of_teacher = compare(
            found,
            engine,
            student_engine(recipe, sequences, student_run),
            sequences,
            count,
            rows,
            seed,
        )
        for name, row in figures.items():
            report["layouts"][name] |= row
        vocab_size = sequences.vocab_size
        return (
            report
            | losses
            | {
                "teacher": of_teacher | {"vocab_size": vocab_size, "identity": engine.identity},
                "student": "unigram of the corpus" if student_run is None else str(student_run),
                "distillkit_arithmetic": {
                    f"DistillKit {chosen['k']}": distillkit_bytes(chosen, vocab_size)
                    for chosen in (DISTILLKIT_RECOMMENDED, DISTILLKIT_BUDGET)
                },
            }
        )


def student_engine(
    recipe: Recipe, sequences: SequenceData, path: Path | None
) -> LogitsEngine | None:
    """A student of this project in a run folder."""
    if path is None:
        return None
    from distill_pretrain.teacher.engines import open_engine

    return open_engine(
        "megatron",
        path,
        "fp32",
        vocab_size=sequences.vocab_size,
        seq_len=sequences.plan.seq_len,
        tokenizer_digests=sequences.tokenizer_digests,
    )


def compare(
    found: list[Layout],
    engine: LogitsEngine,
    student: LogitsEngine | None,
    sequences: SequenceData,
    count: int,
    rows: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """Errors of every layout; losses, on the first chunk; what the teacher is like."""
    sums = {layout.name: LayoutSums() for layout in found}
    readers = {layout.name: layout.read() for layout in found}
    losses: dict[str, Any] = {}
    entropy = top1 = 0.0
    scored = chunks(student, sequences, count, rows) if student else None
    flat_guess = np.log(unigram(sequences)).astype(np.float32)
    for chunk, labels in chunks(engine, sequences, count, rows):
        own = next(scored)[0].logits if scored else np.broadcast_to(flat_guess, chunk.logits.shape)
        teacher, guess = softmax64(chunk.logits), softmax64(own)
        entropy -= float((teacher * np.log(np.maximum(teacher, 1e-300))).sum())
        top1 += float(teacher.max(axis=1).sum())
        first = {}
        for layout in found:
            read = next(readers[layout.name])
            kept = layout.kept(read)
            first[layout.name] = (layout, read, kept)
            one = sums[layout.name]
            one.add(dense(kept, teacher.shape[1]), implied(kept, guess, layout.use), teacher, guess)
            add_bias(layout, one, chunk, teacher, seed)
        losses = losses or losses_on(first, torch.from_numpy(own.copy()), labels)
    positions = count * sequences.plan.seq_len
    of_teacher = {"entropy": entropy / positions, "top1": top1 / positions}
    return {name: one.figures() for name, one in sums.items()}, losses, of_teacher


def losses_on(first: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Step costs at the shape of a chunk, and Megatron-LM's loss beside ours on its own targets."""
    labels = torch.where(labels == IGNORED_LABEL, torch.zeros_like(labels), labels)
    compared = {
        "cross-entropy, PyTorch's": cross_entropy(labels),
        "cross-entropy, ours": our_loss(None, labels, "drop"),
    }
    same = {}
    for name, (layout, read, kept) in first.items():
        if isinstance(layout, Ours) and name in ("systematic 50", "topk 128"):
            residual = "drop" if layout.use == "as drawn" else "ghost"
            compared[f"ours, {name}"] = our_loss(kept, labels, residual)
        if isinstance(layout, MegatronLM):
            theirs = compared[f"topk_kl_div, {name}"] = flat(layout, read)
            same[name] = difference(our_loss(kept, labels, "ghost"), theirs, logits)
    step = {"rows": len(logits), "losses": costs(compared, logits)}
    return {"step": step, "same_loss": same}


def flat(layout: MegatronLM, read: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Megatron-LM's loss of logits [B * L, V], as a view of the shape [L, B, V] that it takes."""
    length, batch = read[0].shape[:2]
    return lambda logits: layout.loss(logits.view(batch, length, -1).transpose(0, 1), read)


def main() -> None:
    """The command."""
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--sequences", type=int, default=16, help="to write and read (default 16)")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a chunk (default 2)")
    parser.add_argument(
        "--student", type=Path, metavar="RUN", help="at which gradients are taken; else unigrams"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="measure nothing: add the students to this report",
    )
    args = parser.parse_intermixed_args()
    recipe = load_recipe(Recipe, args.recipe, args.overrides)
    require(recipe, "bench_rivals", "data", "teacher", "capture", "model", "train", "compare")
    if args.earlier:
        report = json.loads(args.earlier.read_text())
    else:
        count = args.sequences - args.sequences % args.rows
        report = measure(recipe, count, args.rows, args.student)
        report["environment"] = environment("torch", "transformers", "megatron-core")
        if "Megatron-LM 128" not in report["missing"]:
            report["environment"] |= versions()
    report["students"] = students(recipe)
    print(markdown(report))
    write_json(args.output, report)


if __name__ == "__main__":
    run(main)
