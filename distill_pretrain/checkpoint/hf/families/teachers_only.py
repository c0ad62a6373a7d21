"""Families that stay teachers of kind hf, and what a student of them would need."""

from __future__ import annotations

from distill_pretrain.checkpoint.hf.family import TeacherOnly

_EXPERTS = "mixture of experts"
# docs/guides/teachers_only.md says what was tried, under which versions.
_DELTA_NETS = "gated delta nets, which run on GPUs alone"
_LATENT = "latent attention, whose core Transformer Engine alone has"

FAMILIES = tuple(
    TeacherOnly(model_type=model_type, title=title, reason=reason)
    for model_type, title, reason in (
        ("deepseek_v3", "DeepSeek-V3", f"{_LATENT}, and {_EXPERTS}"),
        ("gemma4_text", "Gemma 4 (text)", "embeddings in every layer and two widths of heads"),
        ("llama4_text", "Llama 4 (text)", f"{_EXPERTS} and chunked attention"),
        ("mixtral", "Mixtral", _EXPERTS),
        ("qwen3_5_moe_text", "Qwen3.5-MoE (text)", f"{_DELTA_NETS}, and {_EXPERTS}"),
        ("qwen3_5_text", "Qwen3.5 (text)", _DELTA_NETS),
        ("qwen3_next", "Qwen3-Next", f"{_DELTA_NETS}, and {_EXPERTS}"),
    )
)
