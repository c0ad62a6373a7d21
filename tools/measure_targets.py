"""Measures, on a real teacher, what the samplers promise: variance, unique ids, and stability over batch shapes.

    python tools/measure_targets.py launch/recipes/quickstart/capture.yaml [section.key=value ...] [--output FILE.json]

Variances are exact, from the teacher's softmax t in float64, summed over the vocabulary and averaged over positions:
multinomial sum t (1 - t) / N, systematic sum f (1 - f) / N^2 with f the fractional part of N t; the empirical column
draws real targets under several seeds as a check.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from reporting import command_line, write_json

from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.config import load_recipe, require
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.dist.process import process_group, set_cpu_threads
from distill_pretrain.mcore.config import ParallelConfig
from distill_pretrain.mcore.parallel import model_parallel
from distill_pretrain.sampling import sample_targets
from distill_pretrain.teacher.engines import open_engine

DRAWS = (10, 30, 50, 100)
BATCH_SHAPES = (1, 3, 16)


def exact_figures(probs: np.ndarray) -> list[dict[str, float]]:
    """Variance and unique ids of both unbiased samplers, from probs float64[T, V]."""

    def multinomial(n: float) -> tuple[float, float]:
        unique = -np.expm1(n * np.log1p(-np.minimum(probs, 1 - 1e-15)))
        return (probs * (1 - probs)).sum(1).mean() / n, unique.sum(1).mean()

    rows = []
    for n in DRAWS:
        fraction = np.modf(n * probs)[0]
        systematic = (fraction * (1 - fraction)).sum(1).mean() / n**2
        entries = np.minimum(1.0, n * probs).sum(1).mean()
        paper, paper_entries = multinomial(n)
        low, high = 1.0, 10.0 * n
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if multinomial(middle)[1] < entries else (low, middle)
        rows.append(
            {
                "num_draws": n,
                "unique_ids_multinomial": paper_entries,
                "unique_ids_systematic": entries,
                "variance_multinomial": paper,
                "variance_systematic": systematic,
                "ratio_at_equal_draws": paper / systematic,
                "ratio_at_equal_entries": multinomial(low)[0] / systematic,
            }
        )
    return rows


def empirical_variance(logits: np.ndarray, probs: np.ndarray, sampler: str, n: int) -> float:
    """Mean squared error of real targets around the softmax, summed over V, over 20 seeds."""
    positions = np.arange(len(logits), dtype=np.uint64)
    errors = []
    for seed in range(20):
        targets = sample_targets(logits, positions, sampler=sampler, num_draws=n, seed=seed)
        dense = np.zeros_like(probs)
        rows = np.repeat(np.arange(len(logits)), targets.entries_per_token)
        dense[rows, targets.ids] = targets.values / n
        errors.append(((dense - probs) ** 2).sum(1).mean())
    return float(np.mean(errors))


def moved_by_batch_shape(
    engine: Any, data: SequenceData, base: int, other: int, n: int
) -> dict[str, float]:
    """Share of positions whose systematic targets differ between two micro-batch sizes."""

    def targets(size: int) -> list[np.ndarray]:
        rows = []
        for start in range(0, 48, size):
            numbers = np.arange(start, min(start + size, 48))
            tokens, _ = data.plan.read(numbers)
            logits = engine.logits(torch.from_numpy(tokens.astype(np.int64)))
            flat = logits.reshape(-1, logits.size(-1)).cpu().numpy()
            positions = (
                numbers[:, None] * data.plan.seq_len + np.arange(data.plan.seq_len)
            ).reshape(-1)
            found = sample_targets(
                flat, positions.astype(np.uint64), sampler="systematic", num_draws=n, seed=1
            )
            pairs = np.stack((found.ids, found.values), axis=1)
            rows += np.split(pairs, np.cumsum(found.entries_per_token)[:-1])
        return rows

    a, b = targets(base), targets(other)
    moved = sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return {"micro_batch_size": other, "positions": len(a), "moved": moved, "share": moved / len(a)}


def main() -> int:
    """Measure, print, and write JSON."""
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_intermixed_args()
    recipe = load_recipe(Recipe, args.recipe, args.overrides)
    require(recipe, "capture", "data", "teacher", "capture")
    assert recipe.data and recipe.teacher and recipe.capture
    set_cpu_threads(1)
    data = open_sequences(recipe.data)
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        engine = open_engine(
            recipe.teacher.kind,
            recipe.teacher.path,
            recipe.teacher.dtype,
            vocab_size=data.vocab_size,
            seq_len=recipe.data.seq_len,
        )
        tokens, _ = data.plan.read(np.arange(args.sequences))
        logits = engine.logits(torch.from_numpy(tokens.astype(np.int64)))
        logits = logits.reshape(-1, logits.size(-1))
        probs = torch.softmax(logits.double(), -1).numpy()
        n = recipe.capture.num_draws
        some = logits.numpy()[:512]
        base = recipe.capture.micro_batch_size
        result = {
            "versions": {p: version(p) for p in ("torch", "megatron-core", "numpy")},
            "machine": platform.machine(),
            "teacher": engine.identity,
            "vocab_size": data.vocab_size,
            "positions": len(probs),
            "mean_entropy_nats": float(-(probs * np.log(np.maximum(probs, 1e-300))).sum(1).mean()),
            "mean_top1": float(probs.max(1).mean()),
            "samplers": exact_figures(probs),
            "empirical_variance_at_num_draws": {
                name: empirical_variance(some, probs[:512], name, n)
                for name in ("multinomial", "systematic")
            },
            "batch_shape": [
                moved_by_batch_shape(engine, data, base, other, n) for other in BATCH_SHAPES
            ],
        }
    print(json.dumps(result, indent=1))
    write_json(args.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
