"""The GPU kit without a GPU: its stages, a rehearsal of a call, its recipes, its tables."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_pretrain.config import load_recipe
from distill_pretrain.jobs.recipe import Recipe
from tests.support.distributed import REPOSITORY

KIT = REPOSITORY / "tools/gpu_day"
CALLS = ["call_1", "call_2"]


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    monkeypatch.syspath_prepend(str(KIT))


def call(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment, **variables},
    )


def figures(folder: Path, name: str = "call_1") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_call_without_a_gpu_runs_up_to_it(tmp_path):
    done = call(KIT / "call_1.sh", str(tmp_path), "compile", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "no GPU; everything up to it ran"
    outcomes = {f["stage"]: f["outcome"] for f in figures(tmp_path) if f["figure"] == "stage"}
    assert outcomes == dict.fromkeys(("environment", "compile", "kernels"), "no GPU")
    machine = figures(tmp_path)[0]
    assert machine["torch"] == torch.__version__ and machine["figure"] == "machine"
    compiled = {f["what"] for f in figures(tmp_path) if f["figure"] == "compiled"}
    assert compiled == {"cache coder", "sparse_kd", "teacher_sampling"}


STAGES = """
source "$KIT/stages.sh"
begin call_1 {seconds} "$@"
stage good 5 echo fine
stage slow 1 sleep 30
stage bad 5 sh -c 'echo reason; exit 3'
PYTHONPATH=$PYTHONPATH:tools/gpu_day
stage last 5 "$PYTHON" -c 'from figures import record; record("way", way="a", ms=1)'
finish
"""


def run_stages(folder: Path, *chosen: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """A call of four stages, of which one is too slow and one fails, on a stand-in for a machine with a GPU."""
    script = folder / "call.sh"
    script.write_text(STAGES.replace("{seconds}", str(seconds)))
    # Python for all but the look at the machine, which finds what it wants.
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *machine.py*|-) exit 0;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return call(script, str(folder / "out"), *chosen, KIT=str(KIT), PYTHON=str(python))


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path):
    done = run_stages(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: bad; out of time: slow"
    found = figures(tmp_path / "out")
    outcomes = {f["stage"]: f["outcome"] for f in found if f["figure"] == "stage"}
    assert outcomes == {
        "environment": "ok",
        "good": "ok",
        "slow": "stopped after 1 s",
        "bad": "failed",
        "last": "ok",
    }
    assert {"stage": "last", "figure": "way", "way": "a", "ms": 1} in found
    assert "    reason" in done.stdout and "fine" in (tmp_path / "out/call_1.log").read_text()


def test_only_the_stages_asked_for_run_and_none_after_the_end_of_the_time(tmp_path):
    assert run_stages(tmp_path, "good", "last").stdout.splitlines()[-1] == "every stage ran"
    done = run_stages(tmp_path, "good", seconds=3)
    assert done.stdout.splitlines()[-1] == "out of time: environment good"


@pytest.mark.parametrize("name", CALLS)
def test_a_call_names_files_that_are_there_and_says_how_it_is_used(name):
    text = (KIT / f"{name}.sh").read_text()
    for path in re.findall(r'(?:\$PYTHON" |pytest [^"\n]* |\d )((?:tools|tests)/\S+\.\w+)', text):
        assert (REPOSITORY / path).is_file(), path
        assert path.endswith(".py") or os.access(REPOSITORY / path, os.X_OK), path
    done = call(KIT / f"{name}.sh")
    assert done.returncode == 2 and done.stderr.startswith(f"usage: {name}.sh FOLDER")


@pytest.mark.parametrize("size", ["FULL", "TINY"])
def test_the_recipes_of_either_size_are_valid_and_need_no_more_text_than_there_is(tmp_path, size):
    import yaml

    inputs = importlib.import_module("inputs")
    for name, recipe in inputs.recipes(tmp_path, getattr(inputs, size)).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert load_recipe(Recipe, path, []).data.cache is None or name == "student"
    wanted = inputs.num_tokens(getattr(inputs, size))
    assert sum(map(len, inputs.documents(wanted))) == wanted


def test_the_errors_against_float64_are_those_of_rounding():
    kernel_times = importlib.import_module("kernel_times")
    for dtype, least, most in ((torch.float32, 0, 1e-5), (torch.bfloat16, 1e-4, 1e-2)):
        found = kernel_times.errors(dtype, 6, 200, device="cpu", backend="reference")
        for way in ("stages", "fused"):
            assert found[way]["loss_error"] < 1e-5
            assert least <= found[way]["gradient_error"] < most


RECORDED = [
    {"figure": "machine", "date": "2026-12-01", "cpu": "C", "cores": 16, "python": "3.12.3"},
    {"figure": "card", "name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132},
    {"figure": "kernel", "kernel": "gradient", "dtype": "bf16", "rows": 8192, "columns": 128256},
    {"figure": "ratio", "ratio": "KD / CE", "median": 0.98, "low_quartile": 0.97},
    {"figure": "unknown", "x": 1},
]


def test_tables_show_card_versions_and_the_later_of_two_figures(tmp_path, capsys):
    RECORDED[0] |= {"torch": "2.11.0", "torch_cuda": "13.0", "distill-pretrain": "0.1.0"}
    RECORDED[1] |= {"memory_gb": 150.1, "nccl": "2.28", "driver_version": "580.1"}
    timed = {**RECORDED[2], "ms": 1.25, "predicted_ms": 1.125, "gb_per_s": 3362}
    lines = [*RECORDED[:2], {**timed, "ms": 9.0}, timed, *RECORDED[3:]]
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]) + '{"figure": "kern')
    second.write_text("".join(json.dumps(line) + "\n" for line in lines[3:]))
    tables = importlib.import_module("tables")
    output = tmp_path / "docs/README.md"
    tables.main([str(first), str(second), "--output", str(output)])
    text = output.read_text()
    assert "NVIDIA H200" in text and "driver 580.1" in text
    assert "2026-12-01; 16 cores, C; python 3.12.3, torch 2.11.0" in text
    assert "| gradient | bf16 | 8,192 | 128,256 | 1.25 | 1.125 | 3,362 |" in text
    assert "| KD / CE | 0.98 | 0.97 |" in text and text.count("| gradient |") == 1
    assert not capsys.readouterr().out
