"""What decides whether a run goes on from a checkpoint: what decides the weights, with defaults filled in."""

from __future__ import annotations

from typing import Any

import pytest

from distill_pretrain.checkpoint import identity
from distill_pretrain.checkpoint.identity import IRRELEVANT, SECTIONS, differences, trained_model
from distill_pretrain.errors import CheckpointError
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig

SIZES = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}


def described(decay: int = 4, **changed: dict[str, Any]) -> dict[str, Any]:
    """An identity as `train` makes it."""
    sections = {
        "model": ModelConfig(**{**SIZES, **changed.get("model", {})}),
        "optimizer": OptimizerConfig(**changed.get("optimizer", {})),
        "objective": ObjectiveConfig(**changed.get("objective", {})),
    }
    made = {name: identity.described(name, section) for name, section in sections.items()}
    made["optimizer"]["decay_steps"] = made["optimizer"]["decay_steps"] or decay
    return {
        "version": identity.VERSION,
        "at_default": identity.at_default(sections),
        "vocab_size": 60,
        "seq_len": 8,
        **made,
    }


class LaterModel(ModelConfig):
    """The model section of a later version."""

    softcap: float | None = None
    """A new key."""


def test_a_key_added_with_a_default_keeps_checkpoints_valid(monkeypatch):
    before = described()
    monkeypatch.setitem(SECTIONS, "model", LaterModel)
    after = described()
    after["model"]["softcap"] = None
    after["at_default"].append("model.softcap")
    assert differences(before, after, "") == []
    used = described()
    used["model"]["softcap"] = 3.0
    assert differences(before, used, "") == ["model.softcap: checkpoint null, this run 3.0"]
    # And back to the version that does not know the key.
    monkeypatch.setitem(SECTIONS, "model", ModelConfig)
    assert differences(after, before, "") == []
    assert trained_model(after, "").model == ModelConfig(**SIZES)
    assert differences(used, before, "") == ["model.softcap: checkpoint 3.0, this run nothing"]
    with pytest.raises(CheckpointError, match=r"does not know .*model.softcap: 3.0"):
        trained_model(used, "")


STEPS = "train.steps (the length of the decay, as optimizer.decay_steps is not set)"
PLAN = "sequence_plan_id"
POINTS = {"kd_weight": [[1, 0], [5, 1]]}
WIDER = {"model": {**SIZES, "hidden_size": 9}}
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (described(), described(decay=9), [f"{STEPS}: checkpoint 4, this run 9"]),
    (described(), described(optimizer={"decay_steps": 4}), []),
    (
        described(),
        described(optimizer={"decay_steps": 9}),
        ["optimizer.decay_steps: checkpoint 4, this run 9"],
    ),
    (
        described(),
        described(model={"dropout": 0.1}),
        ["model.dropout: checkpoint 0.0, this run 0.1"],
    ),
    (
        described(),
        described(objective=POINTS),
        ["objective.kd_weight: checkpoint 0.0, this run [[1.0, 0.0], [5.0, 1.0]]"],
    ),
    (
        described(objective={"kd_weight": {"stable": 1, "decayed": 0}}),
        described(objective={"kd_weight": {"stable": 1, "decayed": 0.5}}),
        ["objective.kd_weight.decayed: checkpoint 0.0, this run 0.5"],
    ),
    ({"seed": 1}, {"seed": 2}, ["train.seed: checkpoint 1, this run 2"]),
    # What follows from another difference is not named.
    (
        {"seq_len": 8, PLAN: "a"},
        {"seq_len": 9, PLAN: "b"},
        ["data.seq_len: checkpoint 8, this run 9"],
    ),
    (
        {"residual": {"beta": 1.0}, "model": SIZES},
        WIDER,
        ["model.hidden_size: checkpoint 8, this run 9"],
    ),
    (
        {"blend": [{"cache_plan_id": "a"}]},
        {"blend": [{"cache_plan_id": "b"}]},
        ["data.blend[0]: data.cache: checkpoint a, this run b"],
    ),
    # Of the same ids the name of the tokenizer decides nothing.
    ({PLAN: "a", "tokenizer_sha256": "x"}, {PLAN: "a", "tokenizer_sha256": "y"}, []),
    (
        {PLAN: "a", "tokenizer_sha256": "x"},
        {PLAN: "b", "tokenizer_sha256": "y"},
        [
            "data.tokens, data.seed, data.documents, data.packing: checkpoint a, this run b",
            "tokenizer of data.tokens: checkpoint x, this run y",
        ],
    ),
]


@pytest.mark.parametrize(("found", "wanted", "lines"), CASES)
def test_differences_are_named_by_leaf_in_the_words_of_the_recipe(found, wanted, lines):
    assert differences(found, wanted, "") == lines


def test_irrelevant_keys_exist_and_do_not_count():
    for name, keys in IRRELEVANT.items():
        assert keys <= SECTIONS[name].model_fields.keys()
    other = {"optimizer": {"backend": "deepspeed", "offload": True}, "objective": {"head": "full"}}
    assert differences(described(), described(**other, model={"spec": "auto"}), "") == []
    # Neither do they where an older version recorded them.
    old = described()
    old["model"]["spec"] = "te"
    assert differences(old, described(), "") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": None}, "no model"),
        ({"model": {**SIZES, "num_layers": "x"}}, "model.num_layers"),
        ({"vocab_size": None}, "vocab_size: None"),
        ({"precision": "fp4"}, "precision: 'fp4'"),
        ({"residual": "x"}, "residual: 'x'"),
        ({"version": 99}, "identity version 99"),
        ({"at_default": 3}, "no list at_default"),
    ],
)
def test_a_damaged_record_is_refused(change, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        trained_model({**described(), **change}, "here")


def test_the_same_weights_in_another_place_are_the_same_start():
    start = {"path": "a", "sha256": "1" * 64}
    assert differences({"start_from": start}, {"start_from": {**start, "path": "b"}}, "") == []
    other = {"path": "b", "sha256": "2" * 64}
    assert differences({"start_from": start}, {"start_from": other}, "") == [
        "train.start_from: checkpoint a (sha256 111111111111), this run b (sha256 222222222222)"
    ]
    assert differences({}, {"start_from": other}, "") == [
        "train.start_from: checkpoint nothing, this run b (sha256 222222222222)"
    ]


def wsd(
    end: int, length: int, objective: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    optimizer = {"decay_style": "wsd", "decay_steps": end, "wsd_decay_steps": length, **more}
    return described(optimizer=optimizer, objective=objective or {})


@pytest.mark.parametrize(
    ("other", "last"),
    [
        (wsd(30, 4), 6),
        (wsd(9, 4), 5),
        (wsd(10, 4, wsd_decay_style="cosine"), 6),
        (described(optimizer={"decay_style": "constant"}), 6),
        (described(decay=10), -1),
    ],
)
def test_a_decay_decides_nothing_before_it_begins(other, last):
    for one, two in ((wsd(10, 4), other), (other, wsd(10, 4))):
        for step in range(11):
            assert (differences(one, two, "", step=step) == []) == (step <= last)
    # What else differs still counts.
    assert differences(wsd(10, 4), wsd(30, 4, lr=1.0), "", step=2) == [
        "optimizer.lr: checkpoint 0.0003, this run 1.0"
    ]


@pytest.mark.parametrize(
    ("kd_weight", "is_same"),
    [({"stable": 1, "decayed": 0}, True), (1, True), ({"stable": 0.5, "decayed": 0.25}, False)],
)
def test_what_a_weight_becomes_in_the_decay_decides_nothing_before(kd_weight, is_same):
    ours = wsd(10, 4, {"kd_weight": {"stable": 1.0, "decayed": 0.25}})
    theirs = wsd(30, 4, {"kd_weight": kd_weight})
    same = [step for step in range(11) if not differences(theirs, ours, "", step=step)]
    assert same == (list(range(7)) if is_same else [])
    assert any("objective.kd_weight" in line for line in differences(theirs, ours, ""))
