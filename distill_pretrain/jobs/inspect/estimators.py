"""What `distill-pretrain inspect --estimators` says: the samplers, measured on a recipe's teacher and corpus."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.config import require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.capture import open_replica
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.sampling.samplers import Sampler
    from distill_pretrain.teacher.estimator_sums import SamplerFigures
    from distill_pretrain.teacher.estimators import EstimatorStudy

MOST_DRAWS = 1024
BATCH_SHAPES = (1, 3, 16)
BATCH_SHAPE_SEQUENCES = 16


def show_estimators(
    recipe: Recipe,
    *,
    draws: tuple[int, ...],
    top_p: tuple[float, ...],
    num_sequences: int,
    output: Path | None = None,
) -> None:
    """Measure the samplers on a recipe's teacher and corpus, and print the figures.

    Args:
        recipe: with the sections data, teacher and capture.
        draws: per position, and k of top-k.
        top_p: masses of top-p, capped at the most draws.
        num_sequences: to score.
        output: JSON file for the figures.

    Raises:
        ConfigError: options or a recipe that cannot be used.
    """
    _check({"--draws": draws, "--top-p": top_p, "--sequences": num_sequences})
    require(recipe, "inspect --estimators", "data", "teacher", "capture")
    assert recipe.data and recipe.teacher and recipe.capture
    from distill_pretrain.data.sources import require_one_source
    from distill_pretrain.files.atomic import publish_bytes
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.teacher.capture import software_versions
    from distill_pretrain.teacher.estimators import moved_by_batch_shape, study_estimators

    require_one_source(recipe.data, "inspect --estimators", "capture.output_dir")
    if output:
        require_writable(output)
    samplers = _samplers(draws, top_p, recipe.capture.seed)
    size = recipe.capture.sequences_per_pass(recipe.data.seq_len)
    with open_replica(recipe) as (sequences, engine):
        study = study_estimators(
            engine, sequences, samplers, num_sequences=num_sequences, micro_batch_size=size
        )
        systematic = next(s for s in reversed(samplers) if s.name == "systematic")
        few = min(num_sequences, sequences.num_sequences, BATCH_SHAPE_SEQUENCES)
        moved = {
            other: moved_by_batch_shape(
                engine, sequences, systematic, num_sequences=few, micro_batch_size=size, other=other
            )
            for other in BATCH_SHAPES
        }
        identity = engine.identity
    _print(study, size, moved)
    if output:
        report = {
            "software": software_versions(*{one.kind for one in recipe.teacher.members}),
            "teacher": identity,
            "tokens": sequences.index.fingerprint.as_dict(),
            **asdict(study),
            "batch_shape": [
                {"micro_batch_size": other, "instead_of": size, "moved": m, "positions": of}
                for other, (m, of) in moved.items()
            ],
        }
        publish_bytes(output, (json.dumps(_without_nan(report), indent=1) + "\n").encode())


def _check(options: dict[str, Any]) -> None:
    bad = {
        "--draws": not all(1 <= n <= MOST_DRAWS for n in options["--draws"]),
        "--top-p": not all(0 < p < 1 for p in options["--top-p"]),
        "--sequences": options["--sequences"] < 1,
    }
    expected = {
        "--draws": f"1 to {MOST_DRAWS} each",
        "--top-p": "more than 0, less than 1 each",
        "--sequences": "1 or more",
    }
    for option in (name for name, is_bad in bad.items() if is_bad):
        raise ConfigError(
            "an option cannot be used",
            where=option,
            found=options[option],
            expected=expected[option],
            remedy="correct it",
        )
    if launch_world_size() > 1:
        raise ConfigError(
            "estimators are measured by one process",
            found=f"{launch_world_size()} processes",
            remedy="start it without torchrun",
        )


def _samplers(draws: tuple[int, ...], top_p: tuple[float, ...], seed: int) -> list[Sampler]:
    from distill_pretrain.sampling.kinds import SAMPLERS
    from distill_pretrain.sampling.samplers import Sampler

    by_draws = [
        Sampler(name=name, num_draws=n, seed=seed)
        for name, kind in SAMPLERS.items()
        if not kind.own_settings
        for n in sorted(set(draws))
    ]
    cap = max(draws)
    masses = sorted(set(top_p))
    return [*by_draws, *(Sampler(name="topp", num_draws=cap, seed=seed, top_p=p) for p in masses)]


def _print(study: EstimatorStudy, size: int, moved: dict[int, tuple[int, int]]) -> None:
    say(
        f"{study.positions:,} positions, vocabulary {study.vocab_size:,}, "
        f"mean entropy {study.entropy:.2f} nats, mean top-1 mass {study.top1:.3f}"
    )
    say()
    say(
        "sampler               unique  bytes/position     error, E||target - t||^2           "
        "bias, |E target - t|"
    )
    say(
        "                         ids    hc   24-bit    exact  drawn/exact  renormalised      "
        "raw  renormalised"
    )
    for figures in study.samplers:
        say(_line(figures))
    say()
    say("variance of multinomial / systematic    at equal N    at equal stored entries (its N)")
    for ratio in study.ratios:
        say(
            f"  N = {ratio.num_draws:<4}                            {ratio.at_equal_draws:8.2f}"
            f"      {ratio.at_equal_entries:8.2f}  ({ratio.draws_at_equal_entries:.1f})"
        )
    say()
    for other, (changed, positions) in moved.items():
        say(
            f"micro-batches of {other} instead of {size}: "
            f"targets of {changed} of {positions:,} positions move"
        )


def _line(figures: SamplerFigures) -> str:
    s = figures.sampler
    name = (
        f"topp {s.top_p} (<= {s.num_draws})" if s.top_p is not None else f"{s.name} {s.num_draws}"
    )
    drawn = figures.error_drawn / figures.error_formula_there if figures.error_formula_there else 1
    return (
        f"{name:<20} {figures.unique_ids:7.2f} {figures.hc_bytes:6.1f} {figures.raw_bytes:7.1f} "
        f"{figures.error:9.2e} {drawn:11.3f} {_maybe(figures.error_renormalised, '.2e'):>13} "
        f"{figures.bias:9.1e} {_maybe(figures.bias_renormalised, '.1e'):>12}"
    ).rstrip()


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
