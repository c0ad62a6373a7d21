"""TFLOP/s of a device, and the share of its peak that they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PEAK_BF16_TFLOPS = {
    "NVIDIA GB200": 2500.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H800": 989.0,
    "NVIDIA H20": 148.0,
    "NVIDIA A100": 312.0,
    "NVIDIA A800": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "AMD Instinct MI300X": 1307.0,
}
"""Dense bf16 matrix products, 1e12 operations per second, by how CUDA names a device; makers' data sheets.

A sheet's figure "with sparsity" is halved. Other GPUs need `train.peak_tflops`.
"""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the peak of this process's device at a precision; None where no table says it (a CPU, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    # The most exact name, word by word: an "NVIDIA L40" is no L4.
    names = [name for name in PEAK_BF16_TFLOPS if words[: len(name.split())] == name.split()]
    return PEAK_BF16_TFLOPS[max(names, key=len)] if names else None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Turns tokens per second into the figures of a device.

    Attributes:
        flops_per_token: see `mcore.flops.training_flops_per_token`.
        num_devices: processes of the job.
        peak_tflops: of a device; None where it is unknown.
    """

    flops_per_token: int
    num_devices: int
    peak_tflops: float | None

    def figures(self, tokens_per_second: float) -> dict[str, float | None]:
        """Return model TFLOP/s of a device, and the model FLOPs utilisation, from 0 to 1."""
        tflops = tokens_per_second * self.flops_per_token / self.num_devices / 1e12
        mfu = None if self.peak_tflops is None else round(tflops / self.peak_tflops, 5)
        return {"tflops_per_device": float(f"{tflops:.5g}"), "mfu": mfu}
