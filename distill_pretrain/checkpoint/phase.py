"""What the next phase of a run takes from the checkpoint at the end of the phase before.

A run records {"path", "sha256", "optimizer": "kept" or "fresh", "first_sequence": that its data begin with, "step": of
the checkpoint, "earlier": the same of the phases before, newest first} of such a start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.checkpoint.hf.files import bullets
from distill_pretrain.checkpoint.identity import IRRELEVANT, trained_model, upgraded
from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.checkpoint.start import StartingWeights
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.errors import CheckpointError

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import Student

KEY = "train.continue_from"
KEPT, FRESH = "kept", "fresh"
FACTS = ("path", "optimizer", "first_sequence")
"""What events.jsonl tells of the start of a phase."""
CHANGEABLE = frozenset({"rotary_base", "rope_scaling_factor", "dropout", *IRRELEVANT["model"]})
"""Keys of the section model that a phase may set to something else; the others decide what its weights mean."""


def what_cannot_change(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, keeps_optimizer: bool
) -> list[str]:
    """Return one line for each key in which a phase differs from the one before and may not.

    Args:
        found: of the phase before, by keys of an identity: model, optimizer, precision, distributed_optimizer, seq_len
            and vocab_size.
        wanted: of the phase. A number that one of the two does not know is not compared.
        keeps_optimizer: whether the optimizer's state goes on, too.
    """
    old, new = _compared(found, keeps_optimizer), _compared(wanted, keeps_optimizer)
    return [
        f"{key}: {old[key]} before, {new[key]} in the phase"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key]
    ]


def _compared(identity: Mapping[str, Any], keeps_optimizer: bool) -> dict[str, Any]:
    """Return what may not change, by its key in a recipe."""
    model = identity["model"]
    values = {f"model.{key}": value for key, value in model.items() if key not in CHANGEABLE}
    if identity.get("vocab_size") is not None:
        values["data.vocab_size"] = identity["vocab_size"]
    if model.get("arch") == "gpt2" and identity.get("seq_len") is not None:
        # Learned positions are weights.
        values["data.seq_len"] = identity["seq_len"]
    if keeps_optimizer:
        values["train.precision"] = identity.get("precision")
        values["parallel.distributed_optimizer"] = identity.get("distributed_optimizer")
        values["optimizer.decay_embeddings"] = identity["optimizer"].get("decay_embeddings", True)
    return values


def visited(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides which sequences a run visits, and in which order."""
    sources = [identity, *identity.get("blend", [])]
    return {
        "plans": [[of.get("sequence_plan_id"), of.get("num_sequences")] for of in sources],
        "splits": identity.get("blend_splits"),
        "seed": identity.get("seed"),
    }


@dataclass(frozen=True, kw_only=True)
class PhaseWeights(StartingWeights):
    """The end of one phase as the start of the next."""

    checkpoint: Checkpoint
    keeps_optimizer: bool
    description: str

    def fingerprint(self) -> str:
        """See `StartingWeights`."""
        self.checkpoint.verify()
        return self.checkpoint.sha256

    def fill(self, student: Student) -> None:
        """See `StartingWeights`: with the optimizer's state, where it is kept."""
        from distill_pretrain.mcore.student.state import continue_student, start_from_checkpoint

        if self.keeps_optimizer:
            continue_student(student, self.checkpoint.folder)
        else:
            start_from_checkpoint(student, self.checkpoint.folder)

    def facts(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """See `StartingWeights`: data that are the same go on, others begin."""
        before, step = self.checkpoint.identity, self.checkpoint.step
        start = before.get("start_from")
        start = start if isinstance(start, dict) else {}
        first = 0
        if visited(before) == visited(identity):
            batches = step + int(self.checkpoint.progress.get("passed_over", 0))
            first = int(start.get("first_sequence", 0)) + batches * int(before["global_batch_size"])
        earlier = {k: v for k, v in start.items() if k != "earlier"}
        return {
            "optimizer": KEPT if self.keeps_optimizer else FRESH,
            "first_sequence": first,
            "step": step,
            "earlier": [earlier, *start.get("earlier", [])] if "step" in start else [],
        }


def open_phase(
    folder: Path,
    wanted: Mapping[str, Any],
    *,
    keeps_optimizer: bool,
    tokenizer_digests: Sequence[str] = (),
) -> PhaseWeights:
    """Find the checkpoint that a phase starts from, and compare it with the phase; reads records alone.

    Args:
        folder: a run or checkpoint of this project.
        wanted: of the phase; see `what_cannot_change`.
        keeps_optimizer: whether the optimizer's state goes on.
        tokenizer_digests: of the phase's corpus; compared where the checkpoint knows its own.

    Raises:
        CheckpointError: there is none, it is damaged, or the phase changes what cannot change.
    """
    checkpoint = find_checkpoint(folder)
    # Refuses what this version computes otherwise.
    trained_model(checkpoint.identity, checkpoint.folder)
    found = upgraded(checkpoint.identity, checkpoint.folder)
    problems = what_cannot_change(found, wanted, keeps_optimizer=keeps_optimizer)
    known = found.get("tokenizer_sha256")
    if known and tokenizer_digests and known not in tokenizer_digests:
        problems.append(
            f"tokenizer of data.tokens: {known[:12]} before, {tokenizer_digests[0][:12]} in the phase"
        )
    if problems:
        raise CheckpointError(
            "the phase changes what cannot change:\n" + bullets(problems),
            where=f"{KEY} {folder}",
            remedy="restore these keys, or, for those of the optimizer's state, set train.fresh_optimizer",
        )
    state = "state kept" if keeps_optimizer else "fresh"
    return PhaseWeights(
        checkpoint=checkpoint,
        keeps_optimizer=keeps_optimizer,
        description=f"step {checkpoint.step} of the phase before, optimizer {state}",
    )
