"""Scores and losses against the same model in float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from dataclasses import replace

from reference import FAMILIES, SIZES, Reference, everything, exists, make_model

from distill_pretrain.pruning.model import mean_loss, without_layers
from distill_pretrain.pruning.scores import collect_scores

TOKENS = torch.randint(0, SIZES["vocab_size"], (5, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request):
    if not exists(request.param):
        pytest.skip(f"this transformers has no {request.param}")
    model = make_model(request.param)
    reference = Reference(model)
    seen = [reference.run(row) for row in TOKENS.tolist()]
    with torch.no_grad():
        logits = model(TOKENS).logits
    expected = np.stack([one["logits"] for one in seen])
    assert np.abs(logits.numpy() - expected).max() < 1e-4  # the reference is this model
    return model, seen, collect_scores(model, [TOKENS[:2], TOKENS[2:4], TOKENS[4:]])


def test_widths_are_mean_magnitudes_over_positions_and_root_sums_of_squares_over_sequences(pair):
    _, seen, scores = pair
    for layer in range(4):
        for head in range(6):
            total = 0.0
            for one in seen:
                norms = [np.linalg.norm(one["heads"][layer][at, head]) for at in range(11)]
                total += (sum(norms) / 11) ** 2
            assert float(scores.heads[layer, head]) == pytest.approx(math.sqrt(total), rel=1e-5)
        for channel in range(20):
            total = sum(
                (sum(abs(one["ffn"][layer][at, channel]) for at in range(11)) / 11) ** 2
                for one in seen
            )
            found = float(scores.ffn[layer, channel])
            assert found == pytest.approx(math.sqrt(total), rel=1e-4)
    for channel in range(24):
        expected = 0.0
        for branch in range(8):
            means = [np.abs(one["branches"][branch][:, channel]).mean() for one in seen]
            expected += math.sqrt(sum(mean**2 for mean in means))
        assert float(scores.hidden[channel]) == pytest.approx(expected, rel=1e-5)


def test_similarity_is_the_mean_cosine_between_points_of_the_residual_stream(pair):
    _, seen, scores = pair
    for i in range(5):
        for j in range(5):
            cosines = [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for one in seen
                for a, b in zip(one["points"][i], one["points"][j], strict=True)
            ]
            assert float(scores.similarity[i, j]) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert scores.block_influence(1, 2) == pytest.approx(1 - float(scores.similarity[1, 3]))


def test_shares_of_a_norm_are_of_its_input(pair):
    model, seen, scores = pair
    # Of the stream, and of Olmo over all heads; norms of single heads stay whole.
    assert set(scores.norm_shares) == set(seen[0]["inputs"])
    for name, found in scores.norm_shares.items():
        x = np.concatenate([one["inputs"][name] for one in seen])
        eps = model.config.rms_norm_eps
        expected = ((x**2 + eps) / ((x**2).mean(axis=1, keepdims=True) + eps)).mean(axis=0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_hooks_are_gone_afterwards(pair):
    model, *_ = pair
    assert not any(module._forward_hooks for module in model.modules())


def test_the_loss_is_the_mean_over_labelled_positions_without_padding_columns(pair):
    model, seen, _ = pair
    labels = torch.roll(TOKENS, -1, dims=1) % 35
    labels[:, -1] = -100
    labels[3, :4] = -100
    total, count = 0.0, 0
    for one, row in zip(seen, labels.tolist(), strict=True):
        for logits, label in zip(one["logits"], row, strict=True):
            if label >= 0:
                known = logits[:35]
                total += math.log(np.exp(known).sum()) - known[label]
                count += 1
    batches = [(TOKENS[:3], labels[:3]), (TOKENS[3:], labels[3:])]
    assert mean_loss(model, batches, vocab_size=35) == pytest.approx(total / count, rel=1e-5)


def test_layers_are_left_out_for_a_while_and_the_others_keep_their_kind(pair):
    model, seen, _ = pair
    layers = list(model.model.layers)
    with without_layers(model, (0, 1)), torch.no_grad():
        assert list(model.model.layers) == [layers[2], layers[3]]
        short = model(TOKENS, use_cache=False).logits
    masks = replace(everything(model.config), layers=(2, 3))
    expected = Reference(model, masks).run(TOKENS[0].tolist())["logits"]
    assert np.abs(short[0].numpy() - expected).max() < 1e-4
    assert list(model.model.layers) == layers
    with torch.no_grad():
        whole = model(TOKENS[:1], use_cache=False).logits[0].numpy()
    assert np.abs(whole - seen[0]["logits"]).max() < 1e-4
