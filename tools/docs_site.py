"""Hooks of mkdocs (mkdocs.yml): the pages that are made from the code, and links that leave docs/.

Pages made here: every recipe key, every verb, every public name, every error, the decisions, and the documents that
lie beside the code. `launch/docs.sh` builds the site; a link to a file that does not exist fails the build.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "distill_pretrain"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")

BESIDE_THE_CODE = {
    "reference/format.md": "distill_pretrain/cache/FORMAT.md",
    "reference/loss.md": "distill_pretrain/kernels/sparse_kd/README.md",
    "reference/sampling.md": "distill_pretrain/sampling/README.md",
    "reference/students.md": "distill_pretrain/mcore/README.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page of the site -> file of the repository that it is."""


def recipe_page() -> str:
    """Every section of a recipe, and of every section every key."""
    from distill_pretrain.cli.main import RECIPE_VERBS
    from distill_pretrain.jobs.recipe import Recipe

    readers: dict[str, list[str]] = {}
    for verb in RECIPE_VERBS:
        for section in import_module(f"distill_pretrain.cli.{verb}").SECTIONS:
            readers.setdefault(section, []).append(f"[`{verb}`](verbs.md#{verb})")
    lines = [
        "# Recipe keys",
        "",
        "A recipe is one YAML file of sections. Every verb reads the sections that it needs and leaves the others "
        "alone. An unknown key is an error that suggests the nearest known one. `section.key=value` on the command "
        "line wins over the file, and `base:` names files whose settings a recipe inherits.",
        "",
        "This page is made from the code. `distill-pretrain VERB --help` prints the same text.",
    ]
    for name, field in Recipe.model_fields.items():
        lines += ["", f"## {name}", "", *_section(name, field.annotation, set())]
        if name in readers:
            lines += ["", f"Read by {', '.join(readers[name])}."]
    return "\n".join(lines) + "\n"


def _section(path: str, annotation: Any, above: set[type]) -> Iterator[str]:
    """The text of a section and the table of its keys, then the sections inside it."""
    from distill_pretrain.config.describe import default_text, type_text
    from distill_pretrain.config.documentation import field_documentation
    from distill_pretrain.config.loader import section_of

    section = section_of(annotation)
    assert section is not None, path
    yield inspect.getdoc(section) or ""
    yield ""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    inner = []
    texts = field_documentation(section)
    for key, field in section.model_fields.items():
        nested = section_of(field.annotation)
        default = default_text(field).strip(" ()").removeprefix("default ")
        if nested is not None and not field.is_required() and default != "null":
            default = "its own defaults"
        kind = _cell(type_text(field.annotation))
        meaning = _cell(texts.get(key, ""))
        yield f"| `{path}.{key}` | {kind} | {_cell(default)} | {meaning} |"
        if nested is not None and nested not in above:
            inner.append((f"{path}.{key}", field.annotation, nested))
    for name, kind, nested in inner:
        yield from ("", f"### {name}", "")
        yield from _section(name, kind, above | {nested})


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def verbs_page() -> str:
    """The help of every verb, without the keys, which have a page of their own."""
    from distill_pretrain.cli.main import VERBS, overview, verb_parser

    lines = ["# Verbs", "", "This page is made from the command line's own parsers.", ""]
    lines += ["```text", overview(), "```"]
    for verb, summary in VERBS.items():
        parser = verb_parser(verb, import_module(f"distill_pretrain.cli.{verb}"))
        parser.epilog = None
        parser.formatter_class = _WideHelp
        lines += ["", f"## {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["```text", parser.format_help().strip(), "```"]
    return "\n".join(lines) + "\n"


class _WideHelp(argparse.RawDescriptionHelpFormatter):
    """Help of the same width on every terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def python_page() -> str:
    """One entry per public name, for mkdocstrings to fill in from the docstrings."""
    import distill_pretrain

    lines = [
        "# Python names",
        "",
        "[The Python API](../api.md) has a snippet for each of these names.",
        "",
    ]
    for name in distill_pretrain.__all__:
        if name != "__version__":
            module = distill_pretrain._MODULES[name]
            lines += [f"::: distill_pretrain.{module}.{name}", ""]
    return "\n".join(lines)


class Message(NamedTuple):
    """One place of the code that raises an error."""

    kind: str
    what: str
    expected: str
    remedy: str
    file: str


def error_messages() -> list[Message]:
    """Every message in the code, by kind, with `{...}` where a value is filled in."""
    from distill_pretrain import errors

    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.DistillPretrainError)
    }
    messages = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            kind = ast.unparse(node.func).rpartition(".")[2]
            if kind not in kinds or not node.args:
                continue
            keys = {keyword.arg: _text(keyword.value) for keyword in node.keywords}
            what = _text(node.args[0])
            if re.sub(r"\{[^}]*\}", "", what).strip(" ;:"):
                file = path.relative_to(PACKAGE).as_posix()
                messages.append(
                    Message(kind, what, keys.get("expected", ""), keys.get("remedy", ""), file)
                )
    return messages


def _text(node: ast.expr) -> str:
    """What a message says, with `{...}` for what is known only at run time."""
    if isinstance(node, ast.Constant):
        return "" if node.value is None else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        inner = ast.unparse(node.value)
        return f"{{{inner}}}" if inner.isidentifier() else "{...}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{...}"


def errors_page() -> str:
    """Every kind of error, what it means, and its messages with their remedies."""
    from distill_pretrain import errors

    lines = [
        "# Error catalogue",
        "",
        "Every mistake that a user can make ends in one message and exit status 2. The message says what is wrong, "
        "where, what was found, what was expected, and the remedy. In Python it is a subclass of "
        "`DistillPretrainError`. Search this page for the words of a message; `{...}` stands for a value that is "
        "filled in. The page is made from the code.",
    ]
    messages = error_messages()
    for name, kind in vars(errors).items():
        if not (isinstance(kind, type) and issubclass(kind, errors.DistillPretrainError)):
            continue
        first = (inspect.getdoc(kind) or "").split("\n\n")[0]
        lines += ["", f"## {name}", "", first]
        rows = sorted({m for m in messages if m.kind == name and name != "DistillPretrainError"})
        if rows:
            lines += ["", "| message | expected | remedy | raised in |", "|---|---|---|---|"]
        for row in rows:
            cells = (_cell(row.what), _cell(row.expected), _cell(row.remedy), f"`{row.file}`")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decisions_page() -> str:
    """The decisions by number and title."""
    lines = [
        "# Decisions",
        "",
        "Each page has the context, the options, the choice, and what would change it.",
        "",
    ]
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def families_table() -> str:
    """What can be done with the models of every family."""
    from distill_pretrain.checkpoint.hf.registry import families, teachers_only

    lines = [
        "| family | `model_type` | student, teacher of kind `megatron`, export | teacher `hf` | `prune` | pieces |",
        "|---|---|---|---|---|---|",
    ]
    for family in families().values():
        prunes = "yes" if family.unpruned is None else f"no: {family.unpruned}"
        always = [f"`{name}`" for name in sorted(family.always)]
        options = [f"`{name}`" for name in sorted(family.options)]
        pieces = ", ".join(always)
        if options:
            pieces += f"{'; ' if pieces else ''}perhaps {', '.join(options)}"
        lines.append(
            f"| {family.title} | `{family.model_type}` | yes: `{family.architecture}` | yes | {prunes} | {pieces} |"
        )
    for known in teachers_only().values():
        lines.append(f"| {known.title} | `{known.model_type}` | no: {known.reason} | yes | no | |")
    return "\n".join(lines)


IN_PAGES = {"guides/weights.md": ("families", families_table)}
"""Page of docs/ -> the name of a part between comments, and the function that makes it."""


def with_parts(page: str) -> str:
    """Return a page of docs/ with the part that is made here as it should be."""
    name, make = IN_PAGES[page]
    text = (DOCS / page).read_text(encoding="utf-8")
    begin, end = (f"<!-- {word} of {name}: tools/docs_site.py -->" for word in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{make()}\n{end}{after}"


PAGES = {
    "reference/recipe.md": recipe_page,
    "reference/verbs.md": verbs_page,
    "reference/python.md": python_page,
    "reference/errors.md": errors_page,
    "decisions/index.md": decisions_page,
}
"""Page of the site -> the function that makes it."""


def inward(markdown: str, page: str) -> str:
    """Links of a page, with those that leave docs/ turned to the page that shows the file, or into its name.

    Args:
        markdown: the page's text.
        page: its path below docs/, or that of the site that shows a file of the repository.

    Raises:
        FileNotFoundError: a link leads to nothing.
    """
    source = BESIDE_THE_CODE.get(page, f"docs/{page}")
    pages = {file: name for name, file in BESIDE_THE_CODE.items()}

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = pages.get(file)
        if name is None and file.startswith("docs/"):
            name = file.removeprefix("docs/")
            if name not in {**PAGES, **BESIDE_THE_CODE} and not (ROOT / file).exists():
                raise FileNotFoundError(f"{source}: a link leads to {file}, which does not exist")
        elif name is None:
            if not (ROOT / file).exists():
                raise FileNotFoundError(f"{source}: a link leads to {file}, which does not exist")
            return f"{text} (`{file}`)"
        return f"[{text}]({os.path.relpath(name, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(turned, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    for page, make in PAGES.items():
        files.append(File.generated(config, page, content=make()))
    for page, source in BESIDE_THE_CODE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of every page."""
    return inward(markdown, page.file.src_uri)


if __name__ == "__main__":
    for name in IN_PAGES:
        (DOCS / name).write_text(with_parts(name), encoding="utf-8")
