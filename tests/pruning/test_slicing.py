"""What a smaller model computes: where only idle parts were removed, what the larger one did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from reference import FAMILIES, SIZES, Masks, Reference, exists, make_model, save, weights_of

from distill_pretrain.checkpoint.hf.config import read_hf_model
from distill_pretrain.checkpoint.start import open_weights
from distill_pretrain.pruning.choice import Kept, choose, choose_layers
from distill_pretrain.pruning.config import PruneConfig, TargetConfig
from distill_pretrain.pruning.folder import Source, write_folder
from distill_pretrain.pruning.model import build_model, load_model
from distill_pretrain.pruning.pruner import Pruner
from distill_pretrain.pruning.scores import Scores, collect_scores
from distill_pretrain.pruning.shapes import Shape, num_parameters, with_shape
from distill_pretrain.pruning.slicing import cuts, norm_scale

CPU = torch.device("cpu")
TOKENS = torch.randint(0, SIZES["vocab_size"], (6, 12), generator=torch.Generator().manual_seed(1))
SMALLER = Shape(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=13,
    num_attention_heads=3,
    num_query_groups=1,
)
IDLE = [1, 2, 5, 8, 9, 15, 20, 23]


def smaller(family: str) -> tuple[Shape, list[int]]:
    """The shape without idle parts, and the idle channels; Gemma's heads must divide its width."""
    if not exists(family):
        pytest.skip(f"this transformers has no {family}")
    idle = IDLE[2:] if family.startswith("gemma") else IDLE
    return replace(SMALLER, hidden_size=24 - len(idle)), idle


def idle_parts(model: Any, channels: list[int] = IDLE) -> None:
    """Make a layer, some channels of the stream, a group of every layer and seven ffn channels do nothing."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, channels] = 0
        for number, layer in enumerate(model.model.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[channels] = 0
                if number == 2:
                    linear.weight.zero_()
            idle = slice(0, 6) if number % 2 else slice(6, 12)
            weights_of(layer)["v"][idle] = 0
            if model.config.model_type.startswith("olmo"):
                # Under a norm over all heads an idle one must not count.
                layer.self_attn.k_proj.weight[idle] = 0
                layer.self_attn.q_proj.weight[3 * idle.start : 3 * idle.stop] = 0
            value = getattr(layer.self_attn, "v_proj", None)
            if value is not None and value.bias is not None:
                value.bias[idle] = 0
            weights_of(layer)["up"][[(number + 3 * i) % 20 for i in range(7)]] = 0


def pruned(
    folder: Path, shape: Shape, *, kept: Kept | None = None, rescale: bool = True
) -> tuple[Source, dict[str, Any], list[Any], Kept]:
    source = Source.open(folder)
    scores = collect_scores(load_model(folder, "fp32", CPU), [TOKENS[:4], TOKENS[4:]])
    whole = Shape.of(source.model)
    kept = kept or choose(scores, whole, shape, choose_layers(scores, shape.num_layers))
    model = with_shape(source.model, shape, kept.layers)
    shares = scores.norm_shares if rescale else None
    of_source = {"source": source.model, "vocab_size": source.vocab_size}
    family = source.config["model_type"]
    tensors = list(cuts(model, kept, **of_source, norm_shares=shares, family=family))
    return source, source.config_of(model), tensors, kept


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_idle_parts_are_found_and_nothing_changes_without_them(tmp_path, family):
    # Epsilon is added to another mean square; with a common one the two would differ by 1e-4.
    shape, idle = smaller(family)
    model = make_model(family, rms_norm_eps=1e-9)
    idle_parts(model, idle)
    source, config, tensors, kept = pruned(save(model, tmp_path / "source"), shape)
    assert kept.layers == (0, 1, 3)
    assert kept.groups == ((0,), (1,), (1,))
    assert kept.heads == ((0, 1, 2), (3, 4, 5), (3, 4, 5))
    assert kept.hidden == tuple(channel for channel in range(24) if channel not in idle)
    write_folder(tmp_path / "out", source, config, tensors, {})
    small = load_model(tmp_path / "out", "fp32", CPU)
    # In float64: what fp32 rounds grows from layer to layer.
    found, expected = (
        np.stack([Reference(m).run(row)["logits"] for row in TOKENS.tolist()])
        for m in (small, model)
    )
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.abs(logits(small).numpy() - expected).max() < 1e-3
    in_memory = build_model(config, {c.name: c.read(source.files) for c in tensors}, "fp32", CPU)
    assert torch.equal(logits(in_memory), logits(small))
    # Stock transformers and this project read the same model, with as many parameters as was forecast.
    architecture = with_shape(source.model, shape, kept.layers)
    assert read_hf_model(tmp_path / "out").model == architecture
    assert open_weights(tmp_path / "out", model=architecture, vocab_size=40, seq_len=32)
    assert small.num_parameters() == num_parameters(architecture, vocab_size=40)


def test_norms_must_make_up_for_the_channels_that_are_gone(tmp_path):
    model = make_model("llama")
    idle_parts(model)
    source, config, tensors, _ = pruned(save(model, tmp_path / "s"), SMALLER, rescale=False)
    small = build_model(config, {c.name: c.read(source.files) for c in tensors}, "fp32", CPU)
    expected = logits(model)
    assert (logits(small) - expected).abs().max() > 0.05 * expected.abs().max()
    # Eight of 24 channels are zero: the mean square over the others is larger by 24 / 16.
    shares = torch.tensor([1.5] * 16 + [0.0] * 8, dtype=torch.float64)
    assert norm_scale(shares, torch.arange(16)) == pytest.approx(1.5**0.5)
    assert norm_scale(shares, torch.arange(24)) == 1.0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_kept_computes_what_the_source_does_with_the_rest_masked(tmp_path, family):
    shape, _ = smaller(family)
    model = make_model(family)
    layers, heads = (1, 2, 3), ((0, 2), (4, 5), (1, 2))
    kept = Kept(
        layers=layers,
        hidden=tuple(range(24 - shape.hidden_size, 24)),
        groups=tuple((pair[0] // 3,) for pair in heads),
        heads=heads,
        ffn=tuple(tuple(range(i, 20 - 7 + i)) for i in range(3)),
    )
    shape = replace(shape, num_attention_heads=2)
    source, config, tensors, _ = pruned(
        save(model, tmp_path / "source"), shape, kept=kept, rescale=False
    )
    write_folder(tmp_path / "out", source, config, tensors, {})
    small = load_model(tmp_path / "out", "fp32", CPU)

    def ones(size: int, rows: tuple[tuple[int, ...], ...]) -> dict[int, Any]:
        return {n: np.isin(np.arange(size), row) * 1.0 for n, row in zip(layers, rows, strict=True)}

    masks = Masks(
        layers=layers,
        hidden=np.isin(np.arange(24), kept.hidden) * 1.0,
        heads=ones(6, heads),
        groups=ones(2, kept.groups),
        ffn=ones(20, kept.ffn),
    )
    for row in TOKENS[:2].tolist():
        expected = Reference(model, masks).run(row)["logits"]
        found = Reference(small).run(row)["logits"]
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        computed = logits(small)[TOKENS.tolist().index(row)].numpy()
        assert np.abs(computed - expected).max() < 1e-3
    architecture = with_shape(source.model, shape, layers)
    assert read_hf_model(tmp_path / "out").model == architecture
    assert open_weights(tmp_path / "out", model=architecture, vocab_size=40, seq_len=32)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_query_heads_go_equally_from_every_group(tmp_path, family):
    model = make_model(family)
    gone = {0: (1, 5), 1: (0, 3), 2: (2, 3), 3: (2, 5)}
    with torch.no_grad():
        for layer, heads in gone.items():
            for head in heads:
                projection = model.model.layers[layer].self_attn.o_proj.weight
                projection[:, 6 * head : 6 * head + 6] = 0
    folder = save(model, tmp_path / "source")
    shape = Shape(**{**vars(Shape.of(read_hf_model(folder).model)), "num_attention_heads": 4})
    kept = Kept(
        layers=(0, 1, 2, 3),
        hidden=tuple(range(24)),
        groups=((0, 1),) * 4,
        heads=tuple(tuple(h for h in range(6) if h not in gone[layer]) for layer in range(4)),
        ffn=(tuple(range(20)),) * 4,
    )
    source, config, tensors, _ = pruned(folder, shape, kept=kept)
    assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 2
    smaller = build_model(config, {c.name: c.read(source.files) for c in tensors}, "fp32", CPU)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-5)


def scores_of(heads: list[float], influence: list[list[float]]) -> Scores:
    return Scores(
        similarity=torch.tensor(influence, dtype=torch.float64),
        heads=torch.tensor([heads], dtype=torch.float64),
        ffn=torch.tensor([[3.0, 3.0, 1.0, 3.0]], dtype=torch.float64),
        hidden=torch.tensor([1.0, 2.0, 2.0, 0.5], dtype=torch.float64),
        norm_shares={},
    )


def test_a_group_counts_by_the_heads_that_it_would_keep():
    source = Shape(
        num_layers=1,
        hidden_size=4,
        ffn_hidden_size=4,
        num_attention_heads=6,
        num_query_groups=2,
    )
    # The first group has more in all, the second the two best heads.
    scores = scores_of([5.0, 5.0, 5.0, 6.0, 0.0, 6.0], [[1.0, 0.5], [0.5, 1.0]])
    for heads, groups, expected in ((2, 1, (3, 5)), (3, 1, (0, 1, 2)), (4, 2, (0, 1, 3, 5))):
        wanted = {**vars(source), "num_attention_heads": heads, "num_query_groups": groups}
        kept = choose(scores, source, Shape(**{**wanted, "hidden_size": 2}), (0,))
        assert kept.heads == (expected,)
        assert kept.hidden == (1, 2)
    # Equal scores: what comes first stays.
    assert choose(scores, source, Shape(**{**vars(source), "ffn_hidden_size": 2}), (0,)).ffn == (
        (0, 1),
    )


def test_layers_go_one_by_one_or_as_a_block_by_influence_or_by_loss():
    angles = torch.tensor([0.0, 0.9, 1.5, 0.95, 1.15, 2.0], dtype=torch.float64)
    similarity = torch.cos(angles[:, None] - angles[None, :])
    scores = Scores(
        similarity=similarity,
        heads=torch.zeros(5, 1),
        ffn=torch.zeros(5, 1),
        hidden=torch.zeros(1),
        norm_shares={},
    )
    assert choose_layers(scores, 3) == (0, 1, 4)  # 2 and 3 turn it by .55 and .2
    assert choose_layers(scores, 3, contiguous=True) == (0, 3, 4)  # 1 turns it by .6, and 2 back
    assert choose_layers(scores, 5) == (0, 1, 2, 3, 4)
    asked = []

    def loss_without(layers: tuple[int, ...]) -> float:
        asked.append(layers)
        return {(0,): 2.0, (4,): 1.5, (0, 1): 0.1}.get(layers, 5.0)

    assert choose_layers(scores, 3, loss_without=loss_without) == (1, 2, 3)
    assert asked == [(0,), (1,), (2,), (3,), (4,)]
    assert choose_layers(scores, 3, contiguous=True, loss_without=loss_without) == (2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_numbers_are_the_source_s_own(tmp_path, dtype):
    model = make_model("llama").to(dtype)
    folder = save(model, tmp_path / "source")
    shape = Shape(**{**vars(Shape.of(read_hf_model(folder).model)), "num_layers": 2})
    source, config, tensors, kept = pruned(folder, shape)
    write_folder(tmp_path / "out", source, config, tensors, {})
    state = load_model(tmp_path / "out", "fp32", CPU).state_dict()
    whole = model.state_dict()
    for new, old in enumerate(kept.layers):
        name = "mlp.up_proj.weight"
        assert torch.equal(
            state[f"model.layers.{new}.{name}"], whole[f"model.layers.{old}.{name}"].float()
        )
    stored = {torch.bfloat16: "bf16", torch.float16: "fp32"}[dtype]
    assert read_hf_model(tmp_path / "out").dtype == stored


def test_a_width_that_the_heads_do_not_divide_is_a_mistral(tmp_path):
    model = make_model("llama")
    folder = save(model, tmp_path / "source")
    shape = Shape(**{**vars(Shape.of(read_hf_model(folder).model)), "hidden_size": 20})
    source, config, tensors, _ = pruned(folder, shape)
    write_folder(tmp_path / "out", source, config, tensors, {})
    assert config["model_type"] == "mistral"
    assert logits(load_model(tmp_path / "out", "fp32", CPU)).shape == (6, 12, 40)
    assert read_hf_model(tmp_path / "out").model == with_shape(source.model, shape)


def test_a_phi_that_computes_what_a_llama_does_stays_a_phi(tmp_path):
    source = Source.open(save(make_model("phi3"), tmp_path / "source"))
    batches = [(TOKENS[:, :-1], TOKENS[:, 1:])]
    config = PruneConfig(source=tmp_path, output_dir=tmp_path)
    pruner = Pruner(source, config, scored=batches, reported=batches, vocab_size=40, device=CPU)
    target = {"num_layers": 2, "ffn_hidden_size": 13, "num_query_groups": 1}
    found = pruner.prune("t", TargetConfig(**target))
    write_folder(tmp_path / "out", source, source.config_of(found.model), found.cuts, {})
    small = load_model(tmp_path / "out", "fp32", CPU)
    assert type(small).__name__ == "Phi3ForCausalLM"
    assert small.num_parameters() == found.parameters
    loss = torch.nn.functional.cross_entropy(
        logits(small)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    assert found.loss == pytest.approx(float(loss), abs=1e-5)
