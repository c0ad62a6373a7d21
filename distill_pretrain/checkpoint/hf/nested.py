"""Folders whose config.json nests a text model beside a vision or audio model: names of the text model's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    r"^model\.language_model\.lm_head\.": "lm_head.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.": "model.",
}
"""Names in such folders, old and new -> in a folder of the text model alone."""

_OTHER_PARTS = re.compile(
    r"^(model\.)?(visual|vision\w*|vit|audio\w*|speech\w*|multi_modal\w*|mm_\w*|embed_(vision|audio)|image_\w*|"
    r"connector|projector|aligner|mlp1|perceiver\w*)\."
)


def nests_text(raw: Mapping[str, Any]) -> bool:
    """Say whether a config.json is of such a folder."""
    return isinstance(raw.get("text_config"), dict)


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json that a folder of the text model alone would have; the same one where nothing is nested."""
    if not nests_text(raw):
        return raw
    outer = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
    inner = {key: raw[key] for key in outer if raw.get(key) is not None}
    return {**inner, **raw["text_config"], **{k: inner[k] for k in inner.keys() & {outer[0]}}}


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """Return the name of a tensor in a folder of the text model alone."""
    for pattern, replacement in mapping.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def is_of_other_part(name: str) -> bool:
    """Say whether a tensor of such a folder belongs to its vision or audio model."""
    return _OTHER_PARTS.match(name) is not None
