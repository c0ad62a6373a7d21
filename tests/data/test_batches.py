"""Global batches are the same sequences for any number of ranks and any micro-batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.batches import StudentBatches, pad_targets
from tests.support.layouts import WalkPlan, WalkTargets


def batches(*, rank=0, size=1, micro=2, seed=4, with_cache=True, plan=None):
    plan = plan or WalkPlan()
    return StudentBatches(
        plan,
        WalkTargets(plan) if with_cache else None,
        num_sequences=48,
        seed=seed,
        global_batch_size=8,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=size,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_global_batch_does_not_depend_on_the_layout(size, micro):
    for step in (0, 3, 11):
        expected = sorted(int(s) for m in range(4) for s in batches(micro=2).sequences(step, m))
        found = sorted(
            int(s)
            for rank in range(size)
            for m in range(batches(rank=rank, size=size, micro=micro).num_micro_batches)
            for s in batches(rank=rank, size=size, micro=micro).sequences(step, m)
        )
        assert found == expected


def test_only_the_first_num_sequences_are_visited():
    seen = {int(s) for step in range(12) for m in range(4) for s in batches().sequences(step, m)}
    assert seen == set(range(48))


def test_tokens_labels_and_targets_belong_to_the_same_sequence():
    plan = WalkPlan()
    source = batches(plan=plan)
    batch = source.step_batches(5, with_targets=True)[1]
    sequences = source.sequences(5, 1)
    for row, sequence in enumerate(sequences):
        tokens, labels = plan.read(np.array([sequence]))
        stored = WalkTargets(plan).read(int(sequence), tokens[0])
        assert torch.equal(batch.tokens[row], torch.from_numpy(tokens[0].astype(np.int64)))
        assert torch.equal(batch.labels[row], torch.from_numpy(labels[0].astype(np.int64)))
        start = 0
        for position, count in enumerate(stored.entries_per_token):
            ids = batch.targets.ids[row, position]
            probs = batch.targets.probs[row, position]
            assert ids[:count].tolist() == stored.ids[start : start + count].tolist()
            assert ids[count:].eq(-1).all() and probs[count:].eq(0).all()
            assert probs.sum().item() == pytest.approx(1.0 if count else 0.0)
            start += count


def test_targets_are_not_read_where_they_are_not_needed():
    class Unreadable:
        def read(self, sequence, tokens):
            raise AssertionError("read")

    source = batches()
    source.cache = Unreadable()
    assert source.step_batches(0, with_targets=False)[0].targets is None


def test_logprob_targets_become_probabilities():
    row = RaggedTargets(
        kind="logprobs",
        num_draws=2,
        entries_per_token=np.array([2, 0], dtype=np.int32),
        ids=np.array([3, 8], dtype=np.int32),
        values=np.log(np.array([0.6, 0.1], dtype=np.float32)),
    )
    padded = pad_targets([row])
    assert padded.ids.tolist() == [[[3, 8], [-1, -1]]]
    assert torch.allclose(padded.probs, torch.tensor([[[0.6, 0.1], [0.0, 0.0]]]))
