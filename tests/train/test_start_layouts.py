"""A student that starts from stored weights has them bit for bit, and learns the same, under every layout."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distill_pretrain.checkpoint.start import open_weights
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.hf_folders import LLAMA9, ROWS, write_llama9
from tests.support.layouts import SEQ_LEN, VOCAB_SIZE, make_job, take_step

pytest.importorskip("transformers")

STEPS = 3
TOLERANCE = 1e-5  # measured: 1e-6
PART_BYTES = 30_000  # a dozen parts
STANDING_STILL = {"lr": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}
ZERO3 = {"backend": "deepspeed", "zero_stage": 3}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "pp2": {"parallel": {"pipeline": 2}},
        "interleaved pp2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        "dp2": {"parallel": {"distributed_optimizer": True}},
        "cp2": {"parallel": {"context": 2}},
    },
    3: {"tp3": {"parallel": {"tensor": 3}}},
    6: {"tp3 x pp2": {"parallel": {"tensor": 3, "pipeline": 2}}},
}
if find_spec("deepspeed") is not None:
    LAYOUTS[2] |= {
        "zero3": {"parallel": {}, "optimizer": ZERO3},
        "zero1": {"parallel": {}, "optimizer": {"backend": "deepspeed"}},
    }


def hf_start(folder: str) -> Any:
    return open_weights(
        Path(folder), model=ModelConfig(**LLAMA9), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN
    )


def curves(folder: str, case: dict[str, Any]) -> list[list[float]]:
    """Loss, CE, KL and gradient norm of the first steps in fp32."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    layout = ParallelConfig(**case["parallel"])
    with released_groups(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(
            LLAMA9, layout, groups, kd=True, steps=STEPS, optimizer=case.get("optimizer")
        )
        hf_start(folder).fill(student)
        results = [take_step(student, batches, step) for step in range(STEPS)]
        return [[*result.terms.tolist(), result.grad_norm] for result in results]


def relayed(folder: str, case: dict[str, Any], out: str, first: str) -> None:
    """Save a bf16 student that starts from a folder, and one that starts from the checkpoint of the first layout."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import start_from_checkpoint
    from distill_pretrain.processes.process import on_first_rank

    layout = ParallelConfig(**case["parallel"])
    optimizer = {**STANDING_STILL, **case.get("optimizer", {})}
    settings = {"kd": True, "steps": STEPS, "precision": "bf16", "optimizer": optimizer}
    with released_groups(), model_parallel(layout, seed=1) as groups:
        for number in (1, 2):
            student, batches = make_job(LLAMA9, layout, groups, **settings)
            if number == 1:
                hf_start(folder).fill(student)
            else:
                start_from_checkpoint(student, Path(first, "1"), part_bytes=PART_BYTES)
            take_step(
                student, batches, 0
            )  # megatron-core cannot save an optimizer before its first
            saved = Path(out, f"{number}")
            on_first_rank(lambda saved=saved: saved.mkdir(parents=True))
            save_student(student, saved)


def run_layouts(folder: str, out: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    with process_group():
        for name, case in cases.items():
            found[name] = curves(folder, case)
            relayed(folder, case, str(Path(out, name)), str(Path(out, next(iter(cases)))))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama9")
    write_llama9(path)
    return path


@pytest.fixture(scope="module")
def one_process(folder) -> list[list[float]]:
    with process_group():
        return curves(str(folder), {"parallel": {}})


def stored_weights(folder: Path, *, is_hf: bool = False) -> dict[str, Any]:
    """The weights of a Hugging Face folder, or the masters of a checkpoint's files, whole and in fp32."""
    from distill_pretrain.checkpoint.hf import load_hf_weights
    from distill_pretrain.mcore.model.chunks import build_model_chunks, parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_weights

    with process_group(), model_parallel(ParallelConfig(), seed=0):
        chunks = build_model_chunks(
            ModelConfig(**LLAMA9),
            ParallelConfig(),
            vocab_size=ROWS if is_hf else VOCAB_SIZE,
            seq_len=SEQ_LEN,
            precision="fp32",
            seed=None,
        )
        if is_hf:
            load_hf_weights(chunks, folder)
        else:
            load_weights(chunks, folder, from_masters=True)
        named = parameters_by_name(chunks)
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def test_the_first_loss_is_that_of_transformers(tmp_path, folder, one_process):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        _, batches = make_job(LLAMA9, ParallelConfig(), groups, kd=True, steps=STEPS)
        micro_batches = batches.step_batches(0, with_targets=False)
    model = write_llama9(tmp_path)
    with torch.no_grad():
        logits = torch.cat([model(batch.tokens).logits for batch in micro_batches])[
            ..., :VOCAB_SIZE
        ]
    labels = torch.cat([batch.labels for batch in micro_batches])
    expected = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), ignore_index=-100)
    assert one_process[0][1] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", sorted(LAYOUTS))
def test_curves_and_masters_are_those_of_one_process(folder, one_process, tmp_path, num_processes):
    cases = LAYOUTS[num_processes]
    found = run_distributed(
        run_layouts, num_processes, folder=str(folder), out=str(tmp_path), cases=cases
    )
    for name in cases:
        assert torch.tensor(found[name]).sub(torch.tensor(one_process)).abs().max() < TOLERANCE, (
            name
        )
    source = stored_weights(folder, is_hf=True)
    assert source["embedding.word_embeddings.weight"][VOCAB_SIZE:ROWS].abs().min() > 0
    source["embedding.word_embeddings.weight"][VOCAB_SIZE:] = (
        0  # rows that are no ids of the corpus
    )
    assert any((value.bfloat16().float() != value).any() for value in source.values())
    for name in cases:
        for number in ("1", "2"):
            masters = stored_weights(tmp_path / name / number)
            for parameter, value in source.items():
                assert torch.equal(masters[parameter], value), (name, number, parameter)
