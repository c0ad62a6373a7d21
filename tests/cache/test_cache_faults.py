"""The fault tests of tools/stress_cache.py with small counts; run the tool for the promised ones."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from stress import hostile, readers, samples, writers

CODECS = ("raw", "hc")


@cache
def small(codec: str, sampler: str = "systematic"):
    return samples.readers_sample(codec, sampler)


@cache
def large(codec: str):
    return samples.writers_sample(codec, "systematic")


def check(result: dict) -> dict:
    assert result["passed"], result
    return result


@pytest.mark.parametrize(("codec", "kills"), [("raw", 20), ("hc", 4)])
def test_killed_writers_and_damaged_tails_leave_the_bytes_of_an_unbroken_run(
    codec: str, kills: int
):
    found = check(writers.kill(large(codec), kills=kills, seed=3))
    assert found["kills"] >= kills


@pytest.mark.parametrize(("codec", "rounds"), [("raw", 2), ("hc", 1)])
def test_three_writers_of_one_cache_leave_the_bytes_of_one(codec: str, rounds: int):
    check(writers.race(large(codec), rounds=rounds))


@pytest.mark.parametrize(("codec", "stride"), [("raw", 151), ("hc", 397)])
def test_a_flipped_bit_in_any_file_is_never_read_as_other_data(codec: str, stride: int):
    found = check(readers.bits(small(codec), stride=stride))
    assert found["detected"] > 200


@pytest.mark.parametrize(("codec", "stride"), [("raw", 89), ("hc", 233)])
def test_a_cut_file_is_detected_before_and_after_it_is_opened(codec: str, stride: int):
    check(readers.truncate(small(codec), stride=stride))


def test_a_cache_used_with_anything_else_says_what_differs():
    found = check(readers.misalign(small("raw")))
    assert all("remedy: " in message for message in found["messages"].values())


@pytest.mark.parametrize(
    ("codec", "sampler", "files"),
    [
        ("raw", "systematic", 400),
        ("raw", "topk", 200),
        ("hc", "systematic", 200),
        ("hc", "topk", 200),
    ],
)
def test_hostile_files_only_raise_cache_errors_and_allocate_little(
    codec: str, sampler: str, files: int
):
    check(hostile.fuzz(small(codec, sampler), files=files, seed=7))


@pytest.mark.parametrize("codec", CODECS)
def test_a_full_disk_is_an_error_with_a_remedy_and_loses_nothing(codec: str):
    found = check(writers.diskfull(large(codec), sizes=4))
    assert found["rlimit_fsize"]["refused with a remedy, then completed"] >= 3
