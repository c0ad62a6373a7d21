"""The samplers there are: what recipes, plans, codecs, figures and reports know of each.

How a sampler that draws does so is in `drawing.py`. Recipe sections use this module, and every `--help` reads those: it
imports neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from distill_pretrain.contracts import TargetKind

SamplerName = Literal["systematic", "multinomial", "topk", "topp"]


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """One sampler.

    Attributes:
        summary: what to know of it, for `--help`.
        values: what an entry's value is: "counts" of draws, which are unbiased, or "logprobs" of the likeliest ids,
            whose missing mass is a bias. The codecs of a cache, its size and its comparisons follow from it.
        stream: Philox stream of its draws, its own and never another's; None where nothing is drawn.
        draws_once: one random number for all draws of a position, not one for each.
        own_settings: settings beside N and seed that it alone needs: keys of a recipe, and of a cache's plan.
    """

    summary: str
    values: TargetKind
    stream: int | None = None
    draws_once: bool = False
    own_settings: tuple[str, ...] = ()


SAMPLERS: dict[str, SamplerKind] = {
    "multinomial": SamplerKind(summary="unbiased, the paper's", values="counts", stream=0),
    "systematic": SamplerKind(
        summary="unbiased, least variance", values="counts", stream=1, draws_once=True
    ),
    "topk": SamplerKind(summary="biased", values="logprobs"),
    "topp": SamplerKind(summary="biased", values="logprobs", own_settings=("top_p",)),
}
"""Name to sampler; the order is that of tables."""

UNBIASED = tuple(name for name, kind in SAMPLERS.items() if kind.values == "counts")
TRUNCATED = tuple(name for name, kind in SAMPLERS.items() if kind.values == "logprobs")
"""Those that store the head of the distribution and miss the rest of its mass."""

SUMMARY = ", ".join(f"`{name}` ({kind.summary})" for name, kind in SAMPLERS.items()) + "."
