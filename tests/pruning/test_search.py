"""Targets that can be reached, and shapes for a number of parameters."""

from __future__ import annotations

from itertools import product

import pytest
from pydantic import ValidationError

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.config import PruneConfig, TargetConfig, parameter_count
from distill_pretrain.pruning.search import (
    Sensitivity,
    grid_step,
    measure,
    require_findable,
    search,
)
from distill_pretrain.pruning.shapes import Shape, num_parameters, require_reachable, with_shape

SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    tie_embeddings=True,
)
V = 49152
WHOLE = Shape.of(SMOLLM2)


def reach(**sizes: int) -> None:
    targets = {"t": TargetConfig(**sizes)}
    require_reachable(targets, SMOLLM2, vocab_size=V, where="source")


def test_smollm2_has_as_many_parameters_as_it_has():
    assert num_parameters(SMOLLM2, vocab_size=V) == 134_515_008
    half = with_shape(SMOLLM2, Shape(**{**vars(WHOLE), "num_layers": 15}))
    assert num_parameters(half, vocab_size=V) == 134_515_008 - 15 * (
        2 * 576 + 3 * 576 * 1536 + 2 * 576 * 576 + 2 * 576 * 192
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"num_layers": 31}, "num_layers: 31; the source has 30"),
        (
            {"hidden_size": 1024, "ffn_hidden_size": 1537},
            "ffn_hidden_size: 1537; the source has 1536",
        ),
        (
            {"num_attention_heads": 8},
            "num_attention_heads: 8 is no multiple of num_query_groups: 3",
        ),
        ({"num_query_groups": 2, "num_attention_heads": 8}, "4 query heads in each of 2 groups"),
        ({"num_layers": 30}, "nothing would be removed"),
        ({"parameters": 135_000_000}, "parameters: 135,000,000; the source has 134,515,008"),
    ],
)
def test_a_shape_that_no_pruning_reaches_is_refused(sizes, expected):
    with pytest.raises(ConfigError) as refused:
        reach(**sizes)
    assert expected in str(refused.value) and "prune.targets.t: " in str(refused.value)


def test_shapes_that_can_be_reached_are_taken():
    reach(num_layers=1, hidden_size=1, ffn_hidden_size=1, num_attention_heads=1, num_query_groups=1)
    reach(num_query_groups=2)  # their query heads go with the others
    reach(num_attention_heads=6)
    reach(parameters=134_000_000)


@pytest.mark.parametrize(
    ("text", "number"),
    [("70M", 70_000_000), ("1.2B", 1_200_000_000), ("512k", 512_000), ("70_000_000", 70_000_000)],
)
def test_numbers_of_parameters_may_have_a_unit(text, number):
    assert TargetConfig(parameters=text).parameters == number
    assert parameter_count(number) == number


@pytest.mark.parametrize(
    "bad", [{"parameters": "70 million"}, {"parameters": "0"}, {}, {"search": "depth"}]
)
def test_a_target_must_say_something(bad):
    with pytest.raises(ValidationError):
        TargetConfig(**bad)


def test_a_target_s_name_must_be_a_folder_s():
    with pytest.raises(ValidationError, match="a name for a folder"):
        PruneConfig(source="a", output_dir="b", targets={"../x": {"num_layers": 1}})


def cost(shape: Shape) -> float:
    """A loss in which layers are dear, ffn channels cheap, and two things together cost more than alone."""
    share = {name: getattr(shape, name) / size for name, size in vars(WHOLE).items()}
    return (
        2.0
        + 3 * (1 - share["num_layers"])
        + 2 * (1 - share["hidden_size"])
        + (1 - share["ffn_hidden_size"]) ** 2
        + (1 - share["num_attention_heads"])
        + 0.7 * (1 - share["num_layers"]) * (1 - share["ffn_hidden_size"])
    )


@pytest.mark.parametrize(
    ("how", "stays"),
    [
        ("both", ()),
        ("depth", ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")),
        ("width", ("num_layers",)),
    ],
)
@pytest.mark.parametrize("parameters", [70_000_000, 101_000_000])
def test_a_search_finds_a_shape_of_nearly_so_many_parameters(how, stays, parameters):
    target = TargetConfig(parameters=parameters, search=how)
    found = search(
        "t",
        target,
        SMOLLM2,
        vocab_size=V,
        loss_of=cost,
        candidates=5,
    )
    assert len(found.losses) == 5 or how == "depth"
    assert found.losses[found.shape] == min(found.losses.values())
    for shape in found.losses:
        count = num_parameters(with_shape(SMOLLM2, shape), vocab_size=V)
        # A layer has 3.5 million: by depth alone the nearest number below counts.
        least = parameters - 3_600_000 if how == "depth" else 0.98 * parameters
        assert least <= count <= parameters
        require_reachable({"t": TargetConfig(**vars(shape))}, SMOLLM2, vocab_size=V, where="")
        assert all(getattr(shape, name) == getattr(WHOLE, name) for name in stays)


def test_no_shape_of_the_grid_would_have_been_better_by_the_prediction():
    sizes = {"num_layers": 20, "num_attention_heads": 9, "num_query_groups": 3}
    target = TargetConfig(parameters=70_000_000, **sizes)
    sensitivity = measure(WHOLE, target, cost)
    found = search("t", target, SMOLLM2, vocab_size=V, loss_of=cost, candidates=1)
    best = float("inf")
    for hidden, ffn in product(range(160, 577, 32), range(384, 1537, 64)):
        shape = Shape(**sizes, hidden_size=hidden, ffn_hidden_size=ffn)
        count = num_parameters(with_shape(SMOLLM2, shape), vocab_size=V)
        if 68_600_000 <= count <= 70_000_000:
            best = min(best, sensitivity.predicted(shape))
    assert sensitivity.predicted(found.shape) == pytest.approx(best)


def test_what_sizes_cost_adds_up_and_is_a_straight_line_between_measured_ones():
    sensitivity = Sensitivity(
        whole=2.0,
        sizes={
            "num_layers": {10: 3.0, 30: 2.0},
            "hidden_size": {576: 2.0},
            "ffn_hidden_size": {512: 2.5, 1536: 2.0},
        },
        heads={(9, 3): 2.0, (6, 3): 2.25},
    )
    shape = Shape(**{**vars(WHOLE), "num_layers": 20, "ffn_hidden_size": 512})
    assert sensitivity.predicted(shape) == pytest.approx(3.0)
    assert sensitivity.predicted(
        Shape(**{**vars(shape), "num_attention_heads": 6})
    ) == pytest.approx(3.25)


def test_sizes_that_are_given_are_not_searched_for():
    target = TargetConfig(parameters=70_000_000, hidden_size=512, num_query_groups=2)
    seen = []

    def loss_of(shape: Shape) -> float:
        seen.append(shape)
        return cost(shape)

    found = search("t", target, SMOLLM2, vocab_size=V, loss_of=loss_of, candidates=3)
    assert {shape.hidden_size for shape in found.losses} == {512}
    assert {(s.num_attention_heads, s.num_query_groups) for s in found.losses} == {(6, 2)}
    assert {shape.hidden_size for shape in seen} == {512, 576}


@pytest.mark.parametrize("how", ["depth", "both"])
def test_too_few_parameters_are_refused_with_the_fewest_there_are(how):
    targets = {"tiny": TargetConfig(parameters=5_000_000, search=how)}
    with pytest.raises(ConfigError, match=r"prune.targets.tiny.parameters.*at least [0-9,]+"):
        require_findable(targets, SMOLLM2, vocab_size=V)


def test_steps_are_powers_of_two():
    assert [grid_step(size) for size in (1, 31, 32, 576, 1536, 4096)] == [1, 1, 2, 32, 64, 256]
