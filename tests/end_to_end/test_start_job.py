"""train.start_from through the command line: what a student starts from, what is refused, and what a resume asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distill_pretrain.checkpoint.hf.config import read_hf_model
from distill_pretrain.checkpoint.identity import trained_model
from distill_pretrain.checkpoint.start import open_weights
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.cli.main import main
from distill_pretrain.errors import CheckpointError, TokenizerMismatch
from tests.support.jobs import Job, run_cli

TERMS = ("loss", "ce", "kl", "grad_norm")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves(run: Path) -> list[list[float]]:
    return [[record[term] for term in TERMS] for record in records(run)]


@pytest.fixture(scope="module")
def exported(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    run_cli("export", str(job.teacher), str(folder))
    return folder


def settings(run: Path, start: object, *more: str) -> list[str]:
    return [
        f"train.start_from={start}",
        f"train.output_dir={run}",
        "train.steps=4",
        "objective.target=teacher",
        "objective.ce_weight=0",
        "objective.kd_weight=1",
        *more,
    ]


def failure(job: Job, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused job says."""
    capsys.readouterr()
    assert main(["train", str(job.recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("source", ["teacher", "run", "folder"])
def test_a_student_that_starts_as_its_teacher_has_nothing_to_learn(job, exported, tmp_path, source):
    start = {"teacher": "teacher", "run": job.teacher, "folder": exported}[source]
    teacher = exported if source == "folder" else job.teacher
    # Without a warm-up, so that weights that are not the teacher's would be moved by the first step.
    more = (f"teacher.path={teacher}", "optimizer.warmup_steps=0", "train.steps=1")
    job.cli("train", *settings(tmp_path, start, *more))
    (first,) = records(tmp_path)
    assert abs(first["kl"]) < 1e-6 and first["grad_norm"] < 1e-5
    job.cli("train", *settings(tmp_path / "noise", "null", *more))
    (drawn,) = records(tmp_path / "noise")
    assert drawn["kl"] > 0.1 and drawn["grad_norm"] > 0.1


def test_a_run_that_has_started_does_not_read_its_source_again(job, exported, tmp_path, capsys):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(exported, source)
    job.cli("train", *settings(tmp_path / "unbroken", source))
    job.cli("train", *settings(run, source, "train.steps=2"))
    recorded = find_checkpoint(run).identity["start_from"]
    assert recorded["path"] == f"{source}"

    assert "starts from a Hugging Face model (llama, fp32)" in capsys.readouterr().err
    moved = source.rename(tmp_path / "moved")
    job.cli("train", *settings(run, source, "train.steps=3"))
    assert "starts from" not in capsys.readouterr().err
    # The same weights in another place are the same start; other weights, or none, are not.
    job.cli("train", *settings(run, moved))
    assert find_checkpoint(run).identity["start_from"] == {**recorded, "path": f"{moved}"}
    assert curves(run) == curves(tmp_path / "unbroken")

    more = "train.steps=5"
    other = failure(job, capsys, *settings(run, job.teacher, more))
    assert "belongs to another run" in other and "train.start_from: checkpoint" in other
    assert f"{moved} (sha256 {recorded['sha256'][:12]})" in other and f"{job.teacher}" in other
    none = failure(job, capsys, *settings(run, "null", more))
    assert "train.start_from: checkpoint" in none and "this run nothing" in none
    gone = failure(job, capsys, *settings(run, source, more))
    assert "the run started from other weights" in gone and f"{moved}" in gone
    drawn = failure(job, capsys, *settings(job.teacher, exported, "train.steps=26"))
    assert f"train.start_from: checkpoint nothing, this run {exported}" in drawn


def test_a_number_that_was_kept_in_float32_is_the_same(job, exported, tmp_path):
    rounded = edited(exported, tmp_path / "source", rms_norm_eps=9.999999747378752e-06)
    job.cli("train", *settings(tmp_path / "run", rounded, "train.steps=1"))


def edited(folder: Path, out: Path, **config: Any) -> Path:
    """A copy of a folder with other words in its config.json."""
    shutil.copytree(folder, out)
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return out


def truncated(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    with open(out / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    return out


def without_weights(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    return out


def without_a_tensor(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def damaged_run(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    path = find_checkpoint(out).folder / "common.pt"
    path.write_bytes(path.read_bytes() + b"x")
    return out


BAD = {
    "another family": (lambda f, out: edited(f, out, model_type="mixtral"), "model_type: mixtral"),
    "a narrower model": (
        lambda f, out: edited(f, out, intermediate_size=48, rope_theta=5e5),
        "model.ffn_hidden_size: 48 in the source, 64 in the recipe",
    ),
    "another rotary base": (
        lambda f, out: edited(f, out, rope_theta=5e5),
        "model.rotary_base: 500000 in the source, 10000 in the recipe",
    ),
    "fewer ids": (lambda f, out: edited(f, out, vocab_size=500), "at least 512 ids"),
    "far more ids": (lambda f, out: edited(f, out, vocab_size=5000), "far more ids"),
    "a truncated file": (truncated, "damaged or cut short"),
    "no file": (without_weights, "no weights found"),
    "a missing tensor": (without_a_tensor, "model.layers.1.mlp.up_proj.weight is missing"),
    "an empty folder": (lambda f, out: out.mkdir(), "no weights to start from"),
    "no folder": (lambda f, out: None, "no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_before_anything_is_written(
    job, exported, tmp_path, capsys, name
):
    make, expected = BAD[name]
    make(exported, tmp_path / "source")
    arguments = settings(tmp_path / "run", tmp_path / "source")
    found = failure(job, capsys, *arguments)
    assert expected in found and f"{tmp_path / 'source'}" in found
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    if name == "no folder":  # which may be on the cluster alone
        return
    assert expected in failure(job, capsys, *arguments, "--dry-run")


def test_runs_that_do_not_fit_are_named(job, tmp_path, capsys):
    damaged = damaged_run(job.teacher, tmp_path / "damaged")
    found = failure(job, capsys, *settings(tmp_path / "run", damaged))
    assert "is not what was saved" in found and "common.pt" in found
    more = ("model.num_layers=3", "model.init=deepscale", "model.tie_embeddings=true")
    found = failure(job, capsys, *settings(tmp_path / "run", job.teacher, *more))
    assert "model.num_layers: 2 in the source, 3 in the recipe" in found
    assert "model.tie_embeddings: False in the source" in found
    found = failure(job, capsys, *settings(tmp_path / "run", job.teacher, "model.init=deepscale"))
    assert "model.init: megatron in the source, deepscale in the recipe" in found


def test_the_dry_run_and_the_plan_know_the_start(job, exported, tmp_path, capsys):
    for start in (exported, job.teacher):
        run_cli("train", str(job.recipe), *settings(tmp_path / "run", start), "--dry-run")
        out = capsys.readouterr().out
        assert f"{start}" in out and "of the student's architecture" in out
    missing = tmp_path / "missing"
    run_cli("train", str(job.recipe), *settings(tmp_path / "run", missing), "--dry-run")
    assert f"{missing}: not checked, for want of" in capsys.readouterr().out
    run_cli("plan", str(job.recipe), *settings(tmp_path / "run", "teacher"))
    assert f"{job.teacher}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_start_from_the_teacher_needs_one(job, tmp_path, capsys):
    text = job.recipe.read_text().replace(f"teacher:\n  path: {job.teacher}\n", "")
    assert "\nteacher:" not in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["train", str(recipe), "train.start_from=teacher"]) == 2
    assert "teacher" in capsys.readouterr().err


def test_a_run_from_noise_records_no_start(job):
    assert "start_from" not in find_checkpoint(job.teacher).identity


def test_a_run_of_another_tokenizer_or_vocabulary_is_refused(job):
    checkpoint = find_checkpoint(job.teacher)
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    own = trained.tokenizer_sha256
    sizes = {"model": trained.model, "seq_len": trained.seq_len}

    def opened(vocab_size: int, tokenizer: str) -> object:
        digests = (tokenizer,)
        return open_weights(job.teacher, **sizes, vocab_size=vocab_size, tokenizer_digests=digests)

    assert own and opened(trained.vocab_size, own)
    with pytest.raises(TokenizerMismatch, match="with another tokenizer"):
        opened(trained.vocab_size, "0" * 64)
    with pytest.raises(TokenizerMismatch, match="vocabulary is not the corpus's"):
        opened(trained.vocab_size - 1, own)


def test_learned_positions_must_reach_to_the_end_of_a_sequence(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    config = transformers.GPT2Config(**sizes, activation_function="gelu")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = read_hf_model(tmp_path).model
    assert open_weights(tmp_path, model=model, vocab_size=64, seq_len=16)
    with pytest.raises(CheckpointError, match=r"learned positions.*at least data.seq_len = 17"):
        open_weights(tmp_path, model=model, vocab_size=64, seq_len=17)
