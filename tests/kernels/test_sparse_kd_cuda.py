"""The sparse_kd kernels, run on the CPU, against float64 autograd of the dense definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.sparse_kd import launch
from distill_pretrain.kernels.sparse_kd.problem import MAX_COLUMNS, Problem
from distill_pretrain.kernels.sparse_kd.targets import RowTargets
from tests.kernels.sparse_kd_cases import (
    FORMS,
    LAYOUTS,
    SMALL,
    TEMPERATURES,
    check,
    expected_of,
    far_case,
    make_case,
    problem_of,
    run,
    sure_case,
)
from tests.kernels.sparse_kd_mutants import noticed
from tests.support.emulation import emulated

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    empty = launch._floats
    monkeypatch.setattr(launch, "_floats", lambda *shape: empty(*shape).fill_(float("nan")))


@pytest.fixture(scope="module")
def launcher():
    return emulated(launch.SOURCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_equal_the_dense_definition_in_every_layout(
    launcher, dtype, temperature, form
):
    shapes = (
        {"seed": 1},
        {"seed": 2, "padded": 272, "is_wide": False, "duplicates": True},  # rank 3 has padding only
        {"seed": 3, "num_rows": 4, "vocab_size": 2603, "padded": 2608, "num_entries": 40},
    )
    for number, shape in enumerate(shapes):
        case = make_case(form, temperature, dtype, **shape)
        expected = expected_of(case)
        for layout in LAYOUTS:
            if layout == "fused, a cluster" and number < 2:
                continue
            gap, start = ((3, 1), (0, 0), (8, 5))[number]
            check(run(launcher, case, layout, gap=gap, start=start), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_logits_have_the_loss_and_the_gradient_of_the_dense_definition(dtype, form):
    launcher = emulated(launch.CAPPED)
    shapes = (
        {"seed": 1, "padded": 272, "duplicates": True},
        {"seed": 3, "num_rows": 4, "vocab_size": 2603, "padded": 2608, "num_entries": 40},
    )
    for number, shape in enumerate(shapes):
        # Logits are up to 16: most are far into one cap, few into the other.
        case = make_case(form, (1.0, 2.5)[number], dtype, **shape)
        case = replace(case, logit_cap=(4.0, 30.0)[number])
        expected = expected_of(case)
        for layout in LAYOUTS:
            if layout != "fused, a cluster" or number:
                check(run(launcher, case, layout), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_alone_need_no_targets(launcher, dtype):
    case = replace(make_case("drop", 1.0, dtype), targets=None, kd_scale=None)
    expected = expected_of(case)
    for layout in LAYOUTS:
        check(run(launcher, case, layout), expected)


@pytest.mark.parametrize(
    ("vocab_size", "padded", "form", "temperature"),
    [(151_936, 152_064, "drop", 1.0), (262_144, 262_144, "ghost", 2.0)],
    ids=["Qwen", "Gemma"],
)
def test_rows_of_true_size_with_256_entries(launcher, vocab_size, padded, form, temperature):
    case = make_case(
        form,
        temperature,
        torch.bfloat16,
        num_rows=3,
        vocab_size=vocab_size,
        padded=padded,
        num_entries=256,
    )
    rows = slice(1, 2)
    targets = RowTargets(
        **{k: None if v is None else v[rows] for k, v in vars(case.targets).items()}
    )
    case = replace(
        case,
        logits=case.logits[rows],
        labels=torch.tensor([vocab_size - 1]),
        targets=targets,
        kd_scale=case.kd_scale[rows],
        incoming=case.incoming[rows],
    )
    expected = expected_of(case)
    for layout in ("one rank", "four ranks", "fused, a cluster"):
        check(run(launcher, case, layout, gap=0, start=0, blocks=launch.BLOCKS), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_is_lost_where_the_student_is_sure(launcher, temperature):
    for height in (20.0, 80.0, 500.0):  # 1 - P_K is 4e-7, 4e-33 and less than fp32 holds at tau = 1
        case = sure_case(torch.float32, height, temperature=temperature)
        expected = expected_of(case)
        for layout in LAYOUTS:
            check(run(launcher, case, layout), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
def test_the_bucket_is_right_however_far_its_columns_are_below(launcher, scale, dtype):
    for temperature in (1.0, 2.5):
        case = far_case(dtype, scale, temperature=temperature)
        case = replace(case, z_loss=0.02 / scale)
        expected = expected_of(case)
        for layout in LAYOUTS:
            check(run(launcher, case, layout), expected)


@pytest.mark.parametrize("form", ["drop", "smoothed", "ghost"])
def test_large_logits_lose_nothing(launcher, form):
    case = make_case(form, 2.5, torch.float32, seed=5)
    # Exact in fp32, so that the losses are those of the logits before, but for lse^2.
    shifted = (case.logits * 64).round() / 64
    case = replace(case, logits=shifted, z_loss=0.0)
    far = replace(case, logits=case.logits + 30_000.0)
    near, expected = expected_of(case), expected_of(far)
    torch.testing.assert_close(near.losses, expected.losses)
    for layout in LAYOUTS:
        result = run(launcher, far, layout)
        torch.testing.assert_close(result.losses.double(), near.losses, rtol=1e-5, atol=5e-6)
        check(replace(result, terms=near.terms.float()), near)


def test_rows_that_are_not_numbers_give_nan_as_torch_does(launcher):
    case = make_case("drop", 1.0, torch.bfloat16, num_rows=6, seed=7)
    labels = torch.tensor([0, 1, 2, 3, 4, -100])
    logits = case.logits.clone()
    logits[:] = torch.randn(6, 208, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits[0, 100] = float("nan")
    logits[1] = float("-inf")
    logits[2, 200] = float("inf")
    logits[3, 60:140] = float("-inf")  # all that the second of four ranks has, and finite
    logits[5] = float("nan")
    for dtype in DTYPES:
        plain = replace(
            case, logits=logits.to(dtype), labels=labels, targets=None, kd_scale=None, z_loss=0.0
        )
        torch_loss = torch.nn.functional.cross_entropy(
            plain.logits[:, :203].double(), labels, reduction="none"
        )
        for layout in LAYOUTS:
            result = run(launcher, plain, layout)
            is_nan = torch.tensor([True, True, True, False, False, False])
            assert torch.equal(torch_loss.isnan(), is_nan)
            assert torch.equal(result.losses.isnan(), is_nan)
            assert result.gradient[:3, :203].isnan().any(1).all()
            assert (result.gradient[3, 60:140] == 0).all()
            assert (result.gradient[5] == 0).all()
            assert (result.gradient[:, 203:] == 0).all()


@pytest.mark.parametrize("form", ["drop", "smoothed_ghost"])
def test_every_schedule_of_the_threads_gives_the_same_bits(form):
    case = make_case(
        form, 1.0, torch.bfloat16, num_rows=4, vocab_size=2603, padded=2608, num_entries=40
    )
    for layout in ("two ranks", "fused, a cluster"):
        results = []
        for schedule in range(7):
            result = run(emulated(launch.SOURCE, schedule=schedule), case, layout)
            results.append([value.view(torch.uint8) for value in vars(result).values()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_incoming_gradient_may_be_one_number_for_all_rows(launcher):
    case = make_case("label", 1.0, torch.float32)
    expanded = replace(case, incoming=torch.tensor(0.7).expand(6))
    expected = expected_of(expanded)
    for layout in LAYOUTS:
        check(run(launcher, expanded, layout), expected)


def test_no_rows_are_no_launch(launcher):
    case = make_case("drop", 1.0, torch.bfloat16)
    none = problem_of(case, case.logits, 0).loss.rows(slice(0))
    problem = Problem(logits=case.logits[:0], loss=none)
    statistics, picks = launch.row_statistics(launcher, problem)
    combined = launch.combine(launcher, problem, statistics[None])
    launch.gradient_(launcher, problem, picks, combined.scalars, combined.subtracted)
    assert combined.losses.shape == (0,)


def test_what_the_kernels_do_not_take_is_refused(launcher):
    case = make_case("drop", 1.0, torch.bfloat16)
    many = RowTargets(ids=torch.full((6, 513), -1), probs=torch.zeros(6, 513))
    with pytest.raises(ConfigError, match=r"entries per token.*found: 513; expected: at most 512"):
        problem_of(replace(case, targets=many), case.logits, 0)
    wide = torch.empty(6, MAX_COLUMNS + 1, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="vocabulary columns per rank"):
        problem_of(case, wide, 0)
    with pytest.raises(ValueError, match="labels"):
        problem_of(replace(case, labels=case.labels.int()), case.logits, 0)
    with pytest.raises(ValueError, match="logits"):
        problem_of(case, case.logits.t(), 0)
    both = replace(case.targets, floor=torch.zeros(6), bucket=torch.zeros(6))
    with pytest.raises(ValueError, match="a floor and a bucket"):
        problem_of(replace(case, targets=both), case.logits, 0)
    with pytest.raises(ValueError, match="kd_scale"):
        problem_of(replace(case, kd_scale=None), case.logits, 0)


def test_a_row_that_no_cluster_holds_is_refused_by_the_fused_kernel(launcher):
    case = make_case("drop", 1.0, torch.bfloat16)
    blocks = replace(SMALL, max_cluster=1)
    wide = torch.zeros(6, 32_768 + 8, dtype=torch.bfloat16)
    assert launch.fits_fused(problem_of(case, wide[:, :32_768], 0), blocks=blocks)
    problem = problem_of(case, wide, 0)
    assert not launch.fits_fused(problem, blocks=blocks)
    with pytest.raises(ValueError, match="do not fit"):
        launch.fused_(launcher, problem, blocks=blocks)


def test_broken_kernels_are_noticed(tmp_path):
    # A few of those that tools/mutate_kernels.py tries.
    broken = [
        "no barrier at the start of a cluster",
        "no barrier between bulk and entries (gradient)",
        "the bucket does not push its columns up",
        "duplicates count twice",
        "the entries' gradient stops before the cap",
    ]
    right, *found = noticed([None, *broken], tmp_path)
    assert right is None
    assert None not in found, dict(zip(broken, found, strict=True))
