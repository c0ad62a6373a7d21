"""Values at and beyond the border of every recipe key, through verbs that only look: an answer or a refusal."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo
from small_cache import SEQ_LEN, make_small_cache

from distill_pretrain.cli.main import main
from distill_pretrain.config.loader import load_recipe, section_of
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe

VERBS = {
    "train": (["--dry-run"], ("data", "model", "parallel", "optimizer", "objective", "train")),
    "capture": (["--dry-run"], ("data", "teacher", "capture")),
    "plan": ([], ("data", "teacher", "capture", "model", "parallel", "objective", "train", "plan")),
}
HUGE = "1" + "0" * 400
BY_TYPE: dict[Any, tuple[str, ...]] = {
    int: ("-1", "0", str(1 << 64), HUGE, ".inf", "'x'", "{}"),
    float: ("-1", "0", "5e-324", "1e39", "1.7e308", HUGE, ".nan", "[]"),
    str: ("''", '"a\\0b"', '"\\ud800"', "y" * 300, "[]"),
    Path: ("''", '"a\\0b"', '"\\ud800"', "y" * 300, "z/" * 3000, "/proc/self/mem", "[]"),
    bool: ("true", "null"),
}
POINTS = ("[[0,1]]", f"[[1,1],[2,{HUGE}]]", "[[1,1e39]]", f"[[{HUGE},1]]", "[1,2]", "[[1,1],[1,2]]")


def all_keys(schema: Any = Recipe, path: tuple[str, ...] = ()) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in schema.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield ".".join((*path, name)), field
        else:
            yield from all_keys(inner, (*path, name))


def borders(annotation: Any) -> list[str]:
    """YAML of values that a field of this type may take, or just not."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in BY_TYPE:
        return list(BY_TYPE[annotation])
    if origin is typing.Annotated:
        return borders(parts[0])
    if origin in (UnionType, typing.Union):
        return [value for part in parts for value in borders(part)]
    if origin in (tuple, list):
        return ["[]", *(f"[{value}]" for value in borders(parts[0]))]
    if origin is dict:
        return ["{}", "{1: x}", *(f"{{a: {value}}}" for value in borders(parts[1]))]
    return ["null", "nonsense"]


def limits(field: FieldInfo) -> list[str]:
    """The values at the borders of a field, as its constraints state them."""
    names = ("ge", "gt", "le", "lt")
    stated = [getattr(rule, name, None) for rule in field.metadata for name in names]
    return [str(value) for value in stated if value is not None]


KEYS = {key: [*borders(field.annotation), *limits(field)] for key, field in all_keys()}
for scheduled in ("ce_weight", "kd_weight", "temperature", "smoothing"):
    KEYS[f"objective.{scheduled}"] = [*BY_TYPE[float], *POINTS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("borders")
    cache = make_small_cache(root)
    path = root / "whole.yaml"
    model = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
    }
    sections = {
        "data": {
            "tokens": str(cache.tokens),
            "seq_len": SEQ_LEN,
            "seed": 7,
            "cache": str(cache.folder),
        },
        "teacher": {"path": str(root / "teacher")},
        "capture": {"output_dir": str(root / "new")},
        "model": model,
        "objective": {"kd_weight": 0.5},
        "train": {"output_dir": str(root / "run"), "steps": 3, "global_batch_size": 4},
        "plan": {"teacher_parameters": 1.0e9},
        "corpus": {"paths": [str(root)], "output_dir": str(root / "tokens")},
        "eval": {"models": {"a": str(root / "run")}, "output": str(root / "eval.json")},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize("section", sorted({key.split(".")[0] for key in KEYS}))
def test_a_value_at_the_border_of_a_key_is_used_or_refused(
    recipe: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = []
    for key, values in KEYS.items():
        if key.split(".")[0] != section:
            continue
        for value in dict.fromkeys(values):
            override = f"{key}={value}"
            try:
                load_recipe(Recipe, recipe, [override])
            except ConfigError:
                continue
            for verb, (options, sections) in VERBS.items():
                if section in sections and main([verb, str(recipe), override, *options]) not in (
                    0,
                    2,
                ):
                    failed.append(f"{verb} {override[:80]}: {capsys.readouterr().err[-200:]}")
            capsys.readouterr()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seed=18446744073709551616", "less than 18446744073709551616"),
        ("capture.seed=18446744073709551616", "less than 18446744073709551616"),
        ("train.seed=100000000000000000000", "less than 9223372036854775808"),
        ("objective.kd_weight=1e39", "at most 1e+09"),
        ("objective.temperature=1e30", "from 1e-06 to 1e+06"),
        ("optimizer.lr=1e300", "less than or equal to 1000000"),
        ("model.init_std=1e300", "less than or equal to 1000000"),
        ("optimizer.min_lr=1", "min_lr: 1 is above lr: 0.0003"),
        ("train.threads=65536", "less than or equal to 1024"),
        ("data.cache=" + "y" * 300, "names of at most 255"),
        ('teacher.path="a\\0b"', "without zero bytes"),
        ("eval.models={1: x}", "a key must be text"),
    ],
)
def test_what_crashed_is_refused_by_its_key(recipe: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(Recipe, recipe, [override])
    message = str(caught.value)
    key = "optimizer" if "min_lr" in override else override.partition("=")[0]
    assert key in message and expected in message
    assert "errors.pydantic" not in message
