"""Models and teachers in parts over several processes have the figures of whole ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.errors import LayoutError
from distill_pretrain.jobs.evaluate import evaluate_models
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.process import process_group
from tests.support.distributed import run_distributed
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

Settings = dict[str, dict[str, Any]]

LAYOUTS: dict[str, Settings] = {
    "whole": {},
    "tensor": {"eval": {"tensor": 2}, "teacher": {"kind": "megatron", "tensor": 2}},
    "pipeline, whole teacher": {"eval": {"pipeline": 2}, "teacher": {"kind": "megatron"}},
    "tensor and pipeline": {
        "eval": {"tensor": 2, "pipeline": 2},
        "teacher": {"kind": "megatron", "tensor": 2, "pipeline": 2},
    },
    "whole models, hf teacher in four": {"teacher": {"fsdp": 4}},
    "tensor, hf teacher in two": {"eval": {"tensor": 2}, "teacher": {"tensor": 2}},
}
SPLITS = hasattr(
    pytest.importorskip("transformers.distributed").DistributedConfig, "dp_replicate_size"
)
if not SPLITS:
    LAYOUTS = {name: value for name, value in LAYOUTS.items() if "hf teacher in" not in name}


def recipe_of(root: Path, output: str, settings: Settings) -> Recipe:
    """Two models and a teacher; chunks are neither divisors of a sequence nor alike."""
    sections: Settings = {
        "data": {
            "tokens": root / "train",
            "held_out_tokens": root / "train",
            "vocab_size": VOCAB_SIZE,
            "seq_len": SEQ_LEN,
        },
        "teacher": {"kind": "hf", "path": root / "teacher", "head_chunk_tokens": 23},
        "eval": {
            "models": {"a": root / "a", "b": root / "b"},
            "output": root / output,
            "micro_batch_size": 3,
            "head_chunk_tokens": 40,
        },
    }
    return Recipe.model_validate({k: {**v, **settings.get(k, {})} for k, v in sections.items()})


def scores_job(*, root: str) -> None:
    with process_group():
        for name, settings in LAYOUTS.items():
            evaluate_models(recipe_of(Path(root), f"{name}.json", settings))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("split")
    write_small_corpus(folder / "train")
    for seed, name in enumerate(("a", "b", "teacher")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE
            + 1,  # ranks of the LM head have columns of padding, not equally many
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def split(root: Path) -> Path:
    run_distributed(scores_job, 4, root=str(root))
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """The scores of one process with whole models."""
    evaluate_models(recipe_of(root, "alone.json", {}))
    return json.loads((root / "alone.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_figures_of_one_process(
    split: Path, alone: dict[str, Any], layout: str
) -> None:
    found = json.loads((split / f"{layout}.json").read_text())["scores"]
    assert list(found) == ["a", "b", "teacher"]
    for name, figure in itertools.product(found, ("ce", "kl", "acceptance", "teacher_entropy")):
        expected = alone[name][figure]
        assert found[name][figure] == pytest.approx(expected, rel=2e-5, abs=1e-6), (name, figure)
    for name, figure in itertools.product(found, ("num_positions", "top1_accuracy")):
        assert found[name][figure] == pytest.approx(alone[name][figure], abs=1e-9), (name, figure)
    assert found["a"]["kl"] > 0.1
    if layout == "whole":
        assert found == alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.tensor=2"], "1 processes, 2 to a copy"),
        (["teacher.tensor=2"], "1 processes, 2 to a copy"),
        (["teacher.kind=deepspeed", "eval.tasks=[piqa]"], "must hold every model whole"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    recipe = root / "recipe.json"
    recipe.write_text(recipe_of(root, "refused.json", {}).model_dump_json(exclude_unset=True))
    assert main(["eval", str(recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (root / "refused.json").exists()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"teacher": {"kind": "megatron", "tensor": 2}}, r"set eval\.tensor=2 eval\.pipeline=1"),
        ({"teacher": {"tensor": 4}, "eval": {"tensor": 2}}, r"set eval\.tensor=1 eval\.pipeline=1"),
        ({"teacher": {"tensor": 2}, "eval": {"pipeline": 2}}, r"set eval\.tensor=1"),
    ],
)
def test_a_teacher_in_other_parts_than_the_models_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, remedy: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LayoutError, match=remedy):
        evaluate_models(recipe_of(root, "refused.json", settings))
