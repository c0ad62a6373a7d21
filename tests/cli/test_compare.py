from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_pretrain.checkpoint.ownership import lease
from distill_pretrain.cli.main import main
from distill_pretrain.config import dump_recipe, load_recipe
from distill_pretrain.errors import ConfigError, InUse, TokenDataError
from distill_pretrain.files import ownership
from distill_pretrain.files.ownership import owner_of
from distill_pretrain.jobs.comparison import run as comparison
from distill_pretrain.jobs.comparison.plan import ComparisonPlan
from distill_pretrain.jobs.recipe import Recipe
from tests.support.distributed import REPOSITORY, run_distributed
from tests.support.owner import owned_elsewhere

RECIPES = sorted((REPOSITORY / "launch/recipes").rglob("*.yaml"))


def make_recipe(**changed: dict[str, Any]) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "data": {"tokens": "t/train", "held_out_tokens": "t/held_out", "seq_len": 32},
        "teacher": {"path": "runs/teacher"},
        "capture": {
            "output_dir": "runs/cache",
            "sets": {
                "topk-3": {"sampler": "topk", "num_draws": 3},
                "systematic-9": {"sampler": "systematic", "num_draws": 9},
            },
        },
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
        },
        "train": {"output_dir": "runs/unused", "steps": 5, "global_batch_size": 4},
        "compare": {"output_dir": "runs/compare", "seeds": [1, 2]},
    }
    for section, keys in changed.items():
        values[section] = {**values[section], **keys}
    return Recipe.model_validate(values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_of_the_repository_loads(path):
    recipe = load_recipe(Recipe, path)
    if recipe.compare is not None:
        plan = ComparisonPlan.of(recipe)
        assert len(plan.runs) == len(plan.cells) * len(recipe.compare.seeds)


def test_students_differ_in_targets_seed_and_folder_alone():
    plan = ComparisonPlan.of(make_recipe())
    kept = []
    for run in plan.runs:
        values = run.recipe.model_dump(mode="json")
        assert values["train"].pop("seed") == run.seed
        assert values["train"].pop("output_dir") == f"runs/compare/cells/{run.cell}/seed-{run.seed}"
        assert values["data"].pop("cache") in (None, f"runs/cache/{plan.cells[run.cell].set}")
        del values["objective"]
        kept.append(values)
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    assert all(values == kept[0] for values in kept)


def test_the_cells_of_a_seed_are_scored_together():
    plan = ComparisonPlan.of(make_recipe(compare={"output_dir": "c", "eval": {"num_sequences": 7}}))
    assert list(plan.figures.values()) == [Path(f"c/eval/seed-{seed}.json") for seed in (1, 2)]
    scored = plan.evaluations[2].eval
    assert scored.num_sequences == 7
    assert scored.models["ce"] == Path("c/cells/ce/seed-2")
    assert list(scored.models) == list(plan.cells)


def test_a_teacher_that_captured_in_parts_scores_whole_beside_whole_students():
    in_parts = {"path": "t", "tensor": 2, "pipeline": 2}
    plan = ComparisonPlan.of(make_recipe(teacher=in_parts))
    assert plan.capture.teacher.processes == 4
    assert plan.evaluations[1].teacher.processes == 1
    plan = ComparisonPlan.of(
        make_recipe(teacher=in_parts, compare={"eval": {"tensor": 2, "pipeline": 2}})
    )
    assert plan.evaluations[1].teacher.processes == 4


def test_without_sets_and_cells_there_are_defaults():
    plan = ComparisonPlan.of(make_recipe(capture={"sets": None}))
    assert {"ce", "full-kd", "topk-12-ghost", "multinomial-50", "systematic-5"} <= set(plan.cells)
    assert set(plan.capture.capture.sets) == {c.set for c in plan.cells.values() if c.set}


def test_only_sets_that_a_cell_uses_are_captured():
    cells = {"kd": {"set": "topk-3", "objective": {"ce_weight": 0, "kd_weight": 1}}}
    plan = ComparisonPlan.of(make_recipe(compare={"cells": cells}))
    assert list(plan.capture.capture.sets) == ["topk-3"]


def test_the_teacher_is_trained_on_the_text_into_its_own_folder():
    teacher = {"model": {"num_layers": 4}, "train": {"steps": 9, "seed": 5}}
    recipe = make_recipe(compare={"teacher": teacher}, train={"micro_batch_size": 2})
    made = ComparisonPlan.of(recipe).teacher
    assert made.train.output_dir == Path("runs/teacher")
    assert (made.train.steps, made.train.seed, made.train.micro_batch_size) == (9, 5, 2)
    assert (made.model.num_layers, made.model.hidden_size) == (4, 32)
    assert (made.objective.ce_weight, made.objective.kd_weight) == (1.0, 0.0)
    assert ComparisonPlan.of(make_recipe()).teacher is None


def test_a_cell_with_other_changes_to_the_loss_is_not_its_familys():
    cells = {
        "pure": {"set": "topk-3", "objective": {"ce_weight": 0, "kd_weight": 1}},
        "mix": {"set": "topk-3", "objective": {"ce_weight": 0.5, "kd_weight": 0.5}},
    }
    specs = ComparisonPlan.of(make_recipe(compare={"cells": cells})).specs
    assert [(spec.name, spec.sampler, spec.plain) for spec in specs] == [
        ("pure", "topk", True),
        ("mix", "topk", False),
    ]


DECOUPLED = {"kd_weight": 1.0, "residual": "decoupled"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"compare": {"cells": {"kd": {"set": "topk-33"}}}}, "topk-33.*topk-3, systematic-9"),
        ({"compare": {"cells": {"kd": {"objective": {"kd_wieght": 1}}}}}, "cells.kd.*kd_weight"),
        ({"compare": {"cells": {"kd": {"objective": {"ce_weight": -1}}}}}, "cells.kd.*ce_weight"),
        (
            {"compare": {"cells": {"kd": {"set": "systematic-9", "objective": DECOUPLED}}}},
            "cells.kd.objective.*systematic-9: systematic",
        ),
        ({"compare": {"fixes_at": "systematic-9"}}, "fixes_at.*topk-3"),
        ({"compare": {"teacher": {"evil": {}}}}, "compare.teacher.*evil"),
        ({"compare": {"eval": {"num_sequence": 3}}}, "compare.eval.*num_sequences"),
        ({"capture": {"num_sequences": 3}}, "capture.num_sequences"),
    ],
)
def test_a_mistake_is_found_before_any_work_and_named(changed, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        ComparisonPlan.of(make_recipe(**changed))


def test_unknown_cells_are_refused():
    plan = ComparisonPlan.of(make_recipe())
    assert [run.seed for run in plan.selected(["ce"])] == [1, 2]
    with pytest.raises(ConfigError, match=r"topk-4.*topk-3"):
        plan.selected(["ce", "topk-4"])


def test_a_lease_is_held_by_one_and_ends_with_its_block(tmp_path):
    with lease(tmp_path / "run") as mine:
        assert mine
        with lease(tmp_path / "run") as second:
            assert not second
        with lease(tmp_path / "other") as other:
            assert other
    with lease(tmp_path / "run") as again:
        assert again


def test_a_comparison_without_its_sections_is_refused(capsys):
    assert main(["compare", "compare.output_dir=x"]) == 2
    assert "no data, teacher, capture, model, train" in capsys.readouterr().err


def test_another_text_that_is_not_there_is_found_before_any_work(tmp_path):
    other = {"out_of_domain_tokens": str(tmp_path / "none"), "copying": {}}
    plan = ComparisonPlan.of(make_recipe(compare={"eval": other}))
    scored = plan.evaluations[1].eval
    assert scored is not None and scored.copying is not None and scored.copying.num_sequences == 64
    with pytest.raises(TokenDataError, match="none"):
        comparison._check_before_hours_of_work(plan)


def count_groups() -> list[int]:
    """Process groups before, inside and after a block that makes two."""
    import torch.distributed as dist

    from distill_pretrain.processes.process import process_group, released_groups

    def count() -> int:
        return len(dist.distributed_c10d._world.pg_map)

    with process_group():
        counts = [count()]
        with released_groups():
            dist.new_group([0, 1])
            dist.new_group([0, 1])
            counts.append(count())
        counts.append(count())
        with process_group():  # the default group is still there
            dist.barrier()
    return counts


def test_one_job_after_another_leaves_no_process_groups():
    assert run_distributed(count_groups, 2) == [1, 3, 1]


def test_a_report_that_another_job_writes_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    folder = tmp_path / "report"
    plan = ComparisonPlan.of(make_recipe(compare={"output_dir": str(tmp_path), "seeds": [1]}))
    with owned_elsewhere(owner_of(folder)), pytest.raises(InUse, match="node7"):
        comparison._report(plan, "a command")


def test_a_training_that_was_told_to_stop_ends_the_comparison_with_its_code(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(comparison, "train_model", lambda recipe: True)
    recipe = tmp_path / "recipe.yaml"
    sections = make_recipe(compare={"output_dir": str(tmp_path / "out"), "teacher": {}})
    dump_recipe(sections, recipe)
    assert main(["compare", str(recipe)]) == 143
