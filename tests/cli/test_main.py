from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill_pretrain import __version__
from distill_pretrain.cli import main as cli
from distill_pretrain.jobs.recipe import Recipe
from tests.support.distributed import REPOSITORY, torchrun

HEAVY = ("torch", "megatron", "transformers", "matplotlib", "sentencepiece", "numpy")
OF_RECIPES = ("pydantic", "yaml")
"""What reads recipes; the verbs that take none say what they do without it."""


def built(verb: str) -> bool:
    return importlib.util.find_spec(f"distill_pretrain.cli.{verb}") is not None


def help_text(*arguments: str) -> str:
    """Standard output of a fresh process, which must not have loaded anything heavy."""
    unwanted = HEAVY if arguments[0] in cli.RECIPE_VERBS else HEAVY + OF_RECIPES
    code = (
        "import json, sys\n"
        "from distill_pretrain.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as error:\n    code = error.code\n"
        f"loaded = [name for name in {unwanted!r} if name in sys.modules]\n"
        "print('\\n' + json.dumps([code, loaded]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert json.loads(last) == [0, []]
    return text


def test_help_lists_every_verb_without_loading_torch():
    text = help_text("--help")
    for verb in cli.VERBS:
        assert f"\n  {verb} " in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_explains_it_without_loading_torch(verb):
    if not built(verb):
        pytest.skip(f"{verb} is not built yet")
    text = help_text(verb, "--help")
    module = importlib.import_module(f"distill_pretrain.cli.{verb}")
    assert len(module.HELP.split()) > 20
    assert f"distill-pretrain {verb}" in text or f"distill_pretrain {verb}" in text
    if verb in cli.RECIPE_VERBS:
        assert module.SECTIONS
        for section in module.SECTIONS:
            assert f"\n{section}:  " in text


@pytest.mark.parametrize("verb", cli.RECIPE_VERBS)
def test_help_builds_no_validator_but_of_the_defaults_it_shows(verb):
    code = (
        "import json, sys\n"
        "from distill_pretrain.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "from distill_pretrain.config import Section\n"
        "def kinds(kind):\n"
        "    return [kind, *(k for sub in kind.__subclasses__() for k in kinds(sub))]\n"
        "made = [k.__name__ for k in kinds(Section)[1:] if k.__pydantic_complete__]\n"
        "taken = Section.model_config.get('use_attribute_docstrings', False)\n"
        "print('\\n' + json.dumps([made, taken]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True, check=True
    )
    made, taken = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    assert made == (["BadStepsConfig"] if verb in ("train", "compare", "plan") else [])
    assert not taken  # pydantic would tokenise the source of every section


def test_every_verb_says_which_sections_it_reads():
    for verb in filter(built, cli.RECIPE_VERBS):
        module = importlib.import_module(f"distill_pretrain.cli.{verb}")
        assert set(module.SECTIONS) <= set(Recipe.model_fields)


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"distill-pretrain {__version__}\n"


def test_a_misspelt_verb_is_refused_with_a_suggestion(capsys):
    assert cli.main(["tokenise"]) == 2
    assert "did you mean tokenize?" in capsys.readouterr().err


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill_pretrain", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_a_users_mistake_is_one_message_and_exit_code_2(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"corpus: {{paths: [{tmp_path}/nowhere.txt], output_dir: {tmp_path}/out}}")
    done = run("tokenize", str(recipe))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("distill-pretrain tokenize: error: corpus file not found; where:")
    assert done.stderr.count("\n") == 1


def test_a_job_prints_a_mistake_that_all_ranks_make_once(tmp_path):
    job = torchrun(2, "-m", "distill_pretrain", "tokenize", "corpus.pths=[a]")
    done = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("did you mean corpus.paths?") == 1


def test_a_mistake_that_only_another_rank_finds_is_printed_with_its_rank():
    done = run("tokenize", "corpus.pths=[a]", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("distill-pretrain tokenize: error (rank 1): ")


def test_a_missing_section_is_named(capsys):
    assert cli.main(["tokenize", "train.steps=5"]) == 2
    err = capsys.readouterr().err
    assert "train.global_batch_size: required" in err
    assert cli.main(["tokenize", "optimizer.lr=5"]) == 2
    assert "`tokenize` needs recipe sections that are missing; found: no corpus" in (
        capsys.readouterr().err
    )


def test_an_interrupt_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["tokenize", "x.yaml"]) == 130
    assert capsys.readouterr().err == "distill-pretrain tokenize: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stop_leaves_by_the_way_of_every_other_end(monkeypatch):
    def stopped(*_):
        raise SystemExit(143)

    monkeypatch.setattr(cli, "_run", stopped)
    assert cli.main(["train", "x.yaml"]) == 143


def unread(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A verb whose output nobody reads any more, as behind `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "distill_pretrain", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writer)


def test_output_that_nobody_reads_ends_a_verb_quietly_and_no_job(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"some words of text, number {number}\n" * 30)
    tokenize = [
        "tokenize",
        f"corpus.paths=[{tmp_path}]",
        "corpus.include=['*.txt']",
        "corpus.output_dir=out",
        "corpus.workers=1",
        "corpus.held_out_fraction=0.3",
        "tokenizer.vocab_size=300",
    ]
    job = unread(*tokenize, cwd=tmp_path)
    assert (job.returncode, job.stderr.count("Error")) == (0, 0), job.stderr
    assert (tmp_path / "out/train.bin").is_file()
    for arguments in (["--help"], ["--version"], ["inspect", "out/train"], ["doctor", "."]):
        done = unread(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (141, ""), (arguments, done.stderr)


def test_a_broken_pipe_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def broken(*_):
        raise BrokenPipeError("a socket's")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["inspect", "x"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_a_second_interrupt_ends_what_the_first_began():
    code = (
        "import signal, os, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # of a shell in the background: ignored
        "from distill_pretrain.cli import main as cli\n"
        "def run(*_):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "cli._run = run\n"
        "cli.main(['inspect', 'x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def broken(*_):
        raise AssertionError("ours")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["tokenize", "x.yaml"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_the_resolved_recipe_is_printed_and_nothing_run(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: {lr: 3e-4}")
    arguments = ["tokenize", str(recipe), "optimizer.beta1=0.5", "--print-recipe", "train=null"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "  lr: 0.0003\n" in out
    assert "  beta1: 0.5\n" in out


def test_tokenize_writes_reports_and_does_it_once(tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"some words of text, number {number}\n" * 30)
    arguments = [
        "tokenize",
        f"corpus.paths=[{tmp_path}]",
        f"corpus.output_dir={tmp_path}/out",
        "corpus.held_out_fraction=0.3",
        "corpus.workers=1",
        "tokenizer.vocab_size=300",
    ]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    assert "held_out: " in first.out
    assert f"tokens are in {tmp_path}/out" in first.out
    assert cli.main(arguments) == 0
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "out/recipe.yaml").is_file()
