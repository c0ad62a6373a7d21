"""Global batches are the same sequences for any number of ranks and any micro-batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.batches import BatchSource, StudentBatches, pad_targets
from distill_pretrain.errors import LayoutError
from distill_pretrain.processes.context import context_spans
from tests.support.layouts import WalkPlan, WalkTargets


def batches(
    *,
    rank=0,
    size=1,
    micro=2,
    seed=4,
    with_cache=True,
    plan=None,
    cache=None,
    weight=1.0,
    blend=(),
    **more,
) -> StudentBatches:
    plan = plan or WalkPlan()
    targets = (cache or WalkTargets(plan)) if with_cache else None
    first = BatchSource(plan=plan, cache=targets, num_sequences=48, weight=weight)
    return StudentBatches(
        [first, *blend],
        seed=seed,
        global_batch_size=8,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=size,
        device=torch.device("cpu"),
        **more,
    )


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_global_batch_does_not_depend_on_the_layout(size, micro):
    for step in (0, 3, 11):
        expected = sorted(int(s) for m in range(4) for s in batches(micro=2).sequences(step, m)[1])
        found = sorted(
            int(s)
            for rank in range(size)
            for m in range(batches(rank=rank, size=size, micro=micro).num_micro_batches)
            for s in batches(rank=rank, size=size, micro=micro).sequences(step, m)[1]
        )
        assert found == expected


def test_only_the_first_num_sequences_are_visited():
    seen = {int(s) for step in range(12) for m in range(4) for s in batches().sequences(step, m)[1]}
    assert seen == set(range(48))


def test_tokens_labels_and_targets_belong_to_the_same_sequence():
    plan = WalkPlan()
    source = batches(plan=plan)
    batch = source.step_batches(5, with_targets=True)[1]
    _, sequences = source.sequences(5, 1)
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
        def read(self, sequence, tokens, start=0, stop=None):
            raise AssertionError("read")

    source = batches(cache=Unreadable())
    assert source.step_batches(0, with_targets=False)[0].targets is None
    with pytest.raises(AssertionError, match="read"):
        source.step_batches(0, with_targets=True)


def test_logprob_targets_become_probabilities():
    row = RaggedTargets(
        kind="logprobs",
        num_draws=2,
        entries_per_token=np.array([2, 0], dtype=np.int32),
        ids=np.array([3, 8], dtype=np.int32),
        values=np.log(np.array([0.6, 0.1], dtype=np.float32)),
    )
    ids, probs = pad_targets([row, row], rows=2)
    assert ids.dtype == np.int32 and probs.dtype == np.float32
    assert ids.tolist() == [[[3, 8], [-1, -1]]] * 2
    assert np.allclose(probs, [[[0.6, 0.1], [0.0, 0.0]]] * 2)


def test_a_batch_is_int64_on_the_device_and_half_of_that_before():
    source = batches()
    host, moved = source.host_batches(3, True)[0], source.step_batches(3, with_targets=True)[0]
    for before, after in (
        (host.tokens, moved.tokens),
        (host.labels, moved.labels),
        (host.targets.ids, moved.targets.ids[moved.targets.ids >= 0]),
    ):
        assert before.dtype == torch.int32 and after.dtype == torch.int64
        assert torch.equal(before.long(), after)
    assert moved.targets.probs.dtype == torch.float32


class CutTargets(WalkTargets):
    """Counts positions read, and serves any part of a sequence."""

    positions_read = 0

    def read(self, sequence, tokens, start=0, stop=None):
        whole = super().read(sequence, tokens)
        stop = len(tokens) if stop is None else stop
        self.positions_read += stop - start
        ends = np.concatenate([[0], np.cumsum(whole.entries_per_token)])
        return RaggedTargets(
            kind=whole.kind,
            num_draws=whole.num_draws,
            entries_per_token=whole.entries_per_token[start:stop],
            ids=whole.ids[ends[start] : ends[stop]],
            values=whole.values[ends[start] : ends[stop]],
        )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_ranks_share_a_sequence_and_read_only_their_part(size):
    plan = WalkPlan()
    whole = batches(plan=plan).step_batches(2, with_targets=True)
    held = []
    for rank in range(size):
        cache = CutTargets(plan)
        source = batches(plan=plan, cache=cache, context_rank=rank, context_size=size)
        parts = source.step_batches(2, with_targets=True)
        held.append(source.positions)
        for part, full in zip(parts, whole, strict=True):
            columns = torch.from_numpy(source.positions)
            assert torch.equal(part.tokens, full.tokens[:, columns])
            assert torch.equal(part.labels, full.labels[:, columns])
            k = part.targets.ids.size(-1)
            assert torch.equal(part.targets.ids, full.targets.ids[:, columns, :k])
            assert torch.equal(part.targets.probs, full.targets.probs[:, columns, :k])
            assert full.targets.ids[:, columns, k:].eq(-1).all()
        assert cache.positions_read == 8 * plan.seq_len // size
    assert sorted(np.concatenate(held).tolist()) == list(range(plan.seq_len))
    work = [int(positions.sum()) for positions in held]
    assert len(set(work)) == 1, "causal attention costs every rank the same"


def test_context_ranks_hold_chunk_r_and_its_mirror_image():
    assert context_spans(16, 1, 4) == [(2, 4), (12, 14)]
    assert context_spans(16, 3, 4) == [(6, 10)]
    assert context_spans(15, 0, 1) == [(0, 15)]
    with pytest.raises(LayoutError, match="seq_len"):
        context_spans(12, 0, 4)


class TopTargets(CutTargets):
    """Log-probabilities of two ids, as from a top-k capture."""

    def read(self, sequence, tokens, start=0, stop=None):
        return RaggedTargets(
            kind="logprobs",
            num_draws=2,
            entries_per_token=np.full(len(tokens), 2, dtype=np.int32),
            ids=np.tile(np.array([sequence, 149], dtype=np.int32), len(tokens)),
            values=np.log(np.tile(np.array([0.5, 0.25], dtype=np.float32), len(tokens))),
        )


def test_a_blend_mixes_kinds_of_targets_in_one_batch():
    plan, other = WalkPlan(), WalkPlan(num_sequences=20)
    blend = [BatchSource(plan=other, cache=TopTargets(other), num_sequences=20, weight=1.0)]
    source = batches(plan=plan, micro=8, weight=1.0, blend=blend)
    sources, sequences = source.sequences(0, 0)
    batch = source.step_batches(0, with_targets=True)[0]
    assert sorted(sources.tolist()) == [0] * 4 + [1] * 4
    for row, (number, sequence) in enumerate(zip(sources, sequences, strict=True)):
        tokens, _ = (plan, other)[number].read(np.array([sequence]))
        assert batch.tokens[row].tolist() == tokens[0].tolist()
        if number == 1:
            assert batch.targets.ids[row, 0].tolist()[:3] == [sequence, 149, -1]
            assert batch.targets.probs[row, 0].tolist()[:3] == pytest.approx([0.5, 0.25, 0.0])
        else:
            assert batch.targets.probs[row, 0].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "micro"), [(2, 4), (4, 1)])
def test_a_blends_global_batch_does_not_depend_on_the_layout(size, micro):
    def pairs(**layout):
        other = WalkPlan(num_sequences=20)
        blend = [BatchSource(plan=other, cache=None, num_sequences=20, weight=0.3)]
        source = batches(with_cache=False, blend=blend, weight=0.7, **layout)
        numbers = range(source.num_micro_batches)
        return {
            (int(a), int(b)) for n in numbers for a, b in zip(*source.sequences(5, n), strict=True)
        }

    spread = [pairs(rank=rank, size=size, micro=micro) for rank in range(size)]
    assert set.union(*spread) == pairs() and sum(map(len, spread)) == 8
