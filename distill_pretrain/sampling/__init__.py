"""Teacher distribution -> sparse targets: exact integer inverse-CDF samplers (numpy reference)."""

from distill_pretrain.sampling.philox import RNG_NAME
from distill_pretrain.sampling.samplers import SAMPLERS, Sampler, sample_sets, sample_targets
from distill_pretrain.sampling.weights import BadLogits

__all__ = ["RNG_NAME", "SAMPLERS", "BadLogits", "Sampler", "sample_sets", "sample_targets"]
