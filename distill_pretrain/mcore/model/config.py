"""Recipe sections `model`, `parallel` and `optimizer`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section
from distill_pretrain.mcore.model.parts import (
    LLAMA_ONLY,
    NOT_DERIVED,
    OWN_MODULES,
    ExpertsConfig,
    YarnConfig,
)


class ModelConfig(Section):
    """A decoder-only transformer built by megatron-core."""

    arch: Literal["llama", "gpt2"] = "llama"
    """`llama`: RMSNorm, SwiGLU, RoPE, no biases; `gpt2`: LayerNorm, GELU, learned positions, biases."""
    num_layers: int = Field(ge=1, le=1 << 14)
    """Transformer layers."""
    hidden_size: int = Field(ge=1, le=1 << 20)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1, le=1 << 24)
    """Inner width of the feed-forward block, or of an expert."""
    experts: ExpertsConfig | None = None
    """Experts in the place of every feed-forward block (llama); null means none."""
    num_attention_heads: int = Field(ge=1, le=1 << 20)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1, le=1 << 20)
    """Key/value heads (GQA); null means one per query head."""
    kv_channels: int | None = Field(default=None, ge=1, le=1 << 20)
    """Width of a head; null means hidden_size / num_attention_heads."""
    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """Of the feed-forward block; null means silu (llama) or gelu (gpt2); gelu_tanh is that of OpenAI's GPT-2."""
    rotary_base: int | float = Field(default=10000, ge=1, le=1 << 62)
    """RoPE base (llama)."""
    rotary_fraction: float = Field(default=1.0, gt=0, le=1)
    """RoPE turns this share of a head's channels, the first ones, and leaves the rest alone (llama)."""
    rope_scaling_factor: float | None = Field(default=None, gt=0, le=1e6)
    """Llama 3's RoPE scaling for contexts beyond 8192 positions by this factor (llama); null means none."""
    rope_linear_factor: float | None = Field(default=None, gt=0, le=1e6)
    """RoPE's angles are divided by this (llama); null means by nothing."""
    windowed_rotary_base: int | float | None = Field(default=None, gt=1, le=1 << 62)
    """RoPE base of layers within a window, which no scaling touches then (llama); null means as everywhere."""
    yarn: YarnConfig | None = None
    """YaRN's RoPE scaling (llama); null means none."""
    attention_layers: str = Field(default="f", pattern="^[fwn]+$", max_length=1 << 14)
    """A letter for each layer, repeated over all (llama): f full attention, w within a window, n full without RoPE."""
    sliding_window: int | None = Field(default=None, ge=1, le=1 << 40)
    """Positions that those layers w attend to, a token's own included."""
    attention_temperature: float | None = Field(default=None, gt=0, le=1e6)
    """Queries at position p are multiplied by 1 + this * ln(1 + floor(p / attention_temperature_positions)) (llama)."""
    attention_temperature_positions: int | None = Field(default=None, ge=1, le=1 << 40)
    """See attention_temperature."""
    attention_scale_width: int | None = Field(default=None, ge=1, le=1 << 20)
    """Products of queries and keys are divided by the root of this (llama); null means the width of a head."""
    attention_logit_cap: float | None = Field(default=None, gt=0, le=1e6)
    """Those quotients s become this * tanh(s / this) (llama); null means that they stay."""
    logit_cap: float | None = Field(default=None, gt=0, le=1e6)
    """The model's logits z become this * tanh(z / this) (llama); null means that they stay."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections, as in Qwen2 (llama)."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, as in Qwen3 (llama)."""
    qk_norm_whole: bool = False
    """RMSNorm over the queries, and the keys, of all heads together, as in Olmo 2 and 3 (llama)."""
    attention_sinks: bool = False
    """A learned logit for each head that takes its share of attention and adds nothing, as in gpt-oss (llama)."""
    attention_output_bias: bool = False
    """Bias on the projection that writes attention to the stream (llama)."""
    mlp_bias: bool = False
    """Biases on the feed-forward block (llama)."""
    norm_epsilon: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of the norms."""
    tie_embeddings: bool = False
    """Share the input embedding with the LM head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Hidden and attention dropout."""
    init: Literal["megatron", "xavier", "fan_in", "deepscale", "completep", "deepnorm"] = "megatron"
    """Weights, residual scaling: deepscale (arXiv 2403.09635), completep (2505.01618), deepnorm (post; 2203.00555)."""
    init_std: float = Field(default=0.02, gt=0, le=1e6)
    """Standard deviation of init: megatron; output projections use init_std / sqrt(2 num_layers)."""
    norm_placement: Literal["pre", "post", "reordered", "sandwich"] = "pre"
    """`pre`: norms at the branches' inputs; `post` (experimental): after the sum, as in the first transformers;
    `reordered`: of the branches' outputs, as in Olmo 2 and 3 (llama); `sandwich`: of both, as in Gemma 3 (llama)."""
    zero_centred_norms: bool = False
    """Norms multiply by 1 + their weight (llama)."""
    embedding_scale: float | None = Field(default=None, gt=0, le=1e6)
    """Factor on the embedding's vectors (llama)."""
    residual_k: float = Field(default=1.0, gt=0)
    """init: deepscale gives a branch the share beta^2 = residual_k / (2 num_layers) of the stream's variance."""
    base_num_layers: int = Field(default=1, ge=1, le=1 << 20)
    """init: completep multiplies branches by base_num_layers / num_layers; the depth the optimizer was tuned at."""
    base_hidden_size: int | None = Field(default=None, ge=1, le=1 << 24)
    """init: completep: the width the optimizer was tuned at; null means hidden_size."""
    vocab_divisor: int = Field(default=128, ge=1, le=1 << 20)
    """The vocabulary is padded to a multiple of this (and of the tensor-parallel size)."""
    spec: Literal["auto", "local", "te"] = "local"
    """Layer modules: `local` (PyTorch), `te` (Transformer Engine, on GPUs), `auto` (te where it is installed)."""
    implementation: Literal["gpt", "hybrid"] = "gpt"
    """Class of the model: GPTModel, or HybridModel (megatron-core 0.19 on): the same weights, curve, checkpoints."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of the matrix products (spec: te); hybrid has e5m2 gradients; null means none."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How fp8 chooses its scales, as Transformer Engine names it."""

    @field_validator("rotary_base", "windowed_rotary_base")
    @classmethod
    def _whole_where_it_can_be(cls, value: int | float | None) -> int | float | None:
        """Records of older versions have whole numbers, and 1e4 is one."""
        return int(value) if value is not None and int(value) == value else value

    def attention_of(self, layer: int) -> str:
        """Return the kind of attention of a layer, counted from 0: a letter of attention_layers."""
        return self.attention_layers[layer % len(self.attention_layers)]

    @property
    def attention_kinds(self) -> frozenset[str]:
        """The kinds of attention of all layers."""
        return frozenset(map(self.attention_of, range(self.num_layers)))

    @property
    def own_modules(self) -> list[str]:
        """Keys that megatron-core's and Transformer Engine's layers do not have: they need modules of this project."""
        fields = type(self).model_fields
        return [name for name in OWN_MODULES if getattr(self, name) != fields[name].default]

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        fields = type(self).model_fields
        used = [name for name in LLAMA_ONLY if getattr(self, name) != fields[name].default]
        if self.norm_placement in OF_BRANCHES:
            used.append(f"norm_placement: {self.norm_placement}")
        if self.arch != "llama" and used:
            raise ValueError(f"{', '.join(used)}: only for arch: llama, not {self.arch}")
        self._check_attention()
        self._check_init()
        self._check_spec()
        return self

    def _check_attention(self) -> None:
        if ("w" in self.attention_layers) != (self.sliding_window is not None):
            raise ValueError(
                f"attention_layers: {self.attention_layers} and sliding_window: {self.sliding_window}; layers w "
                "need the length of their window, and no others have one"
            )
        if (self.attention_temperature is None) != (self.attention_temperature_positions is None):
            raise ValueError(
                "attention_temperature and attention_temperature_positions: set both or none"
            )
        scalings = ("yarn", "rope_scaling_factor", "rope_linear_factor")
        if sum(getattr(self, name) is not None for name in scalings) > 1:
            raise ValueError(f"{', '.join(scalings)}: only one can scale RoPE")
        width = self.kv_channels or self.hidden_size // self.num_attention_heads
        turned = int(width * self.rotary_fraction)
        if self.rotary_fraction < 1 and (turned < 2 or turned % 2):
            raise ValueError(
                f"rotary_fraction: {self.rotary_fraction} of {width} channels are {turned}; RoPE turns pairs of them"
            )
        if self.mlp_bias and self.experts is not None:
            raise ValueError("mlp_bias: not of experts; set experts.biases")
        if self.attention_sinks and self.attention_logit_cap is not None:
            raise ValueError("attention_sinks and attention_logit_cap: only one can be set")
        if self.qk_norm and self.qk_norm_whole:
            raise ValueError("qk_norm and qk_norm_whole: only one can be set")

    def _check_spec(self) -> None:
        if self.spec == "te" and self.norm_placement == "post":
            raise ValueError(
                "spec: te joins each norm to the projection after it, which norm_placement: post does not have; "
                "set spec: local"
            )
        own = [
            *self.own_modules,
            *(["experts"] if self.experts is not None else []),
            *(["norm_placement"] if self.norm_placement in OF_BRANCHES else []),
        ]
        if self.spec == "te" and own:
            raise ValueError(f"spec: te has no layers with {', '.join(own)}; set spec: local")
        if self.fp8 is not None and self.spec != "te":
            raise ValueError(
                f"fp8: {self.fp8} needs the layers of Transformer Engine; set spec: te"
            )

    def _check_init(self) -> None:
        if self.init == "deepscale" and self.residual_k >= 2 * self.num_layers:
            raise ValueError(
                f"residual_k: {self.residual_k:g} gives beta^2 = residual_k / (2 num_layers) = "
                f"{self.residual_k / (2 * self.num_layers):g}; it must be below 1, "
                f"so residual_k below {2 * self.num_layers}"
            )
        if self.norm_placement in OF_BRANCHES and self.init in (
            "deepscale",
            "completep",
            "deepnorm",
        ):
            raise ValueError(
                f"init: {self.init} is not derived for norm_placement: {self.norm_placement}, whose branches are "
                "normalised before they are added; set init: megatron, xavier or fan_in"
            )
        own = [name for name in NOT_DERIVED if getattr(self, name)]
        if own and self.init != "megatron":
            raise ValueError(f"init: {self.init} is not derived for {', '.join(own)}; set megatron")
        only = {"completep": "pre", "deepnorm": "post"}.get(self.init)
        if only not in (None, self.norm_placement):
            raise ValueError(
                f"init: {self.init} is derived for norm_placement: {only}, not {self.norm_placement}"
            )
        if self.tie_embeddings and self.init == "completep":
            raise ValueError(
                "init: completep gives the LM head rules of its own; set tie_embeddings: false"
            )
        gained = self.tie_embeddings and self.init in ("fan_in", "deepscale", "deepnorm")
        if gained and self.norm_placement == "post":
            raise ValueError(
                f"init: {self.init} makes tied logits of unit variance by the gain of the final norm, which "
                "norm_placement: post does not have; set tie_embeddings: false"
            )


OF_BRANCHES = ("reordered", "sandwich")
"""Values of norm_placement that normalise the branches' outputs."""


class ParallelConfig(Section):
    """How one model is spread over processes; data parallelism takes what is left."""

    tensor: int = Field(default=1, ge=1, le=1 << 20)
    """Tensor-parallel size."""
    pipeline: int = Field(default=1, ge=1, le=1 << 20)
    """Pipeline-parallel size."""
    virtual_pipeline: int = Field(default=1, ge=1, le=1 << 14)
    """Model chunks per pipeline stage (interleaved schedule when > 1)."""
    sequence_parallel: bool = False
    """Split activations over the sequence between tensor-parallel regions."""
    context: int = Field(default=1, ge=1, le=1 << 20)
    """Context-parallel size: ranks that share each sequence, attention included."""
    expert: int = Field(default=1, ge=1, le=1 << 20)
    """Expert-parallel size: ranks of a pipeline stage, in order, that share out the experts (model.experts)."""
    first_stage_layers: int | None = Field(default=None, ge=1, le=1 << 14)
    """Layers of the first pipeline stage, which also has the embedding; null means an equal share."""
    last_stage_layers: int | None = Field(default=None, ge=1, le=1 << 14)
    """Layers of the last pipeline stage, which also has the LM head and the loss; null means an equal share."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel (and context-parallel) ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass begins (distributed_optimizer, overlap_grad_reduce)."""
    fuse_gradient_accumulation: bool = False
    """Add weight gradients to their fp32 buffer in the matrix product (GPUs with NVIDIA's apex)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of recompute_modules, or whole layers."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("mlp",)
    """What recompute: selective leaves out of memory; core_attn is little but for context parallelism."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """recompute: full keeps the input of every `recompute_num_layers` layers, or recomputes only that many (block)."""
    recompute_num_layers: int = Field(default=1, ge=1, le=1 << 14)
    """Layers of a group (uniform), or of a stage's chunk that are recomputed (block)."""

    @model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.overlap_param_gather and not (
            self.distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ValueError(
                "overlap_param_gather: needs distributed_optimizer: true and overlap_grad_reduce: true"
            )
        needs = {
            "recompute_modules": "selective",
            "recompute_method": "full",
            "recompute_num_layers": "full",
        }
        for name, kind in needs.items():
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and self.recompute != kind:
                raise ValueError(f"{name}: only for recompute: {kind}, not {self.recompute}")
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("recompute_modules: name at least one, or set recompute: none")
        return self


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    algorithm: Literal["adam", "muon"] = "adam"
    """AdamW; muon is refused, and the message says what of it is missing here."""
    lr: float = Field(default=3e-4, gt=0, le=1e6)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0, le=1 << 38)
    """Linear warm-up from zero."""
    decay_steps: int | None = Field(default=None, ge=1, le=1 << 38)
    """Steps until min_lr is reached; null means train.steps."""
    decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay; wsd stays at lr but for the last wsd_decay_steps (warm-up, stable, decay)."""
    wsd_decay_steps: int | None = Field(default=None, ge=1, le=1 << 38)
    """Steps of the decay of decay_style: wsd, the last ones of decay_steps."""
    wsd_decay_style: Literal["linear", "cosine", "minus_sqrt"] = "linear"
    """Shape of that decay; minus_sqrt is 1 - sqrt(share of its steps done)."""
    weight_decay: float = Field(default=0.1, ge=0, le=1e6)
    """Decoupled weight decay (matrices only)."""
    decay_embeddings: bool = True
    """Whether embeddings, and a head tied to one, decay; norms and biases never do."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Gradient-norm clip; 0 turns it off."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keeps an exponential moving average of the weights in fp32, evaluated and exported beside them: a step adds 1 -
    ema_decay of its own, step n at least 9 / (10 + n); null keeps none (megatron)."""
    backend: Literal["megatron", "deepspeed"] = "megatron"
    """What shards and updates the weights; a checkpoint of one resumes under the other."""
    zero_stage: Literal[1, 2, 3] | None = None
    """ZeRO (deepspeed): data-parallel ranks share out optimizer state (1, null), gradients too (2), weights too (3)."""
    offload: bool = False
    """Keep optimizer state and master weights in host memory and update them there (deepspeed)."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr: {self.min_lr:g} is above lr: {self.lr:g}; the rate falls from lr to min_lr, "
                "so lower min_lr or raise lr"
            )
        if (self.decay_style == "wsd") != (self.wsd_decay_steps is not None):
            raise ValueError(
                f"decay_style: {self.decay_style} and wsd_decay_steps: {self.wsd_decay_steps}; "
                "wsd needs the length of its decay, and nothing else has one"
            )
        if self.decay_style != "wsd" and self.wsd_decay_style != "linear":
            raise ValueError(f"wsd_decay_style: only for decay_style: wsd, not {self.decay_style}")
        if self.ema_decay is not None and self.backend == "deepspeed":
            raise ValueError("ema_decay: only for backend: megatron, not deepspeed")
        wanted = {"zero_stage": self.zero_stage is not None, "offload": self.offload}
        used = [name for name, is_set in wanted.items() if is_set]
        if self.backend != "deepspeed" and used:
            raise ValueError(f"{', '.join(used)}: only for backend: deepspeed, not {self.backend}")
        return self

    def decay_left(self, step: int, *, steps: int) -> float:
        """Return how much of the rate's decay is left at a step: from the warm-up on, (rate - min_lr) / (lr - min_lr).

        Args:
            step: 1 is the first.
            steps: of the run.

        Returns:
            1 until the decay begins, the warm-up included; 0 from its end.
        """
        end = max(self.decay_steps or steps, self.warmup_steps + 1)
        length = self.wsd_decay_steps or end - self.warmup_steps
        done = min(max(step - (end - length), 0) / length, 1.0)
        shape = self.wsd_decay_style if self.decay_style == "wsd" else self.decay_style
        return {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "minus_sqrt": 1 - math.sqrt(done),
        }[shape]


def checkpoint_bytes_per_parameter(precision: str, *, averaged: bool) -> int:
    """Return the bytes that a checkpoint holds for each parameter.

    They are the weight ("fp32" 4, "bf16" 2), beside bf16 the optimizer's fp32 weight (4), Adam's moments (8), and
    with optimizer.ema_decay the average (4).
    """
    return (2 + 4 + 8 if precision == "bf16" else 4 + 8) + (4 if averaged else 0)
