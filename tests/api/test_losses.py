"""The public losses: against the formula, by any shape and dtype; what they refuse, alike on every device."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from distill_pretrain import linear_sparse_kd_loss, sparse_kd_loss
from distill_pretrain.errors import ConfigError, LossInputError
from tests.losses.cases import make_case

V, PADDED, WIDTH = 37, 48, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def case(device="cpu"):
    """Logits [2, 11, 48] of hidden states and a head, labels, ids, probs; some labels and targets missing."""
    _, labels, targets = make_case(0, num_tokens=22)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 11, WIDTH, generator=g).to(device)
    head = torch.randn(PADDED, WIDTH, generator=g).to(device)
    shaped = (
        x.reshape(2, 11, *x.shape[1:]).to(device) for x in (labels, targets.ids, targets.probs)
    )
    return hidden, head, *shaped


def formula(logits, labels, ids, probs, *, ce_weight, kd_weight):
    """The loss of every position, by torch's own functions over the whole vocabulary."""
    logprobs = logits[..., :V].double().log_softmax(-1)
    ce = functional.nll_loss(logprobs.flatten(0, -2), labels.flatten(), reduction="none")
    kept = ids >= 0
    picked = logprobs.gather(-1, ids.clamp(min=0))
    kl = torch.where(kept, torch.special.xlogy(probs, probs) - probs * picked, 0.0).sum(-1)
    return torch.where(labels >= 0, ce_weight * ce.view_as(labels) + kd_weight * kl, 0.0)


WEIGHTS = {"ce_weight": 0.3, "kd_weight": 0.7}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_the_formula_and_its_gradient(reduction, device):
    hidden, head, labels, ids, probs = case(device)
    logits = (hidden @ head.T).requires_grad_()
    expected = formula(logits, labels, ids, probs, **WEIGHTS)
    if reduction != "none":
        expected = expected.sum() / ((labels >= 0).sum() if reduction == "mean" else 1)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    before = logits.detach().clone()
    found = sparse_kd_loss(logits, labels, ids, probs, vocab_size=V, reduction=reduction, **WEIGHTS)
    found.sum().backward()
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(logits.grad, gradient)
    # A leaf's memory stays what it was, and so do logits that are not said to be given away.
    assert torch.equal(logits, before)


def test_one_position_and_no_leading_sizes_are_shapes_too():
    hidden, head, labels, ids, probs = case()
    logits = (hidden @ head.T)[0, 3]
    one = sparse_kd_loss(logits, labels[0, 3], ids[0, 3], probs[0, 3], vocab_size=V)
    rows = sparse_kd_loss(logits[None], labels[0, 3:4], ids[0, 3:4], probs[0, 3:4], vocab_size=V)
    assert one.shape == () and torch.equal(one, rows)


@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_are_written_over_only_where_they_are_given_away(overwrite):
    hidden, head, labels, ids, probs = case()
    weight = head.clone().requires_grad_()
    logits = hidden @ weight.T
    before = logits.detach().clone()
    sparse_kd_loss(logits, labels, ids, probs, overwrite_logits=overwrite).backward()
    assert torch.equal(logits.detach(), before) is not overwrite
    leaf = before.clone().requires_grad_()
    sparse_kd_loss(leaf.view(22, -1), labels.view(-1), ids.view(22, -1), probs.view(22, -1),
                   overwrite_logits=True).backward()  # fmt: skip
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "settings", [{}, {"residual": "ghost"}, {"smoothing": 0.1, "z_loss": 1e-3}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_weight_give_the_loss_of_their_logits(dtype, settings, device):
    hidden, head, labels, ids, probs = case(device)
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    settings = {"vocab_size": V, "return_terms": True, **WEIGHTS, **settings}
    found, terms = linear_sparse_kd_loss(
        hidden, head, labels, ids, probs, chunk_tokens=5, **settings
    )
    gradients = torch.autograd.grad(found, (hidden, head))
    expected, wanted = sparse_kd_loss(hidden @ head.T, labels, ids, probs, **settings)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(found, expected, **tolerance)
    assert found.dtype == torch.float32 and terms.keys() == wanted.keys() == {"ce", "kl", "z"}
    for name, term in terms.items():
        torch.testing.assert_close(term, wanted[name], **tolerance)
    for mine, other in zip(gradients, torch.autograd.grad(expected, (hidden, head)), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, **tolerance)


def test_the_mean_is_over_positions_with_a_label_and_others_have_no_loss():
    hidden, head, labels, ids, probs = case()
    logits = hidden @ head.T
    hidden_from = labels.clone()
    hidden_from[1] = -100
    mean = sparse_kd_loss(logits, hidden_from, ids, probs, vocab_size=V, **WEIGHTS)
    alone = sparse_kd_loss(logits[:1], labels[:1], ids[:1], probs[:1], vocab_size=V, **WEIGHTS)
    torch.testing.assert_close(mean, alone)
    nothing = sparse_kd_loss(logits, labels * 0 - 1, ids, probs, vocab_size=V, **WEIGHTS)
    assert nothing == 0


def test_without_targets_it_is_the_cross_entropy():
    hidden, head, labels, _, _ = case()
    expected = functional.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten())
    settings = {"ce_weight": 1.0, "kd_weight": 0.0}
    torch.testing.assert_close(
        sparse_kd_loss(hidden @ head.T, labels, None, None, **settings), expected
    )
    torch.testing.assert_close(
        linear_sparse_kd_loss(hidden, head, labels, None, None, **settings), expected
    )


def test_autocast_changes_nothing():
    hidden, head, labels, ids, probs = case()
    head = head.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_sparse_kd_loss(hidden, head, labels, ids, probs, vocab_size=V)
        results.append((loss.detach(), *torch.autograd.grad(loss, head)))
    assert all(map(torch.equal, *results))


def losses_of(hidden, head, labels, ids, probs, **settings):
    """Both functions on the same inputs, one after the other."""
    yield lambda: sparse_kd_loss(hidden @ head.T, labels, ids, probs, **settings)
    yield lambda: linear_sparse_kd_loss(hidden, head, labels, ids, probs, **settings)


def changed(tensor, place, value):
    copy = tensor.clone()
    copy[place] = value
    return copy


ROW = (0, 1)  # has targets everywhere


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"labels": lambda x: x[:, :-1]}, r"where: labels; found: int64 \[2, 10\].*; expected: int64 \[2, 11\]"),
        ({"labels": lambda x: x.int()}, "where: labels; found: int32"),
        ({"labels": lambda x: x.tolist()}, "no tensor; where: labels; found: <class 'list'>"),
        ({"labels": lambda x: changed(x, ROW, V)}, f"a label is outside.*found: {V}; expected: below {V}"),
        ({"ids": lambda x: x.int()}, "where: ids; found: int32"),
        ({"ids": lambda x: x[0]}, r"where: ids; found: int64 \[11, 5\]"),
        ({"ids": lambda x: None}, "no tensor; where: ids"),
        ({"ids": lambda x: changed(x, (*ROW, 0), V)}, f"id is outside.*found: {V}; expected: 0 to {V - 1}"),
        ({"ids": lambda x: changed(x, (*ROW, 0), -2)}, "id is outside.*found: -2"),
        ({"ids": lambda x: changed(x, (*ROW, 0), x[(*ROW, 1)])}, "an id is twice in a row"),
        ({"probs": lambda x: x.double()}, "where: probs; found: float64"),
        ({"probs": lambda x: x[..., :-1]}, r"where: probs; found: float32 \[2, 11, 4\]"),
        ({"probs": lambda x: x * 1.01}, r"sum to more than 1; where: targets.probs, row \d+; found: 1.01"),
        ({"probs": lambda x: changed(x, (*ROW, 0), -0.1)}, "found: a negative"),
        ({"probs": lambda x: changed(x, (*ROW, 0), float("nan"))}, "NaN"),
        ({"ids": lambda x: None, "probs": lambda x: None}, "there are no targets to learn from"),
    ],
)  # fmt: skip
def test_inputs_of_which_there_is_no_loss_are_refused(wrong, words, device):
    hidden, head, labels, ids, probs = case(device)
    inputs = {"labels": labels, "ids": ids, "probs": probs}
    inputs |= {name: change(inputs[name]) for name, change in wrong.items()}
    for loss in losses_of(hidden, head, **inputs, vocab_size=V):
        with pytest.raises(LossInputError, match=words):
            loss()


def test_fp32_rounding_of_a_sum_is_no_fault():
    hidden, head, labels, ids, probs = case()
    for loss in losses_of(hidden, head, labels, ids, probs * (1 + 1e-6), vocab_size=V):
        loss()


def test_logits_hidden_states_and_weights_that_do_not_fit_are_refused():
    hidden, head, labels, ids, probs = case()
    with pytest.raises(LossInputError, match="where: logits; found: float64"):
        sparse_kd_loss((hidden @ head.T).double(), labels, ids, probs)
    with pytest.raises(LossInputError, match=r"head_weight; found: float32 \[48, 15\].*\[C, 16\]"):
        linear_sparse_kd_loss(hidden, head[:, :-1], labels, ids, probs)
    with pytest.raises(LossInputError, match=r"head_weight; found: float32.*expected: bfloat16"):
        linear_sparse_kd_loss(hidden.bfloat16(), head, labels, ids, probs)
    with pytest.raises(LossInputError, match=r"where: labels; .*expected: int64.* on meta"):
        sparse_kd_loss((hidden @ head.T).to("meta"), labels, ids, probs)
    for loss in losses_of(hidden, head, labels, ids, probs, vocab_size=PADDED + 1):
        with pytest.raises(LossInputError, match=f"found: {PADDED + 1}; expected: 1 to {PADDED}"):
            loss()


def test_settings_that_are_none_are_refused():
    inputs = case()
    for settings, words in (
        ({"reduction": "median"}, "where: reduction; found: median"),
        ({"residual": "nowhere"}, "where: residual"),
        ({"temperature": 0.0}, "where: temperature"),
        ({"kd_weight": -1.0}, "where: kd_weight"),
        ({"implementation": "triton"}, "found: triton"),
    ):
        for loss in losses_of(*inputs, **settings):
            with pytest.raises(ConfigError, match=words):
                loss()
    with pytest.raises(ConfigError, match="where: reduction; found: none; expected: mean, sum"):
        linear_sparse_kd_loss(*inputs, reduction="none")
    with pytest.raises(ConfigError, match="where: chunk_tokens; found: 0"):
        linear_sparse_kd_loss(*inputs, chunk_tokens=0)


def test_unchecked_values_make_their_row_nan():
    hidden, head, labels, ids, probs = case()
    labels = changed(labels, ROW, V)
    loss = sparse_kd_loss(
        hidden @ head.T, labels, ids, probs, vocab_size=V, reduction="none", check_values=False
    )
    assert loss.isnan().nonzero().tolist() == [list(ROW)]
