"""Recipe section `prune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)([KMB]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parameter_count(text: Any) -> Any:
    """Read 70M, 1.2B or 70_000_000 as a whole number, and leave anything else as it is.

    Raises:
        ValueError: text that is no count.
    """
    if not isinstance(text, str):
        return text
    found = _COUNT.fullmatch(text)
    if found is None:
        raise ValueError(f"found: {text}; expected: a number of parameters, such as 70M or 1.2B")
    return round(float(found[1].replace("_", "")) * _UNITS[found[2].upper()])


class TargetConfig(Section):
    """A smaller model. Sizes that are not given stay the source's, or are searched for."""

    num_layers: int | None = Field(default=None, ge=1, le=1 << 14)
    """Layers to keep."""
    hidden_size: int | None = Field(default=None, ge=1, le=1 << 20)
    """Channels of the residual stream to keep: the same ones in all layers, the embedding and the LM head."""
    ffn_hidden_size: int | None = Field(default=None, ge=1, le=1 << 24)
    """Channels of the feed-forward block to keep; every layer keeps its own."""
    num_attention_heads: int | None = Field(default=None, ge=1, le=1 << 20)
    """Query heads to keep, equally many in every group that is kept; their width stays."""
    num_query_groups: int | None = Field(default=None, ge=1, le=1 << 20)
    """Key/value heads to keep; given alone, the query heads of the others go with them."""
    parameters: int | None = Field(default=None, ge=1, le=10**15)
    """Search for sizes with at most so many parameters, such as 70M; sizes given above are not searched for."""
    search: Literal["depth", "width", "both"] = "both"
    """What the search may change: the number of layers, all other sizes, or both."""
    layer_score: Literal["block_influence", "loss"] = "block_influence"
    """Which layers go: those that turn the residual stream least (1 - cosine of input and output; arXiv 2403.03853), or
    those without which the loss rises least (a pass for each)."""
    contiguous: bool = False
    """Remove neighbouring layers as one block, scored as one, rather than the lowest one by one."""

    _parameters = field_validator("parameters", mode="before")(parameter_count)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        found = {name: getattr(self, name) for name in SIZES}
        return {name: size for name, size in found.items() if size is not None}

    @model_validator(mode="after")
    def _says_something(self) -> TargetConfig:
        if not self.sizes and self.parameters is None:
            raise ValueError(f"nothing to prune: give one of {', '.join(SIZES)}, or parameters")
        if self.parameters is None and self.search != "both":
            raise ValueError(f"search: {self.search} given without parameters")
        return self


SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
"""Keys of a target that are sizes, named as in the section model."""


class PruneConfig(Section):
    """From a trained model to smaller ones."""

    source: Path
    """Hugging Face folder of a family that is pruned (see the table of families), or run or checkpoint folder of this
    project of the same pieces."""
    output_dir: Path
    """Folder that receives a Hugging Face folder for each target, report.md, scores.png and scores.json."""
    targets: dict[str, TargetConfig] | None = Field(default=None, min_length=1)
    """Name -> {num_layers, hidden_size, ...} or {parameters}; all of them are cut by the scores of one pass."""
    num_sequences: int = Field(default=64, ge=1, le=1 << 20)
    """Sequences of data.tokens on which activations are scored (arXiv 2407.14679 took 1024)."""
    loss_sequences: int = Field(default=8, ge=1, le=1 << 20)
    """Sequences for a loss: the first of those scored, while layers or sizes are searched for; of data.held_out_tokens,
    where it is set, for the report."""
    candidates: int = Field(default=8, ge=1, le=1 << 10)
    """Shapes of a search whose loss is measured, the best of those that fit by what each size alone costs."""
    micro_batch_size: int = Field(default=4, ge=1, le=1 << 16)
    """Sequences per forward pass."""
    seed: int = Field(default=1234, ge=0, lt=1 << 64)
    """Seed of the choice of sequences."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward passes; what is written are the source's own numbers, in its own precision."""
    rescale_norms: bool = True
    """Where channels of an RMSNorm go, multiply its weight by what the smaller mean square changed, as measured; false
    leaves the weights as they are, as Minitron does."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 means all cores."""

    @field_validator("targets")
    @classmethod
    def _names_are_folder_names(
        cls, targets: dict[str, TargetConfig] | None
    ) -> dict[str, TargetConfig] | None:
        for name in targets or {}:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"found: {name!r}; expected: a name for a folder, 1 to 100 of A-Z a-z 0-9 . _ -, "
                    "the first a letter or digit"
                )
        return targets
