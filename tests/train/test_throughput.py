"""Model FLOPs against a count of the products that PyTorch really makes; peaks by a device's exact name."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.flops import matmul_weights, training_flops_per_token
from distill_pretrain.train.throughput import Throughput, peak_tflops

V, L, B = 96, 16, 3
LLAMA = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
)
GPT2 = LLAMA.model_copy(update={"arch": "gpt2", "num_query_groups": None, "kv_channels": None})


def decoder(model: ModelConfig) -> torch.nn.Module:
    """The matrix products of a decoder of these sizes, written down once more."""
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    gates = 2 if model.arch == "llama" else 1

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = torch.nn.Linear
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleList(
                    [
                        linear(model.hidden_size, heads * width),
                        linear(model.hidden_size, 2 * groups * width),
                        linear(heads * width, model.hidden_size),
                        linear(model.hidden_size, gates * model.ffn_hidden_size),
                        linear(model.ffn_hidden_size, model.hidden_size),
                    ]
                )
                for _ in range(model.num_layers)
            )
            self.head = linear(model.hidden_size, V)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for query, key_value, out, up, down in self.layers:
                q = query(x).view(B, L, heads, width).transpose(1, 2)
                kv = key_value(x).view(B, L, 2, groups, width).permute(2, 0, 3, 1, 4)
                k, v = kv.repeat_interleave(heads // groups, dim=2)
                scores = (q @ k.transpose(-1, -2)).softmax(-1)
                x = x + out((scores @ v).transpose(1, 2).reshape(B, L, -1))
                x = x + down(up(x).chunk(gates, dim=-1)[0])
            return self.head(x)

    return Decoder()


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda model: model.arch)
def test_the_formula_counts_every_product_of_a_training_step(model: ModelConfig) -> None:
    net = decoder(model)
    inputs = torch.randn(B, L, model.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net(inputs).sum().backward()
    expected = counter.get_total_flops()
    assert training_flops_per_token(model, vocab_size=V, seq_len=L) * B * L == expected
    matrices = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    assert matmul_weights(model, vocab_size=V) == matrices


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_of_exactly_that_device(monkeypatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert peak_tflops(gpu, "bf16") == peak
    assert peak_tflops(gpu, "fp32") is None
    assert peak_tflops(torch.device("cpu"), "bf16") is None


def test_utilisation_is_the_share_of_every_devices_peak() -> None:
    figures = Throughput(flops_per_token=6 * 10**9, num_devices=8, peak_tflops=300.0).figures(2e5)
    assert figures == {"tflops_per_device": 150.0, "mfu": 0.5}
    unknown = Throughput(flops_per_token=6, num_devices=1, peak_tflops=None).figures(1e12)
    assert unknown == {"tflops_per_device": 6.0, "mfu": None}
