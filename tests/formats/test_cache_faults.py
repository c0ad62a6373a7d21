"""The fault tests of tools/stress_cache.py with small counts; run the tool for the promised ones."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
stress = importlib.import_module("stress_cache")

CODECS = ("raw", "hc")
SAMPLERS = ("systematic", "topk")


@cache
def small(codec: str, sampler: str = "systematic"):
    return stress.readers_sample(codec, sampler)


@cache
def large(codec: str):
    return stress.writers_sample(codec, "systematic")


def check(result: dict) -> dict:
    assert result["passed"], result
    return result


@pytest.mark.parametrize("codec", CODECS)
def test_killed_writers_and_damaged_tails_leave_the_bytes_of_an_unbroken_run(codec: str):
    found = check(stress.kill(large(codec), kills=6, seed=3))
    assert found["kills"] >= 6


@pytest.mark.parametrize("codec", CODECS)
def test_three_writers_on_the_same_shards_leave_the_bytes_of_one(codec: str):
    check(stress.race(large(codec), rounds=1))


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_in_any_file_is_never_read_as_other_data(codec: str):
    found = check(stress.bits(small(codec), stride=151))
    assert found["detected"] > 200


@pytest.mark.parametrize("codec", CODECS)
def test_a_cut_file_is_detected_before_and_after_it_is_opened(codec: str):
    check(stress.truncate(small(codec), stride=89))


def test_a_cache_used_with_anything_else_says_what_differs():
    found = check(stress.misalign(small("raw")))
    assert all("remedy: " in message for message in found["messages"].values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hostile_files_only_raise_cache_errors_and_allocate_little(codec: str, sampler: str):
    check(stress.fuzz(small(codec, sampler), files=200, seed=7))


@pytest.mark.parametrize("codec", CODECS)
def test_a_full_disk_is_an_error_with_a_remedy_and_loses_nothing(codec: str):
    check(stress.diskfull(large(codec), sizes=4))
