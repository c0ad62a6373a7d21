"""Teacher distribution -> sparse targets: exact integer inverse-CDF samplers (numpy, and what a GPU has to give)."""

from distill_pretrain.sampling.columns import Columns
from distill_pretrain.sampling.figures import DistributionFigures
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.sampling.philox import RNG_NAME
from distill_pretrain.sampling.samplers import (
    SAMPLERS,
    Sampler,
    sample_columns,
    sample_sets,
    sample_targets,
)
from distill_pretrain.sampling.vocab_parallel import sample_sets_parallel
from distill_pretrain.sampling.weights import BadLogits

__all__ = [
    "RNG_NAME",
    "SAMPLERS",
    "BadLogits",
    "Columns",
    "DistributionFigures",
    "Sampler",
    "host_columns",
    "sample_columns",
    "sample_sets",
    "sample_sets_parallel",
    "sample_targets",
]
