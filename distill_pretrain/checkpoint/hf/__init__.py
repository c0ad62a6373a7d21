"""Weights in Hugging Face's format, to and from megatron-core models of any layout."""

from distill_pretrain.checkpoint.hf.config import HFModel, hf_config, read_hf_model
from distill_pretrain.checkpoint.hf.load import load_hf_weights
from distill_pretrain.checkpoint.hf.save import save_hf_model

__all__ = ["HFModel", "hf_config", "load_hf_weights", "read_hf_model", "save_hf_model"]
