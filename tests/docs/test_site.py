"""The pages of the documentation: what is made from the code is whole, and what is written by hand names what exists.

`launch/docs.sh` builds the site itself.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import distill_pretrain
from distill_pretrain import errors
from distill_pretrain.cli.main import RECIPE_VERBS, VERBS, verb_parser
from distill_pretrain.config import load_recipe
from distill_pretrain.config.loader import section_of
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe
from tools import docs_site, run_pages

ROOT = Path(__file__).parents[2]
WRITTEN = sorted(
    page
    for pattern in ("README.md", "docs/*.md", "docs/guides/*.md", "docs/results/README.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """(page, text) of the fenced blocks of a language in the pages written by hand."""
    for page in WRITTEN:
        for indent, found, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page, re.sub(f"^{indent}", "", text, flags=re.M)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command line of this project in the pages, README's indented ones included."""
    lines = [(page, line) for page, text in blocks("bash") for line in text.splitlines()]
    readme = ROOT / "README.md"
    lines += [(readme, line) for line in re.findall(r"^    (\S.*)$", readme.read_text(), re.M)]
    found = []
    for page, line in lines:
        words = shlex.split(line, comments=True)
        for starter in (["distill-pretrain"], ["-m", "distill_pretrain"]):
            for at in range(len(words)):
                if words[at : at + len(starter)] == starter:
                    found.append((page.name, words[at + len(starter) :]))
        found += [
            (page.name, words[1:]) for _ in words[:1] if words[0].endswith("torchrun_multi.sh")
        ]
    return found


def test_there_are_commands_and_recipes_to_check():
    assert len(commands()) > 25
    assert len(list(blocks("yaml"))) > 4


@pytest.mark.parametrize(("page", "words"), commands())
def test_a_command_on_a_page_is_one_that_the_program_takes(page, words):
    verb, *arguments = words
    if verb == "VERB":
        return
    assert verb in VERBS, page
    parser = verb_parser(verb, import_module(f"distill_pretrain.cli.{verb}"))
    parser.exit_on_error = False
    parsed = parser.parse_intermixed_args(arguments)
    recipe = getattr(parsed, "recipe", None)
    if recipe is not None and recipe.startswith("launch/"):
        assert (ROOT / recipe).is_file(), page
    overrides = [*getattr(parsed, "overrides", ())]
    for override in overrides:
        key = override.partition("=")[0]
        assert key in known_keys(), f"{page}: {key}"


def test_every_command_on_a_page_is_run_or_says_why_not():
    found = [command for page in run_pages.pages() for command in run_pages.commands(page)]
    assert {ROOT / command.page for command in found} <= set(WRITTEN)
    shown = sum(len([line for line in text.splitlines() if line]) for _, text in blocks("bash"))
    assert len([command for command in found if command.page != "README.md"]) == shown
    assert len([command for command in found if not command.reason]) > 30
    for command in found:
        if command.reason.startswith("run by: "):
            assert (ROOT / command.reason.removeprefix("run by: ")).is_file(), command.place
        elif command.reason:
            assert "needs" in command.reason, command.place


def known_keys() -> set[str]:
    keys = set()
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None
        keys |= {f"{name}.{key}" for key in section.model_fields}
    return keys


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_a_recipe_on_a_page_is_one_that_the_program_takes(tmp_path, page, text):
    (tmp_path / "recipe.yaml").write_text(text)
    try:
        load_recipe(Recipe, tmp_path / "recipe.yaml")
    except ConfigError as error:  # a page may show a part of a section
        problems = str(error).splitlines()[1:]
        assert [line for line in problems if not line.endswith("required, not given")] == []


def test_keys_named_in_the_text_exist():
    sections = "|".join(Recipe.model_fields)
    for page in WRITTEN:
        for key in re.findall(rf"`({sections})\.(\w+)", page.read_text(encoding="utf-8")):
            if key[1] in {"bin", "json", "loss", "md"}:
                continue
            assert ".".join(key) in known_keys(), f"{page.name}: {'.'.join(key)}"


def test_the_page_of_recipe_keys_has_every_key_of_every_section():
    page = docs_site.recipe_page()

    def look(path: str, annotation: object, above: tuple[type, ...]) -> int:
        section = section_of(annotation)
        if section is None or section in above:
            return 0
        count = 0
        for key, field in section.model_fields.items():
            assert f"| `{path}.{key}` |" in page
            count += 1 + look(f"{path}.{key}", field.annotation, (*above, section))
        return count

    counted = sum(look(name, field.annotation, ()) for name, field in Recipe.model_fields.items())
    assert counted > 150


def test_the_page_of_verbs_has_every_verb_and_option():
    page = docs_site.verbs_page()
    for verb in VERBS:
        parser = verb_parser(verb, import_module(f"distill_pretrain.cli.{verb}"))
        text = page.partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            if action.help != argparse.SUPPRESS:
                assert all(option in text for option in action.option_strings), verb
    assert set(RECIPE_VERBS) < set(VERBS)


def test_the_page_of_python_names_has_every_public_name():
    page = docs_site.python_page()
    for name in distill_pretrain.__all__:
        if name != "__version__":
            assert page.count(f".{name}\n") == 1


def test_the_catalogue_has_every_kind_of_error_and_a_message_of_each_room():
    page = docs_site.errors_page()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.DistillPretrainError):
            assert f"\n## {name}\n" in page
    for room in ("cache", "checkpoint", "corpus", "data", "losses", "mcore", "teacher", "train"):
        assert f"| `{room}/" in page
    assert page.count(".py` |") > 200


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve()
        made = file.is_relative_to(ROOT / "docs") and str(file.relative_to(ROOT / "docs")) in {
            **docs_site.PAGES,
            **docs_site.BESIDE_THE_CODE,
        }
        assert made or file.exists(), f"{page.name}: {target}"


def test_a_link_out_of_the_site_becomes_the_file_s_name_and_a_dead_one_is_refused():
    assert docs_site.inward("[the image](../Dockerfile)", "start.md") == "the image (`Dockerfile`)"
    assert (
        docs_site.inward("[f](../../distill_pretrain/cache/FORMAT.md#x)", "guides/a.md")
        == "[f](../reference/format.md#x)"
    )
    with pytest.raises(FileNotFoundError, match="nowhere"):
        docs_site.inward("[x](nowhere.md)", "start.md")


def test_the_readme_fits_a_screen_and_a_half():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
    picture = next(number for number, line in enumerate(lines) if line.startswith("!["))
    assert picture < 15


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Takes tags of Python's as text."""

    Loader.add_multi_constructor("tag:", lambda loader, suffix, node: str(node))
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    named = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    for page in WRITTEN:
        if page.name != "README.md" or page.parent.name == "results":
            assert str(page.relative_to(ROOT / "docs")) in named
    assert named >= {*docs_site.PAGES, *docs_site.BESIDE_THE_CODE}
