"""What a user asks for is what samples, or it is said why not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_sequences
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.cuda.backend import KernelsUnavailable
from distill_pretrain.kernels.cuda.launcher import Launcher
from distill_pretrain.kernels.teacher_sampling import SOURCE, DeviceColumns
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.teacher import sampling_backend
from distill_pretrain.teacher.capture import make_plans
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.sampling_backend import columns_reader, device_reader
from distill_pretrain.teacher.scoring import SampledBatch, score
from tests.support.emulation import emulated
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

CPU, GPU, ALONE = torch.device("cpu"), torch.device("cuda", 0), Replica()


def no_launcher(source: Any, device: torch.device) -> Launcher:
    raise KernelsUnavailable("no compiler", found=device)


@pytest.mark.parametrize(("asked", "device"), [("numpy", GPU), ("numpy", CPU), ("auto", CPU)])
def test_numpy_samples_where_it_is_asked_for_and_where_no_gpu_is(asked, device, monkeypatch):
    monkeypatch.delattr(sampling_backend, "launcher_for")
    assert columns_reader(asked, device, ALONE) is host_columns


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_kernels_sample_on_a_gpu_that_runs_them(asked, monkeypatch):
    monkeypatch.setattr(sampling_backend, "launcher_for", lambda source, device: emulated(source))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = columns_reader(asked, GPU, ALONE)
    assert isinstance(read(torch.zeros(2, 5, dtype=torch.bfloat16)), DeviceColumns)


def test_a_gpu_without_kernels_is_one_warning(monkeypatch):
    monkeypatch.setattr(sampling_backend, "launcher_for", no_launcher)
    with pytest.warns(UserWarning, match="sampled by numpy.*no compiler") as caught:
        assert columns_reader("auto", GPU, ALONE) is host_columns
    assert len(caught) == 1


def test_kernels_that_are_asked_for_and_cannot_be_had_are_an_error():
    with pytest.raises(ConfigError, match=r"capture\.sampling_impl.*found: cuda.*cpu.*auto"):
        columns_reader("cuda", CPU, ALONE)


class HalfPrecision:
    """A teacher of bf16 logits with ties, in two chunks."""

    vocab_size, device, replica = VOCAB_SIZE, CPU, ALONE

    def __init__(self) -> None:
        self.identity = {"kind": "hf"}

    def chunks(self, tokens: torch.Tensor):
        g = torch.Generator().manual_seed(1)
        logits = (torch.randn(tokens.numel(), VOCAB_SIZE, generator=g) * 3).bfloat16()
        yield LogitsChunk(first=0, first_id=0, logits=logits[:37])
        yield LogitsChunk(first=37, first_id=0, logits=logits[37:])


def test_half_precision_is_sampled_as_it_is_with_the_same_figures(tmp_path):
    prefix = write_small_corpus(tmp_path / "train")
    data = DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
    engine, sequences = HalfPrecision(), open_sequences(data)
    config = CaptureConfig(
        output_dir=tmp_path, sets={"rs": {}, "top": {"sampler": "topk", "num_draws": 9}}
    )
    plans = list(make_plans(sequences, config, engine.identity).values())

    def sampled(read: sampling_backend.ReadColumns) -> SampledBatch:
        batch = score(engine, sequences, 0, 3, plans, read)
        assert batch is not None
        return batch

    ours, theirs = sampled(device_reader(emulated(SOURCE))), sampled(host_columns)
    for found, expected in zip(ours.sets, theirs.sets, strict=True):
        assert found.ids.tobytes() == expected.ids.tobytes()
        assert found.values.tobytes() == expected.values.tobytes()
        assert np.array_equal(found.entries_per_token, expected.entries_per_token)
    assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-12)
    assert (ours.top_share, ours.uniform_share) == (theirs.top_share, theirs.uniform_share)
