"""Small Hugging Face folders with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ROWS = 160  # of the embedding
# Heads, groups, rows and widths that two and three tensor-parallel ranks share out.
LLAMA9: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 72,
    "ffn_hidden_size": 96,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "tie_embeddings": True,
    "norm_epsilon": 1e-6,
    "vocab_divisor": 64,
}
"""The section `model` of `write_llama9`."""


def write_llama9(folder: Path, *, max_positions: int = 64, **changes: Any) -> Any:
    """Save a llama of nine heads and return it; weights and norms are random, and no bf16 numbers."""
    import transformers

    settings = {
        "vocab_size": ROWS,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()
