"""A bad gradient on one rank, and a spike, cost what the policy says and nothing else; SIGTERM saves and ends."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from distill_pretrain.train.config import BadStepsConfig
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, make_job
from tests.support.training import Fault, run_trainer

STEPS = 12
BAD = 7
LAYOUT = ParallelConfig(distributed_optimizer=True)
MODEL = {**LLAMA, "num_layers": 1}


def train(folder: Path, factor: float, on_step: Any = None, **policy: Any) -> Any:
    """Train STEPS steps with a fault: the log's losses and `applied`, or what stopped it; and the weights' sum."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with released_groups(), model_parallel(LAYOUT, seed=1) as groups:
        run = run_trainer(
            folder,
            groups,
            model=MODEL,
            parallel=LAYOUT,
            fault=Fault(at=BAD, factor=factor, rank=1),
            on_line=on_step,
            steps=STEPS,
            checkpoint_interval=4,
            bad_steps=BadStepsConfig(window=3, **policy),
        )
        records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = sum(p.double().abs().sum() for p in run.model.parameters()).item()
        return {
            "loss": [r["loss"] for r in records],
            "applied": [r["applied"] for r in records],
            "weights": weights,
            "ended": "" if run.error is None else str(run.error),
            "stopped": run.stopped,
            "said": run.said,
        }


def by_hand(batch_numbers: list[int | None]) -> dict[str, Any]:
    """The losses of steps on these batches; the update of a negative one is left out."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with released_groups(), model_parallel(LAYOUT, seed=1) as groups:
        student, batches = make_job(MODEL, LAYOUT, groups, kd=True, steps=STEPS)
        losses = []
        for number in batch_numbers:
            micro_batches = batches.step_batches(abs(number), with_targets=True)
            keep = number >= 0
            result = student.step([iter(micro_batches)], lambda seen, keep=keep: keep)
            losses.append(result.terms[0].item())
        model = unwrap(student.chunks[0])
        weights = sum(p.double().abs().sum() for p in model.parameters()).item()
        return {"loss": losses, "weights": weights}


def every_policy(folder: str) -> dict[str, Any]:
    """All runs, two data-parallel ranks with a distributed optimizer."""
    torch.set_num_threads(1)

    def ask(line: str) -> None:
        # Said after the ranks have agreed on step 5: it is step 6 that is saved.
        if line.startswith("step 5/"):
            os.kill(os.getpid(), signal.SIGTERM)

    root = Path(folder)
    for name in ("sigterm", "unbroken", "skip", "spike", "rollback", "stop"):
        (root / name).mkdir(exist_ok=True)
    numbers = list(range(STEPS))
    with process_group():
        stopped = train(root / "sigterm", 1.0, on_step=ask if dist.get_rank() == 1 else None)
        saved = CheckpointStore(root / "sigterm" / "checkpoints").newest().step
        return {
            "good": by_hand(numbers),
            "without": by_hand([-n if n == BAD - 1 else n for n in numbers]),
            # Back from step BAD to the checkpoint of step 4, on with the batches after the bad one.
            "again": by_hand([*range(4), *range(BAD, BAD + STEPS - 4)]),
            "unbroken": train(root / "unbroken", 1.0),
            "skip": train(root / "skip", math.nan),
            "spike": train(root / "spike", 50.0, spike="skip"),
            "rollback": train(root / "rollback", math.inf, nonfinite="rollback"),
            "stop": train(root / "stop", math.nan, nonfinite="stop"),
            "stopped": stopped,
            "saved": saved,
            "resumed": train(root / "sigterm", 1.0),
        }


def test_bad_steps_and_sigterm(tmp_path):
    runs = run_distributed(every_policy, 2, folder=str(tmp_path))
    good, without, again = runs["good"], runs["without"], runs["again"]
    assert runs["unbroken"]["loss"] == good["loss"]
    assert runs["unbroken"]["weights"] == good["weights"]

    for name in ("skip", "spike"):
        found = runs[name]
        assert found["applied"] == [n != BAD - 1 for n in range(STEPS)], name
        assert found["weights"] == without["weights"], name
        same = [n for n in range(STEPS) if n != BAD - 1]
        assert [found["loss"][n] for n in same] == [without["loss"][n] for n in same], name
        assert without["loss"][-1] != good["loss"][-1]
    assert runs["skip"]["loss"][BAD - 1] is None
    assert runs["spike"]["loss"][BAD - 1] > 5 * good["loss"][BAD - 1]

    assert runs["rollback"]["loss"] == again["loss"]
    assert runs["rollback"]["weights"] == again["weights"]
    assert any(f"back at step 4; {BAD - 4} batches" in line for line in runs["rollback"]["said"])

    assert f"step {BAD}" in runs["stop"]["ended"] and "nan" in runs["stop"]["ended"]
    assert len(runs["stop"]["loss"]) == BAD - 1

    assert runs["stopped"]["stopped"] and runs["saved"] == 6
    assert runs["resumed"]["loss"] == good["loss"] and runs["resumed"]["weights"] == good["weights"]
