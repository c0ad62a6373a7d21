"""`distill-pretrain inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.errors import ConfigError, DistillPretrainError
from distill_pretrain.processes.env import launch_rank

if TYPE_CHECKING:
    from distill_pretrain.corpus.tokenizers import Tokenizer

SECTIONS = ()

HELP = """
Says what a folder or file written by this project contains. PATH is one of

  a cache, finished or not     what it was made from, its size, what its targets are like, one example row;
                               a folder, or a URL such as s3://bucket/cache
  a token prefix               documents, tokens, lengths, fingerprint, the first tokens (PREFIX.bin and PREFIX.idx)
  a folder with tokens.json    the same of every corpus in it
  a run folder                 last step, last figures, checkpoints, model
  a checkpoint folder          step, model, what it belongs to

Reads only; checks little: use `distill-pretrain verify` for a cache.

With --estimators PATH is a recipe with the sections data, teacher and capture. Every sampler is measured on what the
teacher says of the first sequences: its error and bias against the teacher's softmax, unique ids and bytes per
position, and how much less variance systematic sampling has than multinomial. Nothing is captured.

With --signal PATH is a recipe with the sections data and model (and parallel, train.seed). The model's signal is
measured on a few sequences, before training or from --checkpoint, layer by layer: variance, correlation between tokens,
and gradients, beside what theory predicts for its initial weights. Tensor x pipeline parallel under torchrun, which
wants the longer name --signal-propagation: it has options of its own that begin with --signal.

Examples
  distill-pretrain inspect runs/cache
  distill-pretrain inspect --estimators capture.yaml teacher.path=runs/teacher --output estimators.json
  distill-pretrain inspect --signal student.yaml model.init=deepscale model.num_layers=96 --picture signal.png
"""

FIRST_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="cache folder or URL, token prefix, run or checkpoint folder; a recipe with --estimators or --signal",
    )
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="with --estimators or --signal: settings that win over the recipe's",
    )
    parser.add_argument(
        "--estimators", action="store_true", help="measure the samplers on a recipe's teacher"
    )
    parser.add_argument(
        "--signal",
        "--signal-propagation",
        action="store_true",
        help="measure signal propagation in a recipe's model",
    )
    from distill_pretrain.cli import inspect_estimators, inspect_signal

    inspect_estimators.add_arguments(parser)
    inspect_signal.add_arguments(parser)


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Describes a path; one process does it."""
    if args.estimators:
        from distill_pretrain.cli.inspect_estimators import show_estimators

        show_estimators(args)
        return
    if args.signal:
        from distill_pretrain.cli.inspect_signal import show_signal

        show_signal(args)
        return
    if args.overrides:
        raise ConfigError(
            "settings of a recipe belong to --estimators and --signal",
            found=" ".join(args.overrides),
            remedy="leave them out, or add one of these",
        )
    if launch_rank() != 0:
        return
    path = Path(args.path)
    corpus = _corpus_prefix(path)
    if "://" in args.path or (path / "plan.json").is_file():
        from distill_pretrain.cli.inspect_cache import show_cache

        show_cache(args.path)
    elif corpus is not None:
        _show_tokens(corpus)
    elif (path / "tokens.json").is_file():
        for index in sorted(path.glob("*.idx")):
            _show_tokens(index.with_suffix(""))
    elif (path / "checkpoint.json").is_file():
        _show_checkpoint(path)
    elif (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        _show_run(path)
    else:
        raise ConfigError(
            "nothing here that this project writes",
            where=path,
            found=_found(path),
            expected=f"a cache (plan.json), a token prefix ({path.name}.bin and {path.name}.idx), a tokens "
            "folder (tokens.json), a run (metrics.jsonl, checkpoints/) or a checkpoint (checkpoint.json)",
            remedy="correct the path",
        )


def _found(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return (
            f"a folder with {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
            if names
            else "an empty folder"
        )
    return "a file" if path.exists() else "no such file or folder"


def _corpus_prefix(path: Path) -> Path | None:
    """The prefix that a path names, with or without .bin / .idx."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not prefix.name:  # "." or "/"
        return None
    return prefix if prefix.with_name(f"{prefix.name}.idx").is_file() else None


def fact(name: str, value: object) -> None:
    """One indented line of the description."""
    say(f"  {name:<22}{value}")


def find_tokenizer(places: list[Path], sha256: str | None) -> Tokenizer | None:
    """The tokenizer of that hash, from the first of some folders with a tokens.json that names it."""
    from distill_pretrain.corpus.tokenizers import load_recorded_tokenizer
    from distill_pretrain.corpus.tokens_record import TokensRecord

    for place in places:
        if not (place / "tokens.json").is_file():
            continue
        try:
            folder = TokensRecord.load(place)
            record = folder.tokenizer
            if sha256 in folder.tokenizer_digests:
                return load_recorded_tokenizer(
                    place, kind=record["kind"], file=record["file"], sha256=record["sha256"]
                )
        except DistillPretrainError:
            continue
    return None


def _show_tokens(prefix: Path) -> None:
    import numpy as np

    from distill_pretrain.corpus.token_index import TokenIndex
    from distill_pretrain.corpus.tokens_record import TokensRecord

    index = TokenIndex.open(prefix)
    record = TokensRecord.beside(prefix)
    fingerprint = index.fingerprint
    say(f"tokenised corpus {prefix}")
    fact("documents", f"{index.num_documents:,}")
    fact("tokens", f"{index.num_tokens:,} ({index.dtype})")
    quantiles = np.quantile(index.document_lengths, [0, 0.1, 0.5, 0.9, 1])
    names = ("shortest", "10%", "median", "90%", "longest")
    shown = ", ".join(f"{n} {q:,.0f}" for n, q in zip(names, quantiles, strict=True))
    fact("tokens per document", shown)
    fact("largest token id", f"{fingerprint.max_token_id:,}")
    fact(".bin sha256", fingerprint.bin_sha256)
    fact(".idx sha256", fingerprint.idx_sha256)
    tokenizer = None
    if record is None:
        fact("tokenizer", "unknown (no tokens.json beside it)")
    else:
        made_by = record.tokenizer
        fact("tokenizer", f"{made_by['kind']} {made_by['file']}, sha256 {short(made_by['sha256'])}")
        fact("vocabulary", f"{record.vocab_size:,}, end of document {record.eod_id}")
        tokenizer = find_tokenizer([prefix.parent], made_by["sha256"])
        recorded = record.corpora.get(prefix.name)
        if recorded is not None and recorded != fingerprint.as_dict():
            fact("warning", "tokens.json records another fingerprint: the files were changed")
    first = index.read(0, 0, min(FIRST_TOKENS, int(index.document_lengths[0]))).tolist()
    fact("begins with", repr(tokenizer.decode(first)) if tokenizer else f"ids {first}")


def _show_run(folder: Path) -> None:
    from distill_pretrain.checkpoint.store import CheckpointStore
    from distill_pretrain.config import load_recipe
    from distill_pretrain.reports.curves import FILE_NAME, TrainingCurve

    say(f"run {folder}")
    if (folder / FILE_NAME).is_file() and (folder / FILE_NAME).stat().st_size:
        curve = TrainingCurve.load(folder)
        fact("last step", f"{curve['step'][-1]:,.0f}")
        for name in ("loss", "ce", "kl", "grad_norm", "lr", "tokens", "tokens_per_second"):
            value = curve[name][-1]
            if value == value:  # not null
                fact(name, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}")
        if curve.cut_off:
            fact("note", "the last line of the log is incomplete (a killed run)")
    else:
        fact("last step", "none logged")
    store = CheckpointStore(folder / "checkpoints")
    names = ", ".join(path.name for path in store.complete())
    fact("checkpoints", names or "none")
    newest = store.newest()
    if newest is not None:
        _show_mapping("model", newest.identity.get("model"))
    elif (folder / "recipe.yaml").is_file():
        model = load_recipe(Recipe, folder / "recipe.yaml").model
        _show_mapping("model", None if model is None else model.model_dump(mode="json"))


def _show_checkpoint(folder: Path) -> None:
    from distill_pretrain.checkpoint.store import Checkpoint

    checkpoint = Checkpoint.open(folder)
    say(f"checkpoint {folder}")
    fact("step", f"{checkpoint.step:,}")
    fact("sha256", checkpoint.sha256)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    fact("files", f"{len(checkpoint.files)}, {size:,} bytes")
    for name, value in checkpoint.identity.items():
        if name == "at_default":
            continue
        if isinstance(value, dict):
            _show_mapping(name, value)
        else:
            fact(name, value)


def _show_mapping(name: str, values: object) -> None:
    if isinstance(values, dict):
        fact(name, ", ".join(f"{k} {json.dumps(v).strip(chr(34))}" for k, v in values.items()))


def short(value: object) -> str:
    """A long hash cut to twelve digits; other values as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {short(v)}" for k, v in value.items()) + "}"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
