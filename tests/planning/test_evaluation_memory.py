"""What an evaluation takes, as planned, against the tensors that are alive while models are scored."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.eval.chunks import CHUNK_ELEMENTS
from distill_pretrain.eval.heldout import evaluate
from distill_pretrain.planning.evaluation import SLICE_ELEMENTS
from distill_pretrain.processes.process import process_group
from tests.support.live_memory import LiveMemory

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, SEQ_LEN, SEQUENCES = 40_000, 64, 8
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}


class Drawn:
    """Random tokens."""

    num_sequences = SEQUENCES

    def read(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(SEQUENCES, SEQ_LEN + 1))
        chosen = tokens[sequences].astype(np.int32)
        return chosen[:, :-1].copy(), chosen[:, 1:].copy()


def opened(folder: Path) -> LogitsEngine:
    from distill_pretrain.teacher.engines import open_engine

    settings = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, "head_chunk_tokens": 100}
    return open_engine("megatron", folder, "fp32", **settings)


def test_slices_are_as_large_as_the_formula_says():
    assert SLICE_ELEMENTS == CHUNK_ELEMENTS


def test_the_plan_is_within_5_percent_of_the_live_tensors(tmp_path, capsys):
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    for name in ("a", "t"):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE, num_attention_heads=4, tie_word_embeddings=True, **SIZES
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    recipe = tmp_path / "recipe.json"
    sections = {
        "data": {
            "tokens": "nowhere/train",
            "vocab_size": VOCAB_SIZE,
            "seq_len": SEQ_LEN,
            "num_sequences": SEQUENCES,
        },
        "teacher": {"path": str(tmp_path / "t"), "head_chunk_tokens": 100},
        "eval": {
            "models": {"a": str(tmp_path / "a")},
            "output": str(tmp_path / "out.json"),
            "head_chunk_tokens": 100,
        },
    }
    recipe.write_text(json.dumps(sections))
    capsys.readouterr()  # of libraries
    assert main(["plan", str(recipe), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    foreseen = {figure["name"]: figure["value"] for figure in part["figures"]}

    with process_group(), model_parallel(ParallelConfig(), seed=0):
        models = {name: opened(tmp_path / name) for name in ("a", "t")}
        evaluate({"a": models["a"]}, models["t"], Drawn(), num_sequences=1)  # what is made once
        gc.collect()
        with LiveMemory() as live:
            evaluate({"a": models["a"]}, models["t"], Drawn(), micro_batch_size=SEQUENCES)
    # Of the weights the LM heads alone are counted: views of them are taken.
    heads = 2 * 4 * VOCAB_SIZE * SIZES["hidden_size"]
    passing = foreseen["evaluation peak"] - foreseen["evaluation weights"]
    assert live.peak - heads == pytest.approx(passing, rel=0.05)
    whole = SEQUENCES * SEQ_LEN * VOCAB_SIZE * 4
    assert live.peak - heads < 2 * whole  # the logits of the two models


def test_models_that_are_not_there_have_no_figure(tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    data = {"tokens": "nowhere/train", "vocab_size": 100, "seq_len": 8, "num_sequences": 4}
    models = {"a": "nowhere/a"}
    recipe.write_text(json.dumps({"data": data, "eval": {"models": models, "output": "o.json"}}))
    assert main(["plan", str(recipe), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert [figure["value"] for figure in part["figures"]] == [None]
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    sections = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**sections, "model": model}))
    assert main(["plan", str(recipe), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert all(figure["value"] > 0 for figure in part["figures"])
