"""Deep students: signal and gradients through up to 192 layers, against theory and between layouts; what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.checkpoint.store import require_same_run
from distill_pretrain.contracts import TokenBatch
from distill_pretrain.errors import CheckpointError
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.mcore.init.deep import (
    initial_stds,
    require_residual,
    residual_identity,
    residual_scaling,
    row_stds,
)
from distill_pretrain.mcore.init.moments import feed_forward_gain
from distill_pretrain.mcore.init.theory import Signal, predict
from distill_pretrain.mcore.model.config import ModelConfig, ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, make_job, take_step

VOCAB_SIZE, POSITIONS = 256, 64


def deep_model(num_layers: int, init: str, width: int = 64, **settings: Any) -> ModelConfig:
    base: dict[str, Any] = {
        **LLAMA,
        "num_layers": num_layers,
        "hidden_size": width,
        "ffn_hidden_size": 11 * width // 4,
        "init": init,
        "vocab_divisor": 1,
    }
    return ModelConfig(**{**base, **settings})


def zipf_batch(num_sequences: int = 2) -> TokenBatch:
    """Words that repeat as in text."""
    rng, weights = np.random.Generator(np.random.Philox(1)), 1 / np.arange(1, VOCAB_SIZE + 1)
    size = (num_sequences, POSITIONS + 1)
    rows = torch.from_numpy(rng.choice(VOCAB_SIZE, size, p=weights / weights.sum()))
    return TokenBatch(tokens=rows[:, :-1], labels=rows[:, 1:].contiguous())


def build(model: ModelConfig, parallel: ParallelConfig, groups: Any, **settings: Any) -> Any:
    from distill_pretrain.mcore.model.chunks import build_model_chunks

    settings = {"precision": "fp32", "seed": 1, **settings}
    return build_model_chunks(
        model,
        parallel,
        vocab_size=VOCAB_SIZE,
        seq_len=POSITIONS,
        loss_function=DistillationObjective(
            ObjectiveConfig(), vocab_size=VOCAB_SIZE, tensor_group=groups.tensor
        ),
        **settings,
    )


def measured(model: ModelConfig, parallel: ParallelConfig, groups: Any) -> Signal:
    from distill_pretrain.mcore.init.signal import measure

    return measure(build(model, parallel, groups), model, zipf_batch())


def predicted(model: ModelConfig) -> Signal:
    batch = zipf_batch()
    return predict(model, batch.tokens.numpy(), batch.labels.numpy(), vocab_size=VOCAB_SIZE)


DEPTHS = {
    "deepscale 12": deep_model(12, "deepscale", width=128),
    "deepscale 48": deep_model(48, "deepscale"),
    "deepscale 192": deep_model(192, "deepscale"),
    "deepscale 48, k = 2": deep_model(48, "deepscale", residual_k=2.0),
    "deepscale 24, gpt2": deep_model(
        24, "deepscale", width=96, arch="gpt2", num_query_groups=None, dropout=0.1
    ),
    "deepscale 24, post": deep_model(24, "deepscale", norm_placement="post"),
    "deepscale 12, tied": deep_model(12, "deepscale", width=128, tie_embeddings=True),
    # The gains of std 0.02 at width 256.
    "megatron 192": deep_model(192, "megatron", init_std=0.04),
    "xavier 192": deep_model(192, "xavier"),
    "megatron 24": deep_model(24, "megatron", init_std=0.04),
    "xavier 24": deep_model(24, "xavier"),
    "xavier 48, post": deep_model(48, "xavier", norm_placement="post"),
    "fan_in 24": deep_model(24, "fan_in"),
    "completep 24": deep_model(24, "completep", base_num_layers=4),
    "deepnorm 48": deep_model(48, "deepnorm", norm_placement="post"),
}


@pytest.fixture(scope="module")
def signals() -> dict[str, Signal]:
    """Of every model above, measured."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        return {name: measured(model, ParallelConfig(), groups) for name, model in DEPTHS.items()}


@pytest.mark.parametrize("name", [name for name in DEPTHS if name.startswith("deepscale")])
def test_deepscale_keeps_variance_and_gradients_at_any_depth(
    signals: dict[str, Signal], name: str
) -> None:
    found = signals[name]
    assert found.variance.min() > 0.5 and found.variance.max() < 2
    assert found.gradient_span < (4.5 if "k = 2" in name else 3)
    assert found.correlation[-1] < 0.5
    assert found.weight_gradient.max() / found.weight_gradient.min() < 3


def test_other_initialisations_do_not(signals: dict[str, Signal]) -> None:
    megatron, xavier = signals["megatron 192"], signals["xavier 192"]
    ours = signals["deepscale 192"]
    assert megatron.variance.max() < 0.01
    assert megatron.correlation[-1] > 2 * ours.correlation[-1]
    assert megatron.gradient_span > 1.25 * ours.gradient_span
    assert xavier.variance[-1] > 100 and xavier.correlation[-1] > 0.85
    assert xavier.gradient_span > 300
    assert signals["xavier 48, post"].gradient_span > 1e3**0.5
    assert signals["deepnorm 48"].gradient_span < 4


@pytest.mark.parametrize(
    "name", [name for name in DEPTHS if name not in ("megatron 192", "xavier 192")]
)
def test_theory_predicts_every_layer(signals: dict[str, Signal], name: str) -> None:
    """Of one draw of the weights: a narrow model strays from the mean field, a collapsing one more so."""
    found, expected = signals[name], predicted(DEPTHS[name])
    steady = not name.startswith(("megatron", "xavier"))
    np.testing.assert_allclose(found.variance, expected.variance, rtol=0.15 if steady else 0.4)
    np.testing.assert_allclose(
        found.correlation, expected.correlation, atol=0.06 if steady else 0.2
    )
    if name == "xavier 48, post":
        assert (
            expected.gradient_span > 1e3**0.5
        )  # all tokens alike: the mean field is not exact there
        return
    ratio = np.sqrt(found.gradient / expected.gradient)
    assert ratio.max() < (1.3 if steady else 2.5) and ratio.min() > (0.77 if steady else 0.4)
    ratio = found.weight_gradient / expected.weight_gradient
    assert ratio.max() < (1.5 if steady else 3) and ratio.min() > (0.66 if steady else 0.3)


def test_bf16_keeps_the_likeliest_token_at_192_layers() -> None:
    """In the branch-only form; lambda rounds to 1 in bf16, and the plain form then adds up another model."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    model = deep_model(192, "deepscale")
    scaling = residual_scaling(model)
    tokens = zipf_batch(16).tokens
    positions = torch.arange(POSITIONS).expand_as(tokens)

    def two_roundings(training: bool, fused: bool) -> Any:
        return lambda branch, residual, p: scaling.skip * residual + scaling.branch * branch[0]

    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups, torch.no_grad():
        gpt = unwrap(build(model, ParallelConfig(), groups, seed=2)[0]).eval()
        exact = gpt.double()(tokens, positions, None).argmax(-1)
        ours = gpt.bfloat16()(tokens, positions, None).argmax(-1)
        for layer in gpt.decoder.layers:
            layer.self_attn_bda = layer.mlp_bda = two_roundings
        naive = gpt(tokens, positions, None).argmax(-1)
    assert float((ours == exact).double().mean()) >= 0.9
    assert float((naive == exact).double().mean()) < 0.75


DEEP = {**LLAMA, "num_layers": 96, "hidden_size": 16, "ffn_hidden_size": 32, "init": "deepscale"}
COMPLETEP = {**LLAMA, "init": "completep", "base_hidden_size": 16}
LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


def layout_figures(layout: dict[str, int], groups: Any) -> dict[str, Any]:
    """Sums of every initial weight, a signal, and the curves of two steps, on rank 0."""
    from distill_pretrain.mcore.model.chunks import parameters_by_name

    parallel = ParallelConfig(**layout)
    found: dict[str, Any] = {}
    for name, model in (("deep", DEEP), ("completep", COMPLETEP)):
        student, batches = make_job(model, parallel, groups, kd=True, steps=4)
        if name == "deep":
            ours = {
                key: [float(p.double().sum()), float(p.double().pow(2).sum()), p.dim() > 1]
                for key, p in parameters_by_name(student.chunks).items()
            }
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, ours)
            sums: dict[str, list[float]] = {}
            for theirs in everyones:
                for key, (total, squares, is_matrix) in theirs.items():
                    before = sums.get(key, [0.0, 0.0]) if is_matrix else [0.0, 0.0]
                    sums[key] = [before[0] + total, before[1] + squares]
            found["weights"] = sums
        results = [take_step(student, batches, step) for step in range(2)]
        found[name] = [[*r.terms.tolist(), r.grad_norm] for r in results]
    signal = measured(deep_model(8, "deepscale", width=32), parallel, groups)
    found["signal"] = {name: values.tolist() for name, values in vars(signal).items()}
    return found


def under_layouts() -> dict[str, Any]:
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    found = {}
    with process_group():
        for name, layout in LAYOUTS.items():
            with released_groups(), model_parallel(ParallelConfig(**layout), seed=1) as groups:
                found[name] = layout_figures(layout, groups)
    return found


@pytest.mark.slow
def test_layouts_start_and_train_alike() -> None:
    """96 layers under TP2 and PP2 have the weights, the signal and the curves of one process."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        one = layout_figures({}, groups)
    for name, two in run_distributed(under_layouts, 2).items():
        assert two["weights"].keys() == one["weights"].keys()
        for key, sums in one["weights"].items():
            assert two["weights"][key] == pytest.approx(sums, rel=1e-9, abs=1e-9), (name, key)
        for figure in ("deep", "completep"):
            np.testing.assert_allclose(
                two[figure], one[figure], rtol=5e-5, err_msg=f"{name} {figure}"
            )
        for figure, values in one["signal"].items():
            np.testing.assert_allclose(two["signal"][figure], values, rtol=1e-3, err_msg=figure)


def test_the_branch_only_form_is_the_papers_model() -> None:
    """y_l = x_l / lambda^l, for any branch that sees the stream through a norm; Post-LN likewise."""
    rng = np.random.default_rng(0)
    mixes = rng.normal(size=(24, 8, 8)) / math.sqrt(8)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean())

    for placement in ("pre", "post"):
        scaling = residual_scaling(deep_model(12, "deepscale", norm_placement=placement))
        x = y = norm(rng.normal(size=8))
        for sublayer, mix in enumerate(mixes):
            c = scaling.coefficient(sublayer)
            if placement == "pre":
                x = scaling.skip * x + scaling.branch * np.tanh(mix @ norm(x))
                y = y + c * np.tanh(mix @ norm(y))
            else:
                x = norm(scaling.skip * x + scaling.branch * np.tanh(mix @ x))
                y = norm(y + c * np.tanh(mix @ y))
            np.testing.assert_allclose(x, y * scaling.stream_scale(sublayer + 1), rtol=1e-12)


def test_deepscale_stds_follow_the_derivation() -> None:
    model = deep_model(24, "deepscale", width=64, dropout=0.2)
    stds = initial_stds(model)
    assert feed_forward_gain("silu", gated=True) == pytest.approx(0.35578, abs=1e-5)
    assert stds.outer**2 * 176 * 0.35578 == pytest.approx(0.8, rel=1e-4)
    assert stds.value**2 * 64 * stds.attention_output**2 * 64 == pytest.approx(0.8)
    assert stds.word == pytest.approx(math.sqrt(0.8))
    # Four query heads in two groups, heads of 16: [32 query rows | 16 key rows | 16 value rows] per group.
    rows = row_stds(model, "decoder.layers.3.self_attention.linear_qkv.weight")
    assert rows == [(32, stds.query), (16, stds.key), (16, stds.value)]
    gpt2 = initial_stds(deep_model(24, "deepscale", arch="gpt2", num_query_groups=None))
    assert gpt2.word == gpt2.position == pytest.approx(math.sqrt(0.5))
    assert gpt2.outer**2 * 176 * 0.42522 == pytest.approx(1.0, rel=1e-4)
    scaling = residual_scaling(deep_model(192, "deepscale"))
    assert scaling.branch**2 == pytest.approx(1 / 384)
    assert scaling.branch**2 + scaling.skip**2 == pytest.approx(1.0)


def test_completep_sets_rates_and_epsilons_by_kind_of_parameter() -> None:
    """Of a model twice as wide and four times as deep as the tuned one (arXiv 2505.01618, table 1)."""
    from distill_pretrain.mcore.model.chunks import parameters_by_name
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    wide = {**COMPLETEP, "num_layers": 4, "base_num_layers": 1}
    with process_group(), model_parallel(ParallelConfig(), seed=1) as groups:
        student, batches = make_job(wide, ParallelConfig(), groups, kd=False, steps=4)
        take_step(student, batches, 0)
        group_of = {id(p): g for g in student.optimizer.param_groups for p in g["params"]}
        found = {
            name: tuple(group_of[id(p)][key] for key in ("max_lr", "weight_decay", "eps"))
            for name, p in parameters_by_name(student.chunks).items()
        }
        labels = [(g["wd_mult"], g["lr_mult"]) for g in student.optimizer.param_groups]
    assert len(set(labels)) == len(labels) == 5  # a checkpoint tells groups apart by these
    for name, expected in {
        "decoder.layers.2.mlp.linear_fc1.weight": (1.5e-3, 0.2, 1e-8 / 8),
        "decoder.layers.3.input_layernorm.weight": (3e-3, 0.0, 1e-8 / 8),
        "embedding.word_embeddings.weight": (3e-3, 0.1, 1e-8 / 2),
        "decoder.final_layernorm.weight": (3e-3, 0.0, 1e-8 / 2),
        "output_layer.weight": (1.5e-3, 0.2, 1e-8),
    }.items():
        assert found[name] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "deepscale", "residual_k": 8.0}, r"beta\^2 = .* = 1; it must be below 1"),
        ({"init": "completep", "norm_placement": "post"}, "derived for norm_placement: pre"),
        ({"init": "deepnorm"}, "derived for norm_placement: post"),
        ({"init": "completep", "tie_embeddings": True}, "set tie_embeddings: false"),
        (
            {"init": "deepscale", "tie_embeddings": True, "norm_placement": "post"},
            "gain of the final norm",
        ),
    ],
)
def test_what_has_no_derivation_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**{**LLAMA, **settings})


def test_a_checkpoint_of_another_lambda_is_refused_naming_both() -> None:
    trained, wanted = deep_model(24, "deepscale"), deep_model(24, "deepscale", residual_k=2.0)
    identity = residual_identity(trained)
    require_residual(identity, trained, "here")
    both = [f"{residual_scaling(m).skip}" for m in (trained, wanted)]
    with pytest.raises(CheckpointError) as error:
        require_residual(identity, wanted, "here")
    assert all(number in str(error.value) for number in both)
    with pytest.raises(CheckpointError, match=r"found: none \(lambda 1, beta 1\)"):
        require_residual({}, trained, "here")
    checkpoint = Checkpoint(
        folder=Path("run"), step=1, identity=identity, files={}, progress={}, sha256=""
    )
    with pytest.raises(CheckpointError) as error:
        require_same_run(checkpoint, residual_identity(wanted))
    assert all(number in str(error.value) for number in both)
    assert residual_identity(deep_model(24, "fan_in")) == {}
