"""Parts of the section `model`: the sections YaRN and experts within it, and the keys that not every model can have."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from distill_pretrain.config import Section

OWN_MODULES = (
    "attention_sinks",
    "rope_linear_factor",
    "windowed_rotary_base",
    "zero_centred_norms",
    "yarn",
    "attention_layers",
    "attention_temperature",
    "attention_logit_cap",
    "qk_norm_whole",
    "attention_output_bias",
    "mlp_bias",
)
"""Keys that need modules of this project, which Transformer Engine's layers have no place for."""
LLAMA_ONLY = (
    "rotary_fraction",
    "experts",
    "rope_scaling_factor",
    "qkv_bias",
    "qk_norm",
    "embedding_scale",
    "attention_scale_width",
    "logit_cap",
    *OWN_MODULES,
)
"""Keys of arch: llama."""
NOT_DERIVED = (
    *("experts", "zero_centred_norms", "embedding_scale"),
    *("attention_logit_cap", "logit_cap"),
)
"""Keys that no initialisation but megatron's is derived for."""


class YarnConfig(Section):
    """YaRN (arXiv 2309.00071): rotary embeddings for contexts longer than those of the first training."""

    factor: float = Field(gt=0, le=1e6)
    """So many times longer."""
    original_positions: int = Field(ge=1, le=1 << 40)
    """Longest sequence of the first training."""
    beta_fast: float = Field(default=32.0, gt=0, le=1e6)
    """Channels that turn more often than this over original_positions stay as they are."""
    beta_slow: float = Field(default=1.0, gt=0, le=1e6)
    """Channels that turn less often turn slower by `factor`."""
    attention_factor: float | None = Field(default=None, gt=0, le=1e6)
    """Factor on rotated queries and keys; null means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whole channels at the two ends."""
    full_layers_only: bool = False
    """Layers within a window (attention_layers: w) keep plain rotary embeddings, as in Olmo 3."""

    @property
    def scale(self) -> float:
        """Factor on rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0


class ExpertsConfig(Section):
    """A mixture of experts: several feed-forward blocks in a layer, of which each token takes a few."""

    number: int = Field(ge=2, le=1 << 16)
    """Experts of a layer."""
    per_token: int = Field(ge=1, le=1 << 16)
    """Experts that a token takes, those of its largest router logits."""
    weights_of_chosen: bool = True
    """A token's experts are weighted by a softmax over their logits alone; false: over those of all experts."""
    biases: bool = False
    """Biases on router and experts, as in gpt-oss."""
    swiglu_limit: float | None = Field(default=None, gt=0, le=1e6)
    """gpt-oss's SwiGLU: gates at most this, and the other half within plus and minus this, plus 1; null means no."""
    swiglu_alpha: float = Field(default=1.702, gt=0, le=1e6)
    """swiglu_limit: gates are multiplied by the sigmoid of themselves times this."""
    load_balancing: float = Field(default=1e-3, ge=0, le=1e6)
    """Coefficient of the load-balancing loss in training, of each layer and sequence (arXiv 2101.03961); 0 for none."""
    z_loss: float = Field(default=0.0, ge=0, le=1e6)
    """Coefficient of the squared log-sum-exp of router logits in training (arXiv 2202.08906); 0 for none."""

    @model_validator(mode="after")
    def _consistent(self) -> ExpertsConfig:
        if self.per_token > self.number:
            raise ValueError(f"per_token: {self.per_token} of number: {self.number} experts")
        if self.per_token == 1 and self.weights_of_chosen:
            raise ValueError(
                "per_token: 1 and weights_of_chosen: the one expert's weight would be 1 whatever the router says; set "
                "weights_of_chosen: false"
            )
        return self
