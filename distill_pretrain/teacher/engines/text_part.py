"""Folders whose configuration nests a text model beside a vision or audio model: of them only the text model is used.

Its targets are those of a folder of the text model alone. Tensors of the other parts are not read.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.hf.nested import RENAMED, nests_text
from distill_pretrain.teacher.engines.known_head import finish_of


def text_config_of(config: Any, raw: dict[str, Any], *, has_head: bool) -> Any:
    """Return the configuration of the text model alone; the configuration itself where it nests none.

    Args:
        config: of transformers.
        raw: config.json.
        has_head: whether the folder stores an LM head: it is tied to the embedding if not, and if config.json does not
            say.
    """
    text = getattr(config, "text_config", None)
    if not nests_text(raw) or text is None:
        return config
    if text is not config.get_text_config(decoder=True):
        return config
    inner = raw["text_config"]
    text.tie_word_embeddings = raw.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings", not has_head)
    )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and getattr(text, "quantization_config", None) is None:
        text.quantization_config = quantised
    return text


def key_mapping(path: Path, config: Any) -> dict[str, str]:
    """Return how tensors of the folder are renamed for the model of `config`; nothing where it is the folder's."""
    raw = json.loads((path / "config.json").read_bytes())
    return RENAMED if nests_text(raw) and config.model_type != raw.get("model_type") else {}


def causal_class(transformers: Any, config: Any) -> Any:
    """Return the class that makes the causal LM: transformers' automatic one, or a head on its text model.

    Some text models are part of a larger model alone, such as those of Qwen's VL models.
    """
    automatic = transformers.AutoModelForCausalLM
    trunks = transformers.AutoModel._model_mapping
    if type(config) in automatic._model_mapping or type(config) not in trunks:
        return automatic
    trunk = trunks[type(config)]
    return _head_on(trunk[0] if isinstance(trunk, tuple | list) else trunk)


@cache
def _head_on(trunk: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class TextCausalLM(trunk.__mro__[1]):
        """A text model and its LM head."""

        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = trunk(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        @classmethod
        def from_config(cls, config: Any, **_: Any) -> Any:
            """Build it without values that mean anything."""
            return cls._from_config(config)

        def forward(self, input_ids: torch.Tensor, **settings: Any) -> Any:
            """Compute the logits [B, L, V]."""
            logits = self.lm_head(self.model(input_ids=input_ids, **settings)[0])
            finish = finish_of(self.config)
            return CausalLMOutputWithPast(logits=logits if finish is None else finish(logits))

    return TextCausalLM
