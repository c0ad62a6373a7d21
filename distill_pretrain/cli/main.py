"""`distill-pretrain VERB RECIPE.yaml [section.key=value ...]`.

A verb is a module `distill_pretrain.cli.<verb>` with `HELP` (text), `SECTIONS` (recipe sections it reads) and
`run(recipe, args)`; `add_arguments(parser)` is optional, and `run_folder(path, args)` of a verb that takes a run folder
in place of a recipe. Importing it must be cheap: `VERB --help` does, so torch and
megatron-core are imported inside `run`.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from distill_pretrain import __version__
from distill_pretrain.cli.ending import (
    INTERRUPTED,
    NOT_READ,
    interruptible,
    nobody_reads,
    output_may_end,
)
from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.processes.logs import LEVEL_VARIABLE, LEVELS, chosen_level, shown

PROG = "distill-pretrain"
OTHER_RANKS_WAIT_S = 3.0

RECIPE_VERBS = {
    "tokenize": "text files, folders or JSONL -> tokenised corpus",
    "capture": "teacher + tokenised corpus -> cache of sparse logits",
    "verify": "check a cache: every checksum, and that it belongs to the corpus",
    "prune": "smaller models of a trained one, to start students from",
    "train": "train a model on the text, from a cache, or both",
    "eval": "held-out figures of trained models",
    "report": "markdown report that compares runs, or an HTML page of one",
    "plan": "what a capture and its students will take: bytes, hours, memory",
    "compare": "several kinds of targets, several seeds: capture, train, eval and report",
}
OTHER_VERBS = {
    "recompress": "copy a cache with another coding of the same targets",
    "merge": "make one cache of shards captured in several places",
    "export": "write a trained model as a Hugging Face folder",
    "inspect": "say what a cache, a tokenised corpus, a run or a checkpoint contains",
    "doctor": "check this machine and the installed packages",
}
VERBS = {**RECIPE_VERBS, **OTHER_VERBS}
JOBS = ("tokenize", "capture", "prune", "train", "eval", "compare")
"""Verbs that work for hours, and whose output is a by-product."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for a user's mistake (printed without a traceback); 130 when interrupted; 143 when a training was told to
        stop and has saved; 141 when nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with interruptible():
        try:
            status = _main(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            if not nobody_reads():
                raise
            return _leave(NOT_READ)
        return status


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    verb = arguments.pop(0)
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(VERBS)}"
        print(f"{PROG}: error: unknown verb {verb}; {hint}", file=sys.stderr)
        return 2
    try:
        with output_may_end() if verb in JOBS else nullcontext():
            _run(verb, arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_reads():
            traceback.print_exc()
            return _leave(1)
        return _leave(NOT_READ)
    except DistillPretrainError as error:
        _print_error(verb, error)
        return _leave(2)
    except OSError as error:
        from distill_pretrain.files.disk import is_of_storage, storage_error

        if not is_of_storage(error):
            traceback.print_exc()
            return _leave(1)
        _print_error(verb, storage_error(error))
        return _leave(2)
    except KeyboardInterrupt:
        _print_interrupted(verb)
        return _leave(INTERRUPTED)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        return _leave(end.code)
    except Exception:
        traceback.print_exc()
        return _leave(1)
    return _leave(0)


def _print_error(verb: str, error: DistillPretrainError) -> None:
    """One message for the job: rank 0 speaks at once, another rank only if rank 0 goes on without error.

    A mistake that every rank finds ends rank 0 first, and the launcher then ends the others while they wait.
    """
    from distill_pretrain.processes.env import launch_rank

    rank = launch_rank()
    if rank:
        time.sleep(OTHER_RANKS_WAIT_S)
    where = f" (rank {rank})" if rank else ""
    print(f"{PROG} {verb}: error{where}: {error}", file=sys.stderr, flush=True)


def _print_interrupted(verb: str) -> None:
    """One line for the job."""
    from distill_pretrain.processes.env import launch_rank

    if launch_rank() == 0:
        print(f"{PROG} {verb}: interrupted", file=sys.stderr, flush=True)


def _leave(status: int) -> int:
    """The exit status; in a job of several processes the process ends here and now.

    After an error other ranks may be waiting for this one in a collective, and so may the end of the interpreter; the
    launcher ends the job as soon as one process has gone. After success the communication library's threads can abort
    a process whose interpreter is being taken down; all work is on disk by then. The exit functions still run: those of
    other packages end what they have started, which would otherwise live on and hold the job's output open.
    """
    from distill_pretrain.processes.env import launch_world_size

    if launch_world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def overview() -> str:
    """Return the text of `--help`."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"usage: {PROG} VERB RECIPE.yaml [section.key=value ...]",
            "",
            "Pretrains language models by offline distillation: a teacher's next-token distribution",
            "is sampled once into a cache, and any number of students train from it.",
            "",
            "verbs that read a recipe, in their usual order:",
            *(f"  {verb:<{width}}  {text}" for verb, text in RECIPE_VERBS.items()),
            "",
            "others:",
            *(f"  {verb:<{width}}  {text}" for verb, text in OTHER_VERBS.items()),
            "",
            f"`{PROG} VERB --help` explains a verb, with an example and the recipe's keys.",
            "On several processes: torchrun --nproc-per-node=2 -m distill_pretrain VERB ...",
        ]
    )


def verb_parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    """Make the argument parser of one verb."""
    takes_recipe = verb in RECIPE_VERBS
    keys = ""
    if takes_recipe:
        # The other verbs work where the recipe's own dependencies are missing: doctor reports them.
        from distill_pretrain.config import describe
        from distill_pretrain.jobs.recipe import Recipe

        keys = f"Keys of the recipe sections it reads:\n\n{describe(Recipe, module.SECTIONS)}"
    parser = argparse.ArgumentParser(
        prog=f"{PROG} {verb}",
        description=module.HELP.strip(),
        epilog=keys if takes_recipe else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if takes_recipe:
        parser.add_argument("recipe", metavar="RECIPE.yaml", help="the job's settings")
        parser.add_argument(
            "overrides",
            metavar="section.key=value",
            nargs="*",
            help="settings that win over the recipe's; the value is YAML",
        )
        parser.add_argument(
            "--print-recipe",
            action="store_true",
            help="print the resolved recipe, with every default, and stop",
        )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        help=f"least severe notices shown on standard error (default: ${LEVEL_VARIABLE}, else info)",
    )
    return parser


def _run(verb: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"distill_pretrain.cli.{verb}")
    args = verb_parser(verb, module).parse_intermixed_args(arguments)
    with shown(chosen_level(args.log_level)):
        _run_parsed(verb, module, args)


def _run_parsed(verb: str, module: ModuleType, args: argparse.Namespace) -> None:
    if verb in OTHER_VERBS:
        module.run(None, args)
        return
    from distill_pretrain.config import load_recipe
    from distill_pretrain.jobs.recipe import Recipe

    path: Path | None = Path(args.recipe)
    if hasattr(module, "run_folder") and Path(args.recipe).is_dir():
        module.run_folder(Path(args.recipe), args)
        return
    if "=" in args.recipe and not Path(args.recipe).exists():
        path, args.overrides = None, [args.recipe, *args.overrides]
    recipe = load_recipe(Recipe, path, args.overrides)
    if args.print_recipe:
        from distill_pretrain.config import recipe_text

        print(recipe_text(recipe), end="")
        return
    module.run(recipe, args)


if __name__ == "__main__":
    sys.exit(main())
