"""Sampling of teacher targets on a GPU, bit for bit that of `distill_pretrain.sampling`."""

from distill_pretrain.kernels.teacher_sampling.launch import MAX_DRAWS, SOURCE, DeviceColumns

__all__ = ["MAX_DRAWS", "SOURCE", "DeviceColumns"]
