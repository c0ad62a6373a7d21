"""What `--help` says of a key is the string below its field."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import Field

from distill_pretrain.config import Section
from distill_pretrain.config.documentation import field_documentation
from distill_pretrain.config.loader import section_of
from distill_pretrain.jobs.recipe import Recipe


class Parent(Section):
    """Has fields of every kind."""

    plain: int = 1
    """Of a field,
    on two lines.
    """
    own: int = Field(default=2, description="Its own.")
    """Not this."""
    bare: int = 3
    followed: int = 4
    # A comment is no documentation.
    """After a comment."""


class Child(Parent):
    """Changes one and adds one."""

    plain: int = 5
    """Of the child."""
    added: str = "a"
    """Added."""


def test_the_string_below_a_field_documents_it_and_its_description_wins():
    assert field_documentation(Parent) == {
        "plain": "Of a field,\non two lines.",
        "own": "Its own.",
        "followed": "After a comment.",
    }


def test_fields_keep_the_documentation_of_the_class_they_come_from():
    found = field_documentation(Child)
    assert found["plain"] == "Of the child."
    assert found["added"] == "Added."
    assert found["followed"] == "After a comment."


def test_a_class_inside_a_function_has_its_own():
    class Parent(Section):
        plain: int = 1
        """Of the inner class."""

    assert field_documentation(Parent) == {"plain": "Of the inner class."}


def test_without_source_there_is_none():
    space = {"__name__": "nowhere", "Section": Section}
    exec("class Alone(Section):\n    key: int = 1\n    'Text.'\n", space)
    assert field_documentation(space["Alone"]) == {}


def sections(kind: type[Section], seen: set[type[Section]]) -> Iterator[type[Section]]:
    if kind not in seen:
        seen.add(kind)
        yield kind
        for field in kind.model_fields.values():
            inner = section_of(field.annotation)
            if inner is not None:
                yield from sections(inner, seen)


@pytest.mark.parametrize("kind", [*sections(Recipe, set())], ids=lambda kind: kind.__name__)
def test_every_key_of_a_recipe_is_documented(kind):
    assert set(field_documentation(kind)) == set(kind.model_fields)
