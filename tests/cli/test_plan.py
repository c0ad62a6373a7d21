"""`plan` and `train --dry-run`: every cluster recipe, their refusals, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.planning.figures import BASES

ROOT = Path(__file__).parents[2]
CLUSTER = sorted((ROOT / "launch/recipes/cluster").glob("*.yaml"))
STUDENTS = [path for path in CLUSTER if path.name.startswith("student_")]
CAPTURES = [path for path in CLUSTER if path.name.startswith("capture_")]


def test_the_cluster_recipes_cover_what_they_promise():
    names = " ".join(path.stem for path in CLUSTER)
    for part in ("300m", "1b", "3b_from_8b", "from_3b", "from_8b", "8gpu", "256gpu"):
        assert part in names
    assert len(STUDENTS) + len(CAPTURES) + len(list(CLUSTER[0].parent.glob("model_*"))) + 1 == len(
        CLUSTER
    )


@pytest.mark.parametrize("recipe", STUDENTS, ids=lambda path: path.stem)
def test_every_student_of_the_cluster_fits_its_gpus(recipe, capsys):
    assert main(["train", str(recipe), "--dry-run"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    gpus = int(recipe.stem.rsplit("_", 1)[1].removesuffix("gpu"))
    assert f"{gpus} processes" in output and "nothing was loaded" in output


@pytest.mark.parametrize("recipe", CAPTURES, ids=lambda path: path.stem)
def test_every_capture_of_the_cluster_can_be_planned(recipe, capsys):
    assert main(["plan", str(recipe), "--json"]) == 0, capsys.readouterr().err
    figures = figures_of(capsys.readouterr().out)
    assert figures["teacher GPU-hours"]["value"] > 0
    assert figures["files"]["basis"] == "exact"


def figures_of(output: str) -> dict[str, dict]:
    report = json.loads(output)
    assert set(report["bases"]) == set(BASES)
    return {figure["name"]: figure for part in report["parts"] for figure in part["figures"]}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
data: {tokens: nowhere/train, vocab_size: 1000, seq_len: 64, num_sequences: 200}
teacher: {path: nowhere/teacher}
capture: {output_dir: nowhere/cache, shard_sequences: 50}
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4}
objective: {ce_weight: 0.0, kd_weight: 1.0}
train: {output_dir: nowhere/run, steps: 50, global_batch_size: 8}
plan: {teacher_tokens_per_second: 1000, student_tokens_per_second: 500}
"""
    )
    return path


def test_a_plan_of_everything_names_the_basis_of_every_figure(recipe, capsys):
    assert main(["plan", str(recipe), "plan.students=3"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    for title in ("Cache", "Capture", "Memory of a student's rank", "Student", "Online or offline"):
        assert f"\n{title}" in text
    assert "Advice: offline" in text
    assert main(["plan", str(recipe), "--json"]) == 0
    figures = figures_of(capsys.readouterr().out)
    assert all(f["basis"] in BASES and f["how"] for f in figures.values())
    hours = 200 * 64 / 1000 / 3600
    assert figures["teacher GPU-hours"]["value"] == pytest.approx(hours)
    assert figures["online, per student"]["value"] == pytest.approx(2 * hours)
    assert figures["files"]["value"] == 2 * 4 + 5
    assert figures["break-even"]["value"] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world-size", "3", "parallel.tensor=2"], "multiple of 2 processes"),
        (["--world-size", "0"], "--world-size"),
        ([], "data.cache"),
        (["data.cache=x", "data.num_sequences=null"], "data.num_sequences"),
        (["data.cache=x", "plan.gpu_memory_gb=6.0001"], "does not fit its GPUs"),
        (["data.cache=x", "model.hidden_size=30"], "model.num_attention_heads"),
    ],
)
def test_a_misfit_of_a_dry_run_is_one_message(recipe, capsys, arguments, expected):
    assert main(["train", str(recipe), "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("error:") == 1 and "Traceback" not in error


def test_a_dry_run_says_what_the_job_would_be(recipe, tmp_path, capsys):
    arguments = ["--dry-run", "--world-size", "4", "data.cache=nowhere/cache", "parallel.tensor=2"]
    assert main(["train", str(recipe), *arguments]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "4 processes" in output and "data parallel 2" in output
    assert "2 epochs of 200 sequences" in output
    assert "nowhere/train: not here, not checked" in output
    assert "not read" not in output
    text_alone = ["objective.ce_weight=1", "objective.kd_weight=0"]
    assert main(["train", str(recipe), *arguments, *text_alone]) == 0
    ignored = "not read, since objective.kd_weight is 0: nowhere/cache (data.cache)"
    assert ignored in capsys.readouterr().out


def test_a_world_size_without_a_dry_run_is_refused(recipe, capsys):
    assert main(["train", str(recipe), "--world-size", "4"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_plan_of_nothing_is_refused(tmp_path, capsys):
    assert main(["plan", "data={tokens: x, seq_len: 8}"]) == 2
    assert "model and train" in capsys.readouterr().err


def test_the_samplers_of_a_pilot_are_compared(recipe, tmp_path, capsys):
    record = {
        "sampler": {"name": "systematic", "num_draws": 50, "seed": 1, "top_p": None},
        "error": 0.01,
        "error_renormalised": None,
        "bias": 1e-8,
        "unique_ids": 20.0,
        "hc_bytes": 18.0,
    }
    pilot = tmp_path / "pilot.json"
    pilot.write_text(json.dumps({"positions": 9, "vocab_size": 1000, "samplers": [record]}))
    assert main(["plan", str(recipe), f"plan.pilot={pilot}"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "Samplers on the pilot" in output and "systematic 50" in output


def test_two_runs_measure_what_distillation_adds(recipe, tmp_path, capsys):
    for name, seconds in (("ce", 1.0), ("kd", 1.1)):
        (tmp_path / name).mkdir()
        record = {"seconds": seconds, "data_wait": 0.011, "tokens_per_second": 100}
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([json.dumps(record)] * 9))
    runs = [f"plan.ce_run={tmp_path / 'ce'}", f"plan.kd_run={tmp_path / 'kd'}"]
    assert main(["plan", str(recipe), *runs, "--json"]) == 0, capsys.readouterr().err
    figures = figures_of(capsys.readouterr().out)
    assert figures["distillation adds to a step"]["value"] == "+10.0%"
    assert figures["distillation adds to a step"]["basis"] == "measured"


def test_the_disk_counts_checkpoints_and_exports(recipe, capsys):
    def planned(*keys: str) -> dict[str, float]:
        assert main(["plan", str(recipe), *keys, "--json"]) == 0, capsys.readouterr().err
        figures = figures_of(capsys.readouterr().out)
        return {name: figures[name]["value"] for name in ("checkpoint", "export", "disk of a run")}

    plain = planned()
    assert plain["export"] == 0 and plain["disk of a run"] == 3 * plain["checkpoint"]
    all_kept = planned("train.export_interval=20")
    assert all_kept["export"] == plain["checkpoint"] / 3
    assert all_kept["disk of a run"] == 3 * plain["checkpoint"] + 3 * all_kept["export"]
    pruned = planned("train.export_interval=5", "train.keep_exports=1")
    assert pruned["disk of a run"] == 3 * plain["checkpoint"] + 2 * pruned["export"]
    bf16 = planned("train.precision=bf16")
    assert bf16["checkpoint"] == plain["checkpoint"] / 12 * 14
