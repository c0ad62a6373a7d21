"""Targets that travel as they are stored become what padding on the host makes of them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.batches import drop_targets, pad_targets
from distill_pretrain.data.ragged import PackedTargets

ROWS, POSITIONS, VOCAB_SIZE = 3, 8, 500
CPU = torch.device("cpu")


def drawn(positions: int, *, num_draws: int, kind: str, seed: int) -> RaggedTargets:
    """Some positions have no target; counts sum to the draws."""
    rng = np.random.default_rng(seed)
    entries, ids, values = [], [], []
    for _ in range(positions):
        rows = np.unique(rng.integers(VOCAB_SIZE, size=num_draws), return_counts=True)
        if rng.random() < 0.3:
            rows = (rows[0][:0], rows[1][:0])
        entries.append(len(rows[0]))
        ids.append(rows[0])
        values.append(rows[1])
    counts = np.concatenate(values)
    logprobs = np.log(counts / num_draws * 0.9)
    return RaggedTargets(
        kind=kind,  # type: ignore[arg-type]
        num_draws=num_draws,
        entries_per_token=np.array(entries, np.int32),
        ids=np.concatenate(ids).astype(np.int32),
        values=counts.astype(np.int32) if kind == "counts" else logprobs.astype(np.float32),
    )


CASES = {
    "counts": [("counts", 50), ("counts", 50)],
    "many draws": [("counts", 1000), ("counts", 1000)],
    "log-probabilities": [("logprobs", 12), ("logprobs", 12)],
    "both": [("counts", 7), ("logprobs", 12)],
    "other numbers of draws": [("counts", 7), ("counts", 300)],
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_padded_on_the_device_as_on_the_host(case: str) -> None:
    half = ROWS * POSITIONS // 2
    parts = [drawn(half, num_draws=n, kind=kind, seed=i) for i, (kind, n) in enumerate(CASES[case])]
    labels = np.random.default_rng(9).integers(0, 9, (ROWS, POSITIONS)).astype(np.int32)
    labels[labels == 0] = -100
    ids, probs = pad_targets(parts, rows=ROWS)
    drop_targets(ids, probs, labels)
    packed = PackedTargets.of(parts, rows=ROWS)
    found = packed.to(CPU, torch.from_numpy(labels))
    assert found.ids.dtype == torch.int64 and found.probs.dtype == torch.float32
    assert torch.equal(found.ids, torch.from_numpy(ids).long())
    assert torch.equal(found.probs, torch.from_numpy(probs))
    assert (packed.table is not None) == (case in ("counts", "many draws"))
    entries = len(packed.ids)
    if case == "counts":
        # An id, a count, the number of entries of a position, and the table.
        size = sum(tensor.nbytes for tensor in packed.tensors)
        assert size == 5 * entries + 4 * ROWS * POSITIONS + 4 * 51


def test_no_entry_at_all_is_one_empty_column() -> None:
    none = np.zeros(0, np.int32)
    part = RaggedTargets(
        kind="counts",
        num_draws=5,
        entries_per_token=np.zeros(4, np.int32),
        ids=none,
        values=none,
    )
    found = PackedTargets.of([part], rows=2).to(CPU, torch.zeros(2, 2, dtype=torch.int64))
    assert found.ids.tolist() == [[[-1], [-1]]] * 2 and not found.probs.any()


def test_counts_beyond_the_draws_are_what_they_say() -> None:
    """A damaged cache is refused where it is read; here nothing may go out of bounds."""
    part = RaggedTargets(
        kind="counts",
        num_draws=5,
        entries_per_token=np.array([1], np.int32),
        ids=np.array([3], np.int32),
        values=np.array([300], np.int32),
    )
    found = PackedTargets.of([part], rows=1).to(CPU, torch.zeros(1, 1, dtype=torch.int64))
    assert found.probs.tolist() == [[[60.0]]]
