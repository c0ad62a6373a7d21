"""prune through the command line: from a run or a folder to smaller models, and a student that starts from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill_pretrain
from distill_pretrain.checkpoint.hf.config import read_hf_model
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.cli.main import main
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.errors import ConfigError
from distill_pretrain.pruning import pruner
from tests.support.hf_folders import write_llama9
from tests.support.jobs import Job, run_cli
from tests.support.small_corpus import NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE, write_small_corpus

pytest.importorskip("transformers")

DEPTH = "prune.targets.depth={num_layers: 1, layer_score: loss}"
WIDTH = "prune.targets.width={hidden_size: 24, ffn_hidden_size: 40, num_query_groups: 1}"


def arguments(job: Job, output: Path, *more: str) -> list[str]:
    return [
        str(job.recipe),
        f"prune.source={job.teacher}",
        f"prune.output_dir={output}",
        "prune.num_sequences=12",
        "prune.loss_sequences=4",
        "prune.threads=1",
        *more,
    ]


@pytest.fixture(scope="module")
def pruned(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, pruned to three shapes."""
    output = tmp_path_factory.mktemp("pruned") / "models"
    run_cli("prune", *arguments(job, output, DEPTH, WIDTH), "--to-parameters", "30k")
    return output


def test_a_run_is_pruned_to_several_shapes_and_what_they_are_is_written_down(job, pruned):
    assert sorted(path.name for path in pruned.iterdir()) == [
        *("30k", "depth", "report.md", "scores.json", "scores.png", "width")
    ]
    checkpoint = find_checkpoint(job.teacher)
    report = (pruned / "report.md").read_text()
    for name in ("30k", "depth", "width"):
        record = json.loads((pruned / name / "prune.json").read_text())
        source = record["source"]
        assert (source["step"], source["sha256"]) == (checkpoint.step, checkpoint.sha256)
        found = read_hf_model(pruned / name)
        assert record["shape"] == {key: getattr(found.model, key) for key in record["shape"]}
        tensors = load_file(pruned / name / "model.safetensors")
        assert record["parameters"] == sum(t.numel() for t in tensors.values())
        assert f"| {name} | " in report and f"| {record['loss']['pruned']:.3f} |" in report
        assert (pruned / name / "tokenizer.json").is_file()
    assert (
        0.98 * 30_000 <= json.loads((pruned / "30k/prune.json").read_text())["parameters"] <= 30_000
    )
    scores = json.loads((pruned / "scores.json").read_text())
    assert len(scores["block_influence"]) == 2 and len(scores["hidden"]) == 32
    assert [entry["layers"] for entry in scores["loss_without"]] == [[0], [1]]


def test_the_losses_in_the_report_are_those_of_eval(job, pruned, tmp_path):
    record = json.loads((pruned / "depth" / "prune.json").read_text())
    assert record["loss"]["on"].startswith("4 held-out")
    job.cli(
        "eval",
        f"eval.models={{source: {job.teacher}, depth: {pruned / 'depth'}}}",
        f"eval.output={tmp_path / 'eval.json'}",
        "eval.num_sequences=4",
        "teacher=null",
    )
    scores = json.loads((tmp_path / "eval.json").read_text())["scores"]
    for name, key in (("source", "source"), ("depth", "pruned")):
        assert scores[name]["ce"] == pytest.approx(record["loss"][key], rel=1e-5)


@pytest.mark.parametrize("name", ["depth", "width"])
def test_a_student_starts_from_a_pruned_model(job, pruned, tmp_path, name):
    model = read_hf_model(pruned / name).model
    sizes = (
        *("num_layers", "hidden_size", "ffn_hidden_size"),
        *("num_attention_heads", "num_query_groups", "kv_channels"),
    )
    job.cli(
        "train",
        f"train.start_from={pruned / name}",
        f"train.output_dir={tmp_path}",
        "train.steps=2",
        "train.log_interval=1",
        *(f"model.{key}={getattr(model, key)}" for key in sizes),
    )
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    # The text is what the source was trained on; a start from noise has log 512 = 6.24.
    assert first["ce"] < 4.6


def test_transformers_computes_the_pruned_model(pruned):
    import transformers

    for name in ("depth", "width", "30k"):
        model = transformers.AutoModelForCausalLM.from_pretrained(pruned / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pruned / name)
        tokens = torch.tensor([tokenizer("async def main():")["input_ids"]])
        assert torch.isfinite(model(tokens).logits).all()


def test_the_same_job_writes_the_same_bytes_and_another_one_is_refused(
    job, pruned, tmp_path, capsys
):
    output = tmp_path / "again"
    run_cli("prune", *arguments(job, output, WIDTH))
    # However documents share the sequences of a training: they are scored as one stream.
    run_cli("prune", *arguments(job, output, WIDTH, "data.packing=best_fit"))
    for file in ("model.safetensors", "prune.json", "config.json"):
        assert (output / "width" / file).read_bytes() == (pruned / "width" / file).read_bytes()
    before = (output / "width" / "prune.json").read_bytes()
    capsys.readouterr()
    assert main(["prune", *arguments(job, output, WIDTH, "prune.seed=7")]) == 2
    assert "pruned from another source or in another way" in capsys.readouterr().err
    assert (output / "width" / "prune.json").read_bytes() == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of the small corpus's vocabulary, and the corpus."""
    write_llama9(tmp_path / "source", vocab_size=VOCAB_SIZE)
    write_small_corpus(tmp_path / "corpus")
    return tmp_path


def recipe(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "data": {"tokens": folder / "corpus", "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE},
        "prune": {
            "source": folder / "source",
            "output_dir": folder / "out",
            "targets": {"half": {"num_layers": 2}},
            "num_sequences": 8,
            "threads": 1,
            **settings,
        },
    }


def test_the_function_returns_what_was_made(folder):
    report = distill_pretrain.prune_model(recipe(folder), to_parameters=["80k"])
    assert set(report.models) == {"half", "80k"}
    assert report.models["half"].shape.num_layers == 2 and report.shape.num_layers == 4
    assert report.models["80k"].parameters <= 80_000
    assert (folder / "out" / "80k" / "model.safetensors").is_file()


@pytest.fixture
def gemma(folder: Path) -> Path:
    """The same with a folder of Gemma 3, whose class wants a width that the heads divide."""
    import transformers

    shutil.rmtree(folder / "source")
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
        pad_token_id=None,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    return folder


def test_what_the_class_of_a_family_refuses_is_refused_or_not_searched(gemma):
    import transformers

    width = {"hidden_size": 40, "num_query_groups": 3, "num_attention_heads": 6}
    with pytest.raises(ConfigError, match=r"targets\.t: a width that the heads do not divide"):
        distill_pretrain.prune_model(recipe(gemma, targets={"t": width}))
    searched = {**width, "parameters": "30k"}
    with pytest.raises(ConfigError, match="no class of transformers computes any shape within"):
        distill_pretrain.prune_model(recipe(gemma, targets={"t": searched}))
    targets = {"found": {"parameters": "30k"}, "full": {"num_layers": 1, "layer_score": "loss"}}
    report = distill_pretrain.prune_model(recipe(gemma, targets=targets, candidates=2))
    model = report.models["found"].model
    assert model.hidden_size % model.num_attention_heads == 0 and model.hidden_size < 48
    for name in targets:
        small = transformers.AutoModelForCausalLM.from_pretrained(gemma / "out" / name)
        assert small.num_parameters() == report.models[name].parameters
        assert read_hf_model(gemma / "out" / name).model == report.models[name].model


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder: Path) -> None:
    with open(folder / "source" / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def drop_a_tensor(folder: Path) -> None:
    path = folder / "source" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def write_gpt2(folder: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB_SIZE, activation_function="gelu"
    )
    shutil.rmtree(folder / "source")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "source")


def nothing(folder: Path) -> None:
    pass


def mask_all(folder: Path) -> None:
    with TokenIndexWriter(folder / "corpus", VOCAB_SIZE) as writer:
        writer.add_document(list(range(SEQ_LEN)) * NUM_SEQUENCES, weight=0.0)


BAD: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "source"), {}, "not a Hugging Face model folder"),
    "truncated": (truncate, {}, "damaged or cut short"),
    "missing tensor": (drop_a_tensor, {}, "model.layers.1.mlp.up_proj.weight is missing"),
    "no weights": (lambda f: (f / "source/model.safetensors").unlink(), {}, "no weights found"),
    "another family": (lambda f: set_config(f, model_type="mixtral"), {}, "mixtral"),
    "gpt2": (write_gpt2, {}, "models of this family cannot be pruned"),
    "fewer ids": (
        lambda f: write_llama9(f / "source", vocab_size=VOCAB_SIZE - 1) and None,
        {},
        "vocabulary is smaller than the corpus's",
    ),
    "far more ids": (
        lambda f: write_llama9(f / "source", vocab_size=VOCAB_SIZE + 1100) and None,
        {},
        "far more ids than the corpus",
    ),
    "few positions": (
        lambda f: set_config(f, max_position_embeddings=31),
        {},
        "longer than the source was made for.*at most 31",
    ),
    "too wide": (
        nothing,
        {"targets": {"a": {"hidden_size": 80}}},
        "hidden_size: 80; the source has 72",
    ),
    "too few": (nothing, {"targets": {"a": {"parameters": "2k"}}}, "no shape within the search"),
    "no target": (nothing, {"targets": None}, "there is nothing to prune to"),
    "all masked": (mask_all, {}, "no token of the sequences.*8 sequences without a label"),
    "too long a sample": (nothing, {"num_sequences": 13}, "at most 12"),
    "other files": (
        lambda f: (f / "out/half").mkdir(parents=True) or (f / "out/half/x").touch(),
        {},
        "the folder exists and is something else",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_before_weights_are_loaded(folder, name, monkeypatch):
    spoil, settings, expected = BAD[name]
    spoil(folder)
    monkeypatch.setattr(pruner, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(distill_pretrain.DistillPretrainError, match=expected):
        distill_pretrain.prune_model(recipe(folder, **settings))
    assert not (folder / "out" / "half" / "prune.json").exists()


def test_numbers_of_parameters_that_are_none_are_named(job, tmp_path, capsys):
    assert main(["prune", *arguments(job, tmp_path), "--to-parameters", "small"]) == 2
    assert "--to-parameters; found: small" in capsys.readouterr().err


def test_a_run_of_another_vocabulary_or_arch_is_refused(job, tmp_path, capsys):
    write_small_corpus(tmp_path / "corpus")
    other = (f"data.tokens={tmp_path / 'corpus'}", "data.vocab_size=200", "data.seq_len=32")
    more = ("data.held_out_tokens=null", "data.num_sequences=null", DEPTH)
    assert main(["prune", *arguments(job, tmp_path / "out", *other, *more)]) == 2
    assert "trained on another vocabulary than the corpus's" in capsys.readouterr().err
