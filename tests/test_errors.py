from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path

import pytest

from distill_pretrain.errors import DistillPretrainError, MissingDependency
from distill_pretrain.sampling.weights import BadLogits


def all_errors() -> list[type[DistillPretrainError]]:
    for name in ("cli.doctor", "reports.results", "reports.curves"):
        importlib.import_module(f"distill_pretrain.{name}")
    found = [DistillPretrainError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("distill_pretrain.")]


def example(kind: type[DistillPretrainError]) -> DistillPretrainError:
    if kind is MissingDependency:
        return MissingDependency("a", extra="b", needed_for="c")
    if kind is BadLogits:
        return BadLogits([1, 2])
    return kind("a", where=Path("b"), found=1, expected=2, remedy="c")


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_errors_travel_between_processes(kind: type[DistillPretrainError]):
    error = example(kind)
    error.hint = "kept"  # type: ignore[attr-defined]
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is kind
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_a_missing_package_comes_with_the_line_that_installs_it():
    extra = MissingDependency("s3fs", extra="s3", needed_for="x")
    assert str(extra).endswith("remedy: pip install 'distill-pretrain[s3]'")
    assert str(MissingDependency("y", needed_for="x")).endswith("remedy: pip install 'y'")
