"""`inspect --signal`: the table, the figures, the picture; options that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from distill_pretrain.cli.main import main
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

LAYERS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signal")
    model = {
        "num_layers": LAYERS,
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_attention_heads": 4,
    }
    sections = {
        "data": {
            "tokens": str(write_small_corpus(folder / "text")),
            "vocab_size": VOCAB_SIZE,
            "seq_len": SEQ_LEN,
        },
        "model": {**model, "init": "deepscale"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return folder / "recipe.yaml"


def test_figures_table_and_picture(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = recipe.with_name("signal.json"), recipe.with_name("signal.png")
    arguments = ["inspect", "--signal", str(recipe), "--output", str(output)]
    assert main([*arguments, "--picture", str(picture), "--batch", "3"]) == 0
    text = capsys.readouterr().out
    assert f"{LAYERS} layers of width 64, llama, init deepscale, pre-norm; fresh weights" in text
    report = json.loads(output.read_text())
    assert report["positions"] == SEQ_LEN and report["sequences"] == 3
    measured, predicted = report["measured"], report["predicted"]
    assert len(measured["variance"]) == LAYERS + 1
    assert len(measured["weight_gradient"]) == LAYERS
    np.testing.assert_allclose(measured["variance"], predicted["variance"], rtol=0.15)
    np.testing.assert_allclose(measured["gradient"], predicted["gradient"], rtol=0.5)
    rows = [line.split() for line in text.splitlines() if line.startswith("        6")]
    assert float(rows[0][1]) == pytest.approx(measured["variance"][LAYERS], rel=1e-2)
    assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "where: --batch; found: 0; expected: 1 or more"),
        (["--batch", "64"], "found: 64 x 32 tokens; expected: at most 1024"),
        (["model.residual_k=12"], "beta^2"),
        (["--checkpoint", "nowhere"], "no checkpoint found"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--signal", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
