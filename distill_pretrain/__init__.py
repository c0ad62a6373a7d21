"""Pretraining language models by offline distillation at cluster scale."""

__version__ = "0.1.0"
