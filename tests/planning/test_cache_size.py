"""Cache sizes foreseen from pilots, against caches that are written here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill_pretrain.errors import ConfigError
from distill_pretrain.planning.cache_size import (
    CacheGeometry,
    Pilot,
    Targets,
    cache_bytes,
    density_without_pilot,
    load_pilot,
    shard_bytes,
)
from tests.support.cache_samples import make_plan, write_cache

KIND = Targets(sampler="systematic", num_draws=7)


def written(folder: Path, num_sequences: int, *, codec: int, **changes: int) -> Path:
    sizes = {"seq_len": 200, "block_tokens": 96, "shard_sequences": 8, **changes}
    return write_cache(folder, make_plan(codec=codec, num_sequences=num_sequences, **sizes))


def geometry(codec: str, num_sequences: int, **changes: int) -> CacheGeometry:
    whole = CacheGeometry(
        num_sequences=num_sequences,
        seq_len=200,
        block_tokens=96,
        shard_sequences=8,
        vocab_size=300,
        codec=codec,
    )
    return replace(whole, **changes)


@pytest.mark.parametrize(("codec", "number"), [("hc", 3), ("raw", 1)])
def test_a_pilot_foretells_the_bytes_and_files_of_a_larger_cache(tmp_path, codec, number):
    pilot = Pilot.load(written(tmp_path / "pilot", 5, codec=number))
    whole = written(tmp_path / "whole", 60, codec=number, block_tokens=50)
    wanted = geometry(codec, 60, block_tokens=50)
    files = [path for path in whole.iterdir() if not path.name.startswith(".")]
    shards = sum(path.stat().st_size for path in files if path.suffix == ".dpt")
    assert shard_bytes(wanted, KIND, pilot.density(KIND)) == pytest.approx(shards, rel=0.03)
    everything = sum(path.stat().st_size for path in files)
    assert cache_bytes(wanted, KIND, pilot.density(KIND)) == pytest.approx(everything, rel=0.05)
    # The writer here leaves no recipe.yaml, and raw caches have no tables.
    assert wanted.files == len(files) + (1 if codec == "hc" else 2)


@pytest.fixture
def report(tmp_path) -> Path:
    path = tmp_path / "estimators.json"
    samplers = [
        {
            "sampler": {"name": name, "num_draws": n, "seed": 1, "top_p": None},
            "error": 0.5 / n,
            "error_renormalised": None,
            "bias": 0.0,
            "unique_ids": ids,
            "hc_bytes": ids,
        }
        for name, n, ids in (("systematic", 10, 6.0), ("systematic", 50, 20.0), ("topk", 12, 12.0))
    ]
    path.write_text(json.dumps({"positions": 99, "vocab_size": 300, "samplers": samplers}))
    return path


def test_a_measured_kind_is_taken_as_it_is_and_another_n_is_an_estimate(report):
    pilot = Pilot.load(report)
    measured = pilot.density(Targets(sampler="systematic", num_draws=50))
    assert (measured.entries, measured.basis) == (20.0, "pilot")
    scaled = pilot.density(Targets(sampler="systematic", num_draws=100))
    assert scaled.basis == "estimate" and 20 * 1.5 < scaled.entries < 20 * 1.6
    assert pilot.density(Targets(sampler="topk", num_draws=24)).entries == 24


def test_a_pilot_without_the_sampler_or_that_is_none_is_refused(report, tmp_path):
    with pytest.raises(ConfigError, match="says nothing of this sampler"):
        Pilot.load(report).density(Targets(sampler="multinomial", num_draws=50))
    for bad in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ConfigError, match=r"plan\.pilot"):
            load_pilot(bad)


def test_without_a_pilot_the_papers_curve_is_an_assumption():
    density = density_without_pilot(Targets(sampler="systematic", num_draws=50))
    assert density.basis == "assumption"
    assert density.entries == pytest.approx(12.0, abs=0.1)
