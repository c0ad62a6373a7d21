"""Run folders and evaluation figures without any training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from distill_pretrain.eval.metrics import ModelScores, ScoreSettings
from distill_pretrain.reports.results import EvalResults


def write_run(folder: Path, *, steps: int, floor: float, kd: bool = False, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            ce = floor + 5 * np.exp(-step / 20) + rng.normal(0, 0.05)
            kl = ce - 1.5 if kd else None
            record = {
                "step": step,
                "loss": kl if kd else ce,
                "ce": ce,
                "kl": kl,
                "grad_norm": 1.0,
                "lr": 1e-3,
                "tokens": step * 2048,
                "tokens_per_second": float(rng.normal(9000, 300)),
                "seconds": 0.2,
            }
            file.write(json.dumps(record) + "\n")
    return folder


def make_scores(
    ce: float, kl: float | None, agreement: float, *, seed: int = 0, has_cache: bool = False
) -> ModelScores:
    """Scores with exactly these figures over 20 sequences of 50 positions."""
    shared = np.random.default_rng(99).normal(0, 0.3, 20)
    noise = shared + np.random.default_rng(seed).normal(0, 0.02, 20)
    settings = ScoreSettings(ece_bins=5, draft_lengths=(2, 4))
    sums = np.zeros((20, len(settings.columns)))
    sums[:, 0] = 50
    sums[:, 1] = 50 * (ce + noise - noise.mean())
    sums[:, 2] = 20
    sums[:, 3] = 50 * (kl or 0)
    sums[:, 4] = 50 * agreement
    sums[:, 5] = 50 * 2.25
    sums[:, 6] = 50 * 0.75 * agreement
    sums[:, 7] = 40
    sums[:, 8] = 40 * (ce + 0.5)
    sums[:, 9] = 40 * 2.0
    sums[:, 10:12] = 45 * 1.25, 45
    sums[:, 12:14] = 40 * 1.75, 40
    # Confidence 0.1 and 0.9 on average, right in 20% and 70%: ECE 0.5 * 0.1 + 0.5 * 0.2.
    bins = np.zeros((5, 3))
    bins[0], bins[4] = (500, 50, 100), (500, 450, 350)
    return ModelScores.of(
        sums, bins, settings=settings, has_teacher=kl is not None, has_cache=has_cache
    )


def write_eval(
    path: Path, scores: dict[str, ModelScores], *, teacher_path: Path | None = None
) -> EvalResults:
    teacher = None if teacher_path is None else {"path": str(teacher_path), "identity": {}}
    results = EvalResults.of(
        scores,
        inputs={"teacher": teacher},
        software={"torch": "1.2.3"},
        date="2026-01-02T03:04:05+00:00",
    )
    results.save(path)
    return results
