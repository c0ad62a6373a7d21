"""Where the time of a training step goes on this GPU, by torch.profiler: the student of $WORK/student.yaml."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from bench_step import student_step
from figures import end_without_gpu, record
from torch.profiler import ProfilerActivity, profile

from distill_pretrain.config import load_recipe
from distill_pretrain.data.sources import open_sources
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.mcore.runtime.parallel import model_parallel
from distill_pretrain.processes.process import process_group

WARMUP, STEPS, SHOWN = 5, 3, 30


def main() -> None:
    recipe = load_recipe(Recipe, Path(os.environ["WORK"]) / "student.yaml", [])
    assert recipe.data and recipe.train
    end_without_gpu()
    with (
        process_group(),
        open_sources(recipe.data, kd_weight=1.0) as sources,
        model_parallel(recipe.parallel, seed=recipe.train.seed) as groups,
        ExitStack() as reading,
    ):
        step, _, _ = student_step(
            recipe, sources, groups, reading, recipe.objective, num_steps=WARMUP + STEPS
        )
        for _ in range(WARMUP):
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        averages = seen.key_averages()
        print(averages.table(sort_by="self_device_time_total", row_limit=60))
        of_device = sorted(averages, key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in of_device)
        for row in of_device[:SHOWN]:
            record(
                "profile",
                name=row.key[:120],
                calls_per_step=round(row.count / STEPS, 1),
                ms_per_step=round(row.self_device_time_total / 1e3 / STEPS, 4),
                share=round(row.self_device_time_total / total, 4) if total else None,
            )
        # What makes the host wait for the GPU, or may.
        waits = {row.key: row.count / STEPS for row in averages if "Synchronize" in row.key}
        record("waits", per_step=waits)


if __name__ == "__main__":
    main()
