"""Weights in Hugging Face's format, to and from megatron-core models of any layout."""

from distill_pretrain.checkpoint.hf.config import HFModel, hf_config, read_hf_model
from distill_pretrain.checkpoint.hf.load import check_hf_weights, load_hf_weights
from distill_pretrain.checkpoint.hf.save import save_hf_model

__all__ = [
    "HFModel",
    "check_hf_weights",
    "hf_config",
    "load_hf_weights",
    "read_hf_model",
    "save_hf_model",
]
