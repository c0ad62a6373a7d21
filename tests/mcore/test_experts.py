"""Experts: every layout trains one curve, routers' losses are those of a plain formula, checkpoints change layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distill_pretrain.errors import LayoutError
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.mcore.model.layout import check_layout
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.checkpoints import save_student
from tests.support.distributed import run_distributed
from tests.support.layouts import (
    EXPERTS,
    GPT_OSS,
    SEQ_LEN,
    VOCAB_SIZE,
    make_job,
    run_cases,
    take_step,
)
from tests.support.training import run_trainer

STEPS = 4
TOLERANCE = 1e-5
LAYOUTS = {
    "expert 2": {"expert": 2},
    "expert 4, distributed optimizer": {
        "expert": 4,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tensor 2": {"tensor": 2, "sequence_parallel": True},
    "tensor 2, expert 2, distributed optimizer": {
        "tensor": 2,
        "sequence_parallel": True,
        "expert": 2,
        "distributed_optimizer": True,
    },
    "tensor 2, pipeline 2, expert 2": {
        "tensor": 2,
        "sequence_parallel": True,
        "pipeline": 2,
        "expert": 2,
        "recompute": "full",
    },
    "context 2, expert 4": {"context": 2, "expert": 4, "recompute": "selective"},
    "pipeline 2, expert 2": {"pipeline": 2, "expert": 2, "recompute": "selective"},
}


OF_GPT_OSS = (
    "tensor 2, expert 2, distributed optimizer",
    "context 2, expert 4",
    "pipeline 2, expert 2",
)


def cases(layouts, model=EXPERTS, steps=STEPS):
    return {
        name: {"model": model, "parallel": parallel, "kd": True, "steps": steps}
        for name, parallel in layouts.items()
    }


def test_curves_equal_one_process():
    one = {"one": {}}
    references = run_cases({"qwen": cases(one)["one"], "gpt-oss": cases(one, GPT_OSS)["one"]})
    some = {f"gpt-oss, {name}": LAYOUTS[name] for name in OF_GPT_OSS}
    found = run_distributed(run_cases, 4, cases={**cases(LAYOUTS), **cases(some, GPT_OSS)})
    worst = {}
    for layout, curves in found.items():
        reference = references["gpt-oss" if layout.startswith("gpt-oss") else "qwen"]
        worst[layout] = {
            term: max(abs(a - b) for a, b in zip(values, reference[term], strict=True))
            for term, values in curves.items()
        }
    assert set(references["qwen"]) == {
        "loss",
        "ce",
        "kl",
        "grad_norm",
        "load_balancing_loss",
        "router_z_loss",
    }
    assert max(max(terms.values()) for terms in worst.values()) < TOLERANCE, worst


SAVED = {
    "first": {
        "tensor": 2,
        "sequence_parallel": True,
        "expert": 2,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
    },
    "same": {
        "tensor": 2,
        "sequence_parallel": True,
        "expert": 2,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
    },
    "data": {"distributed_optimizer": True},
    "pipeline 2, expert 2": {"pipeline": 2, "expert": 2, "distributed_optimizer": True},
    "plain, first": {"expert": 4},
    "plain, tensor 2": {"tensor": 2, "sequence_parallel": True},
}
SOURCES = {
    "same": "first",
    "data": "first",
    "pipeline 2, expert 2": "data",
    "plain, tensor 2": "plain, first",
}


def save_and_resume(folder: str) -> dict[str, Any]:
    """Two steps and a checkpoint under some layouts, others that go on from them: losses of the third step on.

    The losses of the average of the weights are beside them.
    """
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import load_student, saved_bytes

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with process_group():
        for name, parallel in SAVED.items():
            layout = ParallelConfig(**parallel)
            path = Path(folder, name)
            if dist.get_rank() == 0:
                path.mkdir()
            with released_groups(), model_parallel(layout, seed=1) as groups:
                student, batches = make_job(
                    EXPERTS, layout, groups, kd=True, steps=8, optimizer={"ema_decay": 0.5}
                )
                if name in SOURCES:
                    load_student(student, Path(folder, SOURCES[name]))
                else:
                    for step in (0, 1):
                        take_step(student, batches, step)
                        student.average.update(step + 1)
                dist.barrier()
                save_student(student, path)
                with student.average.in_place():
                    averaged = _evaluated(student, batches)
                found[name] = {
                    "bytes": saved_bytes(student, precision="fp32"),
                    "steps": [take_step(student, batches, s).terms.tolist() for s in (2, 3)],
                    "averaged": averaged,
                }
    return found


def _evaluated(student: Any, batches: Any) -> list[float]:
    own = batches.step_batches(0, with_targets=student.is_last_stage)
    terms, weight = student.evaluate([iter(own) for _ in student.chunks])
    return (terms / weight).tolist()


def test_a_checkpoint_goes_on_under_any_layout(tmp_path):
    found = run_distributed(save_and_resume, 4, folder=str(tmp_path))
    assert found["same"] == found["first"]
    # Tensor-parallel ranks each count their copy of norms and routers.
    sizes = [layout["bytes"] for layout in found.values()]
    assert max(sizes) < 1.01 * min(sizes)
    for name, source in SOURCES.items():
        assert found[name]["averaged"] == pytest.approx(found[source]["averaged"], abs=2e-6)
        for resumed, expected in zip(found[name]["steps"], found[source]["steps"], strict=True):
            assert resumed == pytest.approx(expected, abs=2e-6), name


def start_from(folder: str, checkpoint: str, out: str) -> None:
    """A student of expert-parallel ranks starts from a folder, one of others from its checkpoint; both are written."""
    from distill_pretrain.checkpoint.hf import save_hf_model
    from distill_pretrain.checkpoint.hf.load import check_hf_weights, start_from_hf
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.state import start_from_checkpoint

    model = ModelConfig(**EXPERTS)
    with process_group():
        for name, parallel in (
            ("expert", {"tensor": 2, "sequence_parallel": True, "expert": 2}),
            ("data", {"distributed_optimizer": True}),
        ):
            layout = ParallelConfig(**parallel)
            with released_groups(), model_parallel(layout, seed=1) as groups:
                student, _ = make_job(EXPERTS, layout, groups, kd=False, steps=1)
                if name == "expert":
                    start_from_hf(
                        student,
                        check_hf_weights(Path(folder)),
                        family="qwen3_moe",
                        model=model,
                        vocab_size=VOCAB_SIZE,
                        max_positions=SEQ_LEN,
                    )
                    save_student(student, Path(checkpoint))
                else:
                    start_from_checkpoint(student, Path(checkpoint), part_bytes=1 << 15)
                save_hf_model(
                    student.chunks,
                    model=model,
                    vocab_size=VOCAB_SIZE,
                    max_positions=SEQ_LEN,
                    folder=Path(out, name),
                    dtype="fp32",
                    tokenizer=None,
                )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3-MoE of transformers whose section model is EXPERTS."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen3_moe")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_a_student_starts_from_a_folder_and_from_a_checkpoint_of_another_layout(folder, tmp_path):
    for name in ("checkpoint", "out"):
        (tmp_path / name).mkdir()
    arguments = {"checkpoint": f"{tmp_path / 'checkpoint'}", "out": f"{tmp_path / 'out'}"}
    run_distributed(start_from, 2, folder=str(folder), **arguments)
    source = load_file(folder / "model.safetensors")
    for name in ("expert", "data"):
        written = load_file(tmp_path / "out" / name / "model.safetensors")
        assert set(written) == set(source)
        assert all(torch.equal(written[tensor], source[tensor]) for tensor in source), name


def test_gradients_have_both_losses_of_the_routers_as_a_plain_formula_says(folder):
    """Against transformers' model, in fp64: losses of logits that its routers compute, by autograd alone."""
    import transformers

    from distill_pretrain.checkpoint.hf import load_hf_weights, read_hf_model
    from distill_pretrain.mcore.model.chunks import build_model_chunks
    from distill_pretrain.mcore.model.experts import router_losses
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    tokens = torch.randint(0, VOCAB_SIZE, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    outputs = model(tokens, output_router_logits=True)
    balance = squares = torch.zeros((), dtype=torch.float64)
    for logits in outputs.router_logits:
        logits = logits.view(3, SEQ_LEN, 8)
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(3).indices, 1.0)
        shares, means = chosen.mean(1) / 3, logits.softmax(-1).mean(1)
        balance = balance + 8 * (shares * means).sum()
        squares = squares + logits.logsumexp(-1).square().mean(1).sum()
    total = outputs.logits.square().mean() + SEQ_LEN * (0.05 * balance + 0.01 * squares)
    total.backward()
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        section = read_hf_model(folder).model
        section = section.model_copy(update={"experts": ModelConfig(**EXPERTS).experts})
        chunks = build_model_chunks(
            section,
            ParallelConfig(),
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            precision="fp32",
            seed=None,
        )
        load_hf_weights(chunks, folder)
        positions = torch.arange(SEQ_LEN).expand_as(tokens)
        chunks[0](tokens, positions, None)[..., :VOCAB_SIZE].square().mean().backward()
        found = router_losses(chunks, 3)
        layers = chunks[0].decoder.layers
        for own, theirs in zip(layers, model.model.layers, strict=True):
            torch.testing.assert_close(
                own.mlp.router.weight.grad.double(),
                theirs.mlp.gate.weight.grad,
                rtol=1e-4,
                atol=1e-6,
            )
        assert found.tolist() == pytest.approx([balance.item() / 6, squares.item() / 6], rel=1e-5)
        assert router_losses(chunks, 3).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [EXPERTS, GPT_OSS], ids=["qwen", "gpt-oss"])
def test_grouped_products_are_the_experts_one_after_another(model, dtype):
    from distill_pretrain.mcore.model.chunks import build_model_chunks
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        chunks = build_model_chunks(
            ModelConfig(**{**model, "init_std": 0.3}),
            ParallelConfig(),
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            precision="fp32",
            seed=0,
        )
        experts = chunks[0].decoder.layers[0].mlp.experts.to(dtype)
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randn(20, 32, generator=draw).to(dtype)
        weights = torch.rand(20, generator=draw)
        counts = torch.tensor([4, 0, 3, 6, 1, 0, 2, 4] if model is EXPERTS else [7, 0, 12, 1])
        for name, parameter in experts.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(generator=draw)
        outputs, gradients = [], []
        for grouped in (False, True):
            given = tokens.clone().requires_grad_()
            experts.zero_grad()
            outputs.append(experts.computed(given, counts, weights, grouped=grouped))
            outputs[-1].float().square().sum().backward()
            gradients.append([given.grad, *(p.grad for p in experts.parameters())])
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize(
    ("parallel", "optimizer", "found"),
    [
        ({"expert": 3}, {}, "model.experts.number = 8 is not divisible by parallel.expert = 3"),
        ({"expert": 8}, {}, "4 processes are not divisible by parallel.expert = 8"),
        ({"tensor": 2}, {}, "needs parallel.sequence_parallel = true"),
        ({}, {"backend": "deepspeed"}, "model.experts does not work with optimizer.backend"),
    ],
)
def test_layouts_that_cannot_share_out_the_experts_are_refused(parallel, optimizer, found):
    with pytest.raises(LayoutError, match=found):
        check_layout(
            ModelConfig(**EXPERTS),
            ParallelConfig(**parallel),
            world_size=4,
            micro_batch_size=1,
            global_batch_size=8,
            seq_len=SEQ_LEN,
            optimizer=OptimizerConfig(**optimizer),
        )


def test_losses_of_routers_are_columns_of_their_own(tmp_path):
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.reports.curves import TrainingCurve

    one = ParallelConfig()
    with process_group(), model_parallel(one, seed=1) as groups:
        run_trainer(tmp_path, groups, model=EXPERTS, parallel=one, steps=2, micro_batch_size=2)
    curve = TrainingCurve.load(tmp_path)
    assert (curve["load_balancing_loss"] >= 1).all() and (curve["router_z_loss"] > 0).all()
    objective = 0.3 * curve["ce"] + 0.7 * curve["kl"]
    assert curve["loss"] == pytest.approx(objective, abs=1e-6), "the loss has none of them"


def test_expert_ranks_without_experts_are_refused():
    dense = {key: value for key, value in EXPERTS.items() if key != "experts"}
    with pytest.raises(LayoutError, match=r"parallel\.expert = 2 needs experts"):
        check_layout(
            ModelConfig(**dense),
            ParallelConfig(expert=2),
            world_size=2,
            micro_batch_size=1,
            global_batch_size=8,
            seq_len=SEQ_LEN,
            optimizer=OptimizerConfig(),
        )
