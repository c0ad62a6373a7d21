"""No value that a key of config.json may come with ends in a traceback: it means something, or is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from distill_pretrain.checkpoint.hf import read_hf_model
from distill_pretrain.errors import CheckpointError
from tests.checkpoint.test_families import CONFIGS, LIKE_LLAMA

transformers = pytest.importorskip("transformers")

VALUES = (None, "x", -1, 0, 1.5, True, ["a"], {"a": 1}, float("nan"))
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
ABSENT: dict[str, Any] = {
    "architectures": None,
    "auto_map": None,
    "head_dim": None,
    "layer_types": None,
    "num_experts": None,
    "partial_rotary_factor": None,
    "quantization_config": None,
    "rope_scaling": {**YARN, "beta_fast": 3, "attention_factor": 2.0, "mscale": 1},
    "sliding_window": None,
    "use_sliding_window": None,
}
"""Keys that config.json may have, too, where it has them not."""


def raw_config(name: str) -> dict[str, Any]:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = {} if name == "GPT2Config" else LIKE_LLAMA
    config = getattr(transformers, name)(vocab_size=150, **{**sizes, **CONFIGS[name]})
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return raw


def changed(values: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """A configuration with one value, of it or of an object inside, replaced by each of VALUES."""
    for key, value in values.items():
        for other in VALUES:
            yield {**values, key: other}
        if isinstance(value, dict) and depth > 1:
            for inner in changed(value, depth - 1):
                yield {**values, key: inner}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_taken_or_refused(name, tmp_path):
    raw = raw_config(name)
    without_rope = {key: value for key, value in raw.items() if key != "rope_parameters"}
    cases = [*changed(raw)]
    for key, value in ABSENT.items():
        cases += [{**without_rope, **case} for case in changed({key: value})]
    refused = 0
    for case in cases:
        (tmp_path / "config.json").write_text(json.dumps(case))
        with suppress(CheckpointError):
            read_hf_model(tmp_path)
            continue
        refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0 (a whole number above 0"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' (a whole number above 0"),
        ({"layer_types": 3}, "layer_types: 3 (a list is expected)"),
        ({"rope_parameters": {"full_attention": 1}}, "full_attention: 1 (an object is expected)"),
        ({"rms_norm_eps": "small"}, "model.norm_epsilon: 'small' (Input should be a valid number"),
        ({"rms_norm_eps": 0}, "model.norm_epsilon: 0 (Input should be greater than 0)"),
        ({"model_type": "frobnicate"}, "model_type: frobnicate is not supported"),
        ({"quantization_config": "fp8"}, "quantization_config: 'fp8' (an object is expected)"),
        ({"model_type": None}, "model_type: None is not supported"),
    ],
    ids=str,
)
def test_the_key_and_what_was_expected_are_named(changes, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**raw_config("LlamaConfig"), **changes}))
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read_hf_model(tmp_path)
