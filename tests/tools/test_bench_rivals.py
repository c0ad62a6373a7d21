"""The arithmetic of tools/bench_rivals.py, against autograd, known biases, and the other projects' own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.sampling.samplers import Sampler, sample_sets
from tests.support.distributed import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
try:
    from rivals.figures import LayoutSums, squared_bias
    from rivals.kept import Chunk, Kept, dense, implied
    from rivals.losses import difference, our_loss
    from rivals.others import DISTILLKIT_BUDGET, DISTILLKIT_RECOMMENDED, MaxText, distillkit_bytes
    from rivals.ours import Ours
    from rivals.tables import bias, matched_table, within
finally:
    sys.path.remove(str(REPOSITORY / "tools"))

SEQUENCES, LENGTH, VOCAB = 8, 16, 300


@pytest.fixture
def chunks() -> list[Chunk]:
    """Two chunks of all sequences."""
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 3, (SEQUENCES * LENGTH, VOCAB)).astype(np.float32)
    tokens = generator.integers(0, VOCAB, (SEQUENCES, LENGTH)).astype(np.int32)
    positions = np.arange(len(logits), dtype=np.uint64)
    half = len(logits) // 2
    return [
        Chunk(logits[:half], tokens[: SEQUENCES // 2], positions[:half]),
        Chunk(logits[half:], tokens[SEQUENCES // 2 :], positions[half:]),
    ]


def kept_of(generator: np.random.Generator, rows: int, most: int) -> Kept:
    """Up to `most` ids of a softmax over VOCAB, at least one."""
    probs = generator.dirichlet(np.full(VOCAB, 0.05), rows)
    ids = np.argsort(-probs, axis=1)[:, :most]
    there = np.arange(most) < generator.integers(1, most + 1, (rows, 1))
    values = np.where(there, np.take_along_axis(probs, ids, 1), 0)
    return Kept(np.where(there, ids, -1), values.astype(np.float32))


def row_loss(
    use: str, ids: torch.Tensor, probs: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """The loss of one position as its project's documents have it, float64."""
    if use == "both renormalised":
        probs = probs / probs.sum()
        return (probs * (probs.log() - torch.log_softmax(logits[ids], -1))).sum()
    own = torch.log_softmax(logits, -1)
    if use == "renormalised":
        probs = probs / probs.sum()
    loss = (probs * (probs.log() - own[ids])).sum()
    if use == "ghost":
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[ids] = False
        missing = 1 - probs.sum()
        loss = loss + missing * (missing.log() - own[outside].logsumexp(-1))
    return loss


@pytest.mark.parametrize("use", ["as drawn", "ghost", "renormalised", "both renormalised"])
def test_the_implied_target_is_what_autograd_says(use):
    generator = np.random.default_rng(3)
    kept = kept_of(generator, rows=6, most=9)
    if use == "as drawn":
        kept = Kept(kept.ids, kept.probs / kept.probs.sum(axis=1, keepdims=True))
    logits = torch.tensor(generator.normal(0, 2, (6, VOCAB)), requires_grad=True)
    for row in range(6):
        there = torch.from_numpy(kept.ids[row] >= 0)
        ids = torch.from_numpy(kept.ids[row])[there]
        probs = torch.from_numpy(kept.probs[row])[there].double()
        row_loss(use, ids, probs, logits[row]).backward()
    student = torch.softmax(logits.detach(), -1).numpy()
    gradient = student - implied(kept, student, use)
    # The probabilities are fp32, so a mass of 1 is one within its rounding.
    np.testing.assert_allclose(gradient, logits.grad.numpy(), atol=1e-7)


def test_the_squared_bias_of_noisy_draws_is_found_and_that_of_unbiased_ones_is_none():
    generator = np.random.default_rng(1)
    truth = np.full((4000, 5), 0.2)
    for shift in (0.0, 0.03):
        draws = [truth + shift + generator.normal(0, 0.1, truth.shape) for _ in range(4)]
        found = squared_bias(draws, truth)
        error = found.std(ddof=1) / np.sqrt(len(found))
        assert abs(found.mean() - 5 * shift**2) < 4 * error
        assert error < 1e-3


def test_sums_are_means_over_positions_whatever_the_chunks():
    generator = np.random.default_rng(2)
    kept, target, teacher, student = (generator.random((6, 7)) for _ in range(4))
    kept[0, 0] = 0
    sums = LayoutSums()
    for part in (slice(0, 2), slice(2, 6)):
        sums.add(kept[part], target[part], teacher[part], student[part])
    found = sums.figures()
    assert found["entries_per_token"] == pytest.approx(41 / 6)
    assert found["kept_mass"] == pytest.approx(kept.sum() / 6)
    assert found["target"]["squared_error"] == pytest.approx(((kept - teacher) ** 2).sum() / 6)
    assert found["gradient"]["squared_error"] == pytest.approx(((target - teacher) ** 2).sum() / 6)
    assert found["gradient_squared"] == pytest.approx(((student - teacher) ** 2).sum() / 6)
    # Nothing was drawn: wrong in the same way every time.
    assert found["target"]["squared_bias"] == found["target"]["squared_error"]
    sums.target.biases.append(np.array([1e-4, -1e-4, 1e-4, 0]))
    assert bias(sums.target.figures()).startswith("0 ±")


def test_a_rival_stands_beside_the_largest_sample_in_its_bytes_and_in_a_tenth():
    def row(size: float, use: str, basis: str, error: float) -> dict:
        gradient = {"squared_error": error}
        return {
            "bytes_per_token": size,
            "use": use,
            "basis": basis,
            "gradient": gradient,
            "gradient_squared": 2.0,
        }

    report = {
        "layouts": {
            "systematic 12": row(9, "as drawn", "this project", 0.2),
            "systematic 50": row(31, "as drawn", "this project", 0.02),
            "systematic 300": row(100, "as drawn", "this project", 0.002),
            "topk 128": row(300, "ghost", "this project", 1e-4),
            "Theirs": row(310, "ghost", "theirs", 4e-4),
            "Small": row(80, "ghost", "theirs", 4e-3),
        }
    }
    assert within(report, 310) == "systematic 300" and within(report, 8.9) is None
    lines = matched_table(report).splitlines()[2:]
    assert lines[0] == (
        "| Theirs | 310.0 | 2.0e-04 | systematic 300: 100.0 | 1.0e-03 | systematic 50: 31.0 | 1.0e-02 |"
    )
    assert lines[1].endswith("| systematic 50: 31.0 | 1.0e-02 | none |  |")


def plan() -> CachePlan:
    return CachePlan(
        sequence_plan_id="0" * 64,
        tokens={"bin_sha256": "1" * 64, "idx_sha256": "2" * 64},
        tokenizer_sha256=None,
        vocab_size=VOCAB,
        seq_len=LENGTH,
        num_sequences=SEQUENCES,
        sampler={
            "name": "topk",
            "num_draws": 1,
            "temperature": 1.0,
            "seed": 7,
            "rng": "philox4x32-10",
        },
        teacher={"kind": "test"},
        micro_batch_size=SEQUENCES // 2,
        block_tokens=16,
        shard_sequences=2,
        codec=2,
        software={},
    )


@pytest.mark.parametrize(("name", "top_p"), [("systematic", None), ("topp", 0.8)])
def test_our_cache_gives_back_what_was_drawn_and_its_bytes_are_its_files(
    name, top_p, chunks, tmp_path
):
    sampler = Sampler(name=name, num_draws=12, seed=7, top_p=top_p)
    layout = Ours(sampler, tmp_path, plan(), "as drawn")
    for chunk in chunks:
        layout.write(chunk)
    assert layout.finish() == sum(path.stat().st_size for path in tmp_path.glob("*.dpt"))
    assert layout.table_bytes > 0
    for chunk, read in zip(chunks, layout.read(), strict=True):
        (drawn,) = sample_sets(chunk.logits, chunk.positions, [sampler])
        expected = np.zeros(chunk.logits.shape)
        rows = np.repeat(np.arange(len(expected)), drawn.entries_per_token)
        expected[rows, drawn.ids] = drawn.probs()
        np.testing.assert_allclose(dense(layout.kept(read), VOCAB), expected, rtol=2e-3)


def test_distillkits_bytes_are_those_its_documents_state():
    """About 300 and 114, which are those of a vocabulary of 16 bits."""
    assert distillkit_bytes(DISTILLKIT_RECOMMENDED, 49_152) == 128 * 2 + 16 * 2 + 6 * 4
    assert distillkit_bytes(DISTILLKIT_BUDGET, 49_152) == 114
    assert distillkit_bytes(DISTILLKIT_BUDGET, 151_936) == 113 + 2 + 12


def test_maxtexts_records_hold_the_largest_logits(chunks, tmp_path):
    pytest.importorskip("array_record", reason="pip install array-record")
    layout = MaxText(5, tmp_path / "records")
    for chunk in chunks:
        layout.write(chunk)
    assert layout.finish() == (tmp_path / "records").stat().st_size
    for chunk, read in zip(chunks, layout.read(), strict=True):
        kept = layout.kept(read)
        largest = np.sort(chunk.logits, axis=1)[:, :-6:-1].astype(np.float64)
        np.testing.assert_array_equal(
            np.take_along_axis(chunk.logits, kept.ids, axis=1), largest.astype(np.float32)
        )
        powers = np.exp(largest)
        np.testing.assert_allclose(
            kept.probs, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5
        )


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """torch.distributed with a group of one, and Megatron-LM's part of the wheel."""
    pytest.importorskip(
        "megatron.training.distillation", reason="megatron-core 0.19 brings it, for Python 3.12"
    )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_our_loss_with_the_ghost_token_is_megatron_lms():
    from rivals.megatron import topk_kl_div

    generator = np.random.default_rng(4)
    logits = torch.from_numpy(generator.normal(0, 2, (12, VOCAB)).astype(np.float32))
    values, ids = torch.log_softmax(logits.flip(0) + 1, -1).topk(20, dim=-1)
    kept = Kept(ids.numpy(), values.exp().numpy())
    gap = difference(
        our_loss(kept, torch.zeros(12, dtype=torch.int64), "ghost"),
        lambda own: topk_kl_div(own.unsqueeze(1), values.unsqueeze(1), ids.unsqueeze(1)),
        logits,
    )
    assert max(gap.values()) < 1e-6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_megatron_lms_files_hold_the_largest_probabilities(top_p, chunks, tmp_path):
    pytest.importorskip("zstandard", reason="pip install zstandard")
    from rivals.megatron import MegatronLM

    layout = MegatronLM(
        tmp_path / "tars",
        rows=SEQUENCES // 2,
        seq_len=LENGTH,
        num_samples=SEQUENCES,
        top_p=top_p,
    )
    for chunk in chunks:
        layout.write(chunk)
    assert layout.finish() == sum(p.stat().st_size for p in (tmp_path / "tars").iterdir())
    sampler = Sampler(name="topk" if top_p is None else "topp", num_draws=128, seed=0, top_p=top_p)
    for chunk, read in zip(chunks, layout.read(), strict=True):
        (own,) = sample_sets(chunk.logits, chunk.positions, [sampler])
        kept = layout.kept(read)
        assert (kept.ids >= 0).sum(axis=1).tolist() == own.entries_per_token.tolist()
        ours = np.zeros(chunk.logits.shape)
        ours[np.repeat(np.arange(len(ours)), own.entries_per_token), own.ids] = own.probs()
        # They keep logarithms in fp16: a relative error of up to 2^-11 times their size.
        np.testing.assert_allclose(dense(kept, VOCAB), ours, rtol=1e-2)
