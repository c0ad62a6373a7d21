from __future__ import annotations

from pathlib import Path

import pytest

from distill_pretrain.config import describe, dump_recipe, load_recipe, require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe

TRAIN = "train: {output_dir: runs/a, steps: 5, global_batch_size: 2}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(Recipe, path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_recipe_loads_with_defaults(tmp_path):
    recipe = load_recipe(Recipe, write(tmp_path, TRAIN), [])
    assert recipe.train.steps == 5
    assert recipe.train.precision == "fp32"
    assert recipe.model is None


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("train: {setps: 5}", "train.setps: unknown key; did you mean train.steps?"),
        ("modle: {}", "modle: unknown key; did you mean model?"),
        ("train: {lr: 1}", "train.lr: unknown key; did you mean optimizer.lr?"),
        ("steps: 5", "steps: unknown key; did you mean train.steps?"),
        (
            "report: {zzzzz: 1}",
            "report.zzzzz: unknown key; expected one of: runs, eval, output_dir, title",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path, text, guess):
    path = write(tmp_path, text)
    assert f"{path}:1: {guess}" in problems_of(path)


@pytest.mark.parametrize("key", ["train.setps", "trian.steps", "train.steps.x", "corpus.paths.0"])
def test_an_unknown_key_on_the_command_line_is_refused(key):
    (problem,) = problems_of(None, f"{key}=3")
    assert problem.startswith("command line: ")
    assert "unknown key" in problem


def test_all_problems_come_at_once_with_file_line_and_values(tmp_path):
    path = write(
        tmp_path,
        "train:\n  output_dir: runs/a\n  steps: 0\n  precision: fp8\n"
        "optimizer: {lr: fast, beta1: .nan}\nobjective: {ce_weight: 0}\nmodle: {}\n",
    )
    problems = problems_of(path, "data.seq_len=1", "data.tokens=x")
    expected = [
        (f"{path}:3: train.steps", "found: 0", "greater than or equal to 1"),
        (f"{path}:4: train.precision", "found: fp8", "'fp32' or 'bf16'"),
        (f"{path}:1: train.global_batch_size", "required"),
        (f"{path}:5: optimizer.lr", "found: fast", "number"),
        (f"{path}:5: optimizer.beta1", "found: .nan", "finite"),
        (f"{path}:6: objective", "nothing to learn"),
        (f"{path}:7: modle", "unknown key"),
        ("command line: data.seq_len", "found: 1"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in problems), (parts, problems)
    assert len(problems) == len(expected)


def test_a_switch_is_no_number(tmp_path):
    path = write(tmp_path, TRAIN.replace("steps: 5", "steps: true"))
    assert problems_of(path) == [f"{path}:1: train.steps: found: true; expected: a number"]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("capture.seed=010", "capture", "seed", 10),
        ("capture.seed=0x10", "capture", "seed", 16),
        ("capture.seed=1_000", "capture", "seed", 1000),
        ("capture.sanity_gate=off", "capture", "sanity_gate", "off"),
        ("capture.output_dir=2026-01-02", "capture", "output_dir", Path("2026-01-02")),
        ("capture.output_dir=010", "capture", "output_dir", Path("010")),
        ("capture.output_dir=1_0", "capture", "output_dir", Path("1_0")),
        ("capture.output_dir=1.50", "capture", "output_dir", Path("1.50")),
        ("capture.output_dir=true", "capture", "output_dir", Path("true")),
        ("capture.telemetry=off", "capture", "telemetry", False),
        ("capture.telemetry=yes", "capture", "telemetry", True),
        (
            "corpus.paths=[2024, 1e3, off]",
            "corpus",
            "paths",
            (Path("2024"), Path("1e3"), Path("off")),
        ),
        ("eval.models={on: 007}", "eval", "models", {"on": Path("007")}),
    ],
)
def test_a_plain_word_is_read_as_its_key_takes_it(tmp_path, override, section, key, value):
    required = {
        "capture": ["capture.output_dir=out", "capture.num_draws=4"],
        "corpus": ["corpus.output_dir=out"],
        "eval": ["eval.output=out"],
    }[section]
    recipe = load_recipe(Recipe, None, [*required, override])
    found = getattr(getattr(recipe, section), key)
    assert (found, type(found)) == (value, type(value))
    path = tmp_path / "resolved.yaml"
    dump_recipe(recipe, path)
    assert load_recipe(Recipe, path, []) == recipe


def test_spike_off_is_a_word_in_a_file(tmp_path):
    path = write(tmp_path, TRAIN.replace("steps: 5", "steps: 5, bad_steps: {spike: off}"))
    assert load_recipe(Recipe, path, []).train.bad_steps.spike == "off"


@pytest.mark.parametrize("text", ["1:30", "0o17", "0b11", "08:15:00", "yes"])
def test_a_number_is_written_in_decimal(text):
    (problem,) = problems_of(
        None, "capture.output_dir=out", "capture.num_draws=4", f"capture.seed={text}"
    )
    assert problem.startswith(
        f"command line: capture.seed: found: {text}; expected: a valid integer"
    )


def test_exponents_are_numbers_in_files_and_on_the_command_line(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 3e-4}")
    recipe = load_recipe(Recipe, path, ["optimizer.min_lr=1e-5"])
    assert (recipe.optimizer.lr, recipe.optimizer.min_lr) == (3e-4, 1e-5)


def test_overrides_win_are_yaml_and_may_be_null(tmp_path):
    path = write(tmp_path, TRAIN + "data: {tokens: a, seq_len: 8, cache: runs/cache}\n")
    recipe = load_recipe(
        Recipe,
        path,
        [
            "train.steps=7",
            "train.steps=9",
            "data.cache=null",
            "eval.models={a: x}",
            "eval.output=o",
        ],
    )
    assert recipe.train.steps == 9
    assert recipe.data.cache is None
    assert recipe.eval.models == {"a": Path("x")}


def test_an_override_reaches_into_a_mapping():
    recipe = load_recipe(Recipe, None, ["eval.models.kd=runs/kd", "eval.output=o.json"])
    assert recipe.eval.models == {"kd": Path("runs/kd")}


@pytest.mark.parametrize("text", ["train.steps", "=5", "train..steps=5", "train.steps=", "a=[1"])
def test_a_malformed_override_is_refused(text):
    assert problems_of(None, text)[0].startswith("command line: ")


def test_a_child_recipe_wins_over_its_bases_and_lists_are_replaced(tmp_path):
    (tmp_path / "sub").mkdir()
    write(
        tmp_path, "optimizer: {lr: 1, beta1: 0.5}\ncorpus: {paths: [a, b], output_dir: o}", "a.yaml"
    )
    write(tmp_path, "base: ../a.yaml\noptimizer: {lr: 2, beta2: 0.6}", "sub/b.yaml")
    write(tmp_path, "optimizer: {epsilon: 0.5}", "c.yaml")
    path = write(tmp_path, "base: [sub/b.yaml, c.yaml]\noptimizer: {lr: 3}\ncorpus: {paths: [c]}")
    recipe = load_recipe(Recipe, path, [])
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (3, 0.5, 0.6, 0.5)
    assert recipe.corpus.paths == (Path("c"),)
    assert recipe.corpus.output_dir == Path("o")


def test_a_problem_in_a_base_names_the_base(tmp_path):
    base = write(tmp_path, "# a comment\noptimizer: {lr: -1}", "base.yaml")
    path = write(tmp_path, "base: base.yaml\n")
    assert problems_of(path)[0].startswith(f"{base}:2: optimizer.lr")


def test_a_circle_of_bases_is_refused(tmp_path):
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle.*a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(Recipe, tmp_path / "a.yaml", [])


def test_two_children_may_share_a_base(tmp_path):
    write(tmp_path, "optimizer: {lr: 1}", "root.yaml")
    write(tmp_path, "base: root.yaml", "a.yaml")
    write(tmp_path, "base: root.yaml", "b.yaml")
    assert load_recipe(Recipe, write(tmp_path, "base: [a.yaml, b.yaml]"), []).optimizer.lr == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "not a mapping"),
        ("train: {steps: 1", "not valid YAML"),
        ("a: 1\nb: [", r"recipe\.yaml:2"),
        ("base: missing.yaml", "base recipe not found"),
        ("base: {a: 1}", "`base` names no recipe"),
        ("train: &a {x: *a}", "alias contains itself"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, write(tmp_path, text), [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe not found.*nowhere\.yaml"):
        load_recipe(Recipe, tmp_path / "nowhere.yaml", [])


def test_a_key_given_twice_is_refused(tmp_path):
    path = write(tmp_path, "optimizer:\n  lr: 1\n  lr: 2\n")
    assert problems_of(path) == [f"{path}:3: optimizer.lr: given twice in this file"]


def test_a_key_that_yaml_does_not_read_as_text_is_refused(tmp_path):
    path = write(tmp_path, "eval: {models: {1: a}, output: o}\n")
    assert problems_of(path) == [f"{path}:1: eval.models.1: a key must be text; put it in quotes"]


def test_an_empty_file_is_the_default_recipe(tmp_path):
    assert load_recipe(Recipe, write(tmp_path, "# nothing\n"), []) == Recipe()


def test_a_resolved_recipe_loads_back_equal(tmp_path):
    path = write(
        tmp_path,
        TRAIN + "optimizer: {lr: 3e-4, decay_steps: null}\ncorpus: {paths: [ä], output_dir: b}",
    )
    recipe = load_recipe(
        Recipe, path, ["optimizer.epsilon=1e-9", "eval.models={a: x}", "eval.output=o"]
    )
    resolved = tmp_path / "resolved.yaml"
    dump_recipe(recipe, resolved)
    assert load_recipe(Recipe, resolved, []) == recipe
    assert "teacher" not in resolved.read_text()
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_every_missing_section_is_named():
    recipe = load_recipe(Recipe, None, ["data.tokens=a", "data.seq_len=8"])
    require(recipe, "train", "data", "optimizer")
    with pytest.raises(ConfigError, match=r"`train`.*model, train;"):
        require(recipe, "train", "data", "model", "train")


def test_every_key_is_described_with_type_default_and_documentation():
    text = describe(Recipe, list(Recipe.model_fields))
    assert "  steps: integer  (required)\n      Optimizer steps." in text
    assert "  precision: fp32 | bf16  (default fp32)" in text
    assert "  cache: text | null  (default null)" in text
    assert "  models: mapping of text to path" in text
    for name in Recipe.model_fields:
        assert f"{name}:  " in text
