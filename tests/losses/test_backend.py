"""What computes the loss is chosen once, the same on all ranks; what cannot be had is an error or one warning."""

from __future__ import annotations

import warnings

import pytest
import torch

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses import backend as loss_backend
from distill_pretrain.losses import sparse_kd
from distill_pretrain.losses.backend import LossBackend, choose_backend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WEIGHTS = {"ce_weight": 0.3, "kd_weight": 0.7}
SETTINGS, CONFIG = LossSettings(**WEIGHTS), ObjectiveConfig(**WEIGHTS)


def say_of_kernels(monkeypatch, problem):
    """Let a GPU have kernels (None), or a problem with them."""
    monkeypatch.setattr(loss_backend, "loading_problem", lambda source, device: problem)


@pytest.mark.parametrize(("asked", "device"), [("reference", GPU), ("auto", CPU)])
def test_plain_pytorch_asks_for_no_kernels(asked, device, monkeypatch):
    monkeypatch.delattr(loss_backend, "loading_problem")
    assert choose_backend(asked, device, None) == LossBackend(name="reference")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_kernels_are_taken_where_they_run(asked, monkeypatch):
    say_of_kernels(monkeypatch, None)
    assert choose_backend(asked, GPU, None).name == "cuda"


def test_a_gpu_without_kernels_is_a_warning_or_where_they_are_insisted_on_an_error(monkeypatch):
    say_of_kernels(monkeypatch, "no compiler")
    with pytest.warns(UserWarning, match="plain PyTorch, slower: no compiler"):
        assert choose_backend("auto", GPU, None).name == "reference"
    with pytest.raises(ConfigError, match=r"objective\.kernel; found: cuda; no compiler.*auto"):
        choose_backend("cuda", GPU, None)
    with pytest.raises(ConfigError, match=r"no such implementation.*found: triton"):
        choose_backend("triton", GPU, None)


def test_kernels_are_insisted_on_without_a_gpu_too():
    with pytest.raises(ConfigError, match=r"found: cuda; the CUDA kernels need a CUDA device"):
        DistillationObjective(
            ObjectiveConfig(kernel="cuda", **WEIGHTS), vocab_size=37, tensor_group=None
        )
    with pytest.raises(ValueError, match="kernel: cuda is for cached targets"):
        ObjectiveConfig(target="teacher", kd_weight=1.0, kernel="cuda")


def test_an_objective_keeps_its_backend(monkeypatch):
    logits, labels, targets = make_case(0)
    batch = TokenBatch(
        tokens=labels[None],
        labels=labels[None],
        targets=SparseTargets(ids=targets.ids[None], probs=targets.probs[None]),
    )
    launcher, launched = emulated(launch.SOURCE), []
    monkeypatch.setattr(stages, "launcher_for", lambda *_: launched.append(1) or launcher)
    monkeypatch.setattr(sparse_kd, "local_device", lambda: GPU)
    say_of_kernels(monkeypatch, None)
    by_kernels = DistillationObjective(CONFIG, vocab_size=37, tensor_group=None)
    # What is asked later finds no kernels; nobody asks.
    say_of_kernels(monkeypatch, "gone")
    terms = by_kernels(logits.clone()[:, None].requires_grad_(), batch)
    forward = len(launched)
    assert forward > 0
    terms[0].backward()
    assert len(launched) > forward
    monkeypatch.undo()
    plain = DistillationObjective(CONFIG, vocab_size=37, tensor_group=None)
    torch.testing.assert_close(terms, plain(logits[:, None], batch), rtol=1e-5, atol=1e-5)


def test_rows_too_large_for_the_kernels_are_one_warning_for_all_sizes():
    loss_backend._warn_of_size.cache_clear()
    kernels = LossBackend(name="cuda")
    assert kernels.fitting(num_entries=512, num_columns=1 << 19) == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_entries in (513, 600, 700):
            assert kernels.fitting(num_entries=num_entries, num_columns=10) == "reference"
        assert kernels.fitting(num_entries=1, num_columns=(1 << 19) + 1) == "reference"
    assert len(caught) == 1 and "512 target entries" in str(caught[0].message)
    insisted = LossBackend(name="cuda", is_insisted=True)
    with pytest.raises(ConfigError, match=r"kernel: cuda; found: 513 target entries.*512.*auto"):
        insisted.fitting(num_entries=513, num_columns=10)


def choices_of_ranks_of_which_one_has_no_kernels() -> list[list[object]]:
    """Each rank's choices, its loss with the choice less the whole's, and how its "cuda" ended."""
    import torch.distributed as dist

    launcher = emulated(launch.SOURCE)
    stages.launcher_for = lambda source, device: launcher
    with process_group(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        problem = "no compiler here" if rank == 1 else None
        loss_backend.loading_problem = lambda source, device: problem
        chosen = choose_backend("auto", GPU, group)
        warned = [str(warning.message) for warning in caught]
        logits, labels, targets = make_case(0)
        expected, _ = sparse_kd_loss(
            logits, labels, targets, SETTINGS, vocab_size=37, tensor_group=None
        )
        mine = logits.chunk(size, dim=1)[rank]
        loss, _ = sparse_kd_loss(
            *(mine, labels, targets, SETTINGS),
            vocab_size=37,
            tensor_group=group,
            implementation=chosen,
        )
        try:
            choose_backend("cuda", GPU, group)
            ended = "chosen"
        except ConfigError as error:
            ended = str(error)
        found = [chosen.name, (loss - expected).abs().max().item(), ended, warned]
        everywhere: list[list[object]] = [[]] * size
        dist.all_gather_object(everywhere, found)
    return everywhere


def test_ranks_that_share_rows_choose_alike():
    ranks = run_distributed(choices_of_ranks_of_which_one_has_no_kernels, 2)
    for name, difference, ended, _ in ranks:
        assert name == "reference"
        assert difference < 5e-6
        assert "found: cuda; no compiler here" in ended
    assert [len(warned) for *_, warned in ranks] == [1, 0]
