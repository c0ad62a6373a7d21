"""What a phase records of its start: where its text begins, and the phases before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from distill_pretrain.checkpoint.phase import PhaseWeights
from distill_pretrain.checkpoint.record import RECORD, Checkpoint
from distill_pretrain.errors import CheckpointError

IDENTITY: dict[str, Any] = {
    "sequence_plan_id": "plan",
    "num_sequences": 100,
    "seed": 1,
    "global_batch_size": 4,
    "blend": [{"sequence_plan_id": "other", "num_sequences": 50}],
    "blend_splits": [1, 3],
}
FIRST = {"path": "first", "step": 7, "first_sequence": 0}
BEFORE = {"path": "second", "step": 2, "first_sequence": 8, "earlier": [FIRST]}


def facts(**changed: Any) -> dict[str, Any]:
    """Of a phase with other settings, behind five steps and three batches that were passed over."""
    checkpoint = Checkpoint(
        folder=Path("run"),
        step=5,
        identity={**IDENTITY, "start_from": BEFORE},
        progress={"passed_over": 3},
        files={},
        sha256="",
    )
    weights = PhaseWeights(checkpoint=checkpoint, keeps_optimizer=True, description="")
    return weights.facts({**IDENTITY, **changed})


def test_the_text_goes_on_behind_all_that_was_seen_or_passed_over():
    assert facts()["first_sequence"] == 8 + (5 + 3) * 4
    # Whatever the phase's own batch.
    assert facts(global_batch_size=9)["first_sequence"] == 40


@pytest.mark.parametrize(
    "changed",
    [
        {"sequence_plan_id": "another"},
        {"num_sequences": 99},
        {"seed": 2},
        {"blend": [{"sequence_plan_id": "other", "num_sequences": 51}]},
        {"blend_splits": [2, 2]},
    ],
)
def test_other_text_begins(changed):
    assert facts(**changed)["first_sequence"] == 0


def test_the_phases_before_are_listed_newest_first():
    found = facts()
    assert (found["optimizer"], found["step"]) == ("kept", 5)
    assert found["earlier"] == [{k: v for k, v in BEFORE.items() if k != "earlier"}, FIRST]


def test_a_damaged_end_of_the_phase_before_is_refused(tmp_path):
    (tmp_path / "weights").write_bytes(b"sound")
    files = {"weights": hashlib.sha256(b"sound").hexdigest()}
    (tmp_path / RECORD).write_text(json.dumps({"step": 5, "identity": {}, "files": files}))
    checkpoint = Checkpoint.open(tmp_path)
    weights = PhaseWeights(checkpoint=checkpoint, keeps_optimizer=True, description="")
    assert weights.fingerprint() == checkpoint.sha256
    (tmp_path / "weights").write_bytes(b"spoilt")
    with pytest.raises(CheckpointError, match="not what was saved"):
        weights.fingerprint()
