"""`distill-pretrain inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.cli.console import say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.errors import ConfigError, DistillPretrainError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from distill_pretrain.contracts import RaggedTargets
    from distill_pretrain.corpus.tokenizers import Tokenizer
    from distill_pretrain.formats.cache_plan import CachePlan
    from distill_pretrain.formats.manifest import ShardRecord

SECTIONS = ()

HELP = """
Says what a folder or file written by this project contains. PATH is one of

  a cache folder               what it was made from, its size, how many ids it keeps per position, one example row
  a token prefix               documents, tokens, lengths, fingerprint, the first tokens (PREFIX.bin and PREFIX.idx)
  a folder with tokens.json    the same of every corpus in it
  a run folder                 last step, last figures, checkpoints, model
  a checkpoint folder          step, model, what it belongs to

Reads only; checks little: use `distill-pretrain verify` for a cache.

Example
  distill-pretrain inspect runs/cache
"""

SAMPLED_BLOCKS = 64
EXAMPLE_POSITION = 32
FIRST_TOKENS = 48
MOST_ENTRIES = 16
_BAR = 40


def run(recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Describes a path."""
    path: Path = args.path
    corpus = _corpus_prefix(path)
    if (path / "plan.json").is_file():
        _show_cache(path)
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


def _fact(name: str, value: object) -> None:
    say(f"  {name:<22}{value}")


def _show_cache(folder: Path) -> None:
    from distill_pretrain.formats.cache_reader import load_plan
    from distill_pretrain.formats.cache_writer import MANIFEST_NAME
    from distill_pretrain.formats.shard import ShardFile, shard_name

    plan = load_plan(folder)
    records = _shard_records(folder, plan)
    finished = (folder / MANIFEST_NAME).is_file()
    say(f"cache {folder}")
    _fact("state", "finished" if finished else f"{len(records)} of {plan.num_shards} shards done")
    _fact("plan id", plan.plan_id)
    _fact("sequences", f"{plan.num_sequences:,} of {plan.seq_len:,} positions")
    _fact("sampler", ", ".join(f"{key} {value}" for key, value in plan.sampler.items()))
    _fact("teacher", ", ".join(f"{key} {_short(value)}" for key, value in plan.teacher.items()))
    _fact("vocabulary", f"{plan.vocab_size:,}, tokenizer {_short(plan.tokenizer_sha256)}")
    _fact("corpus", ", ".join(f"{key} {_short(value)}" for key, value in plan.tokens.items()))
    _fact("sequence plan", plan.sequence_plan_id)
    _fact(
        "layout",
        f"{plan.shard_sequences} sequences per shard, {plan.block_tokens} positions per block, "
        f"codec {plan.codec}, micro-batch {plan.micro_batch_size}",
    )
    _fact("software", ", ".join(f"{key} {value}" for key, value in plan.software.items()))
    if not records:
        return
    _show_totals(plan, records)
    shard = records[0].shard
    _show_histogram(folder, plan, records)
    with ShardFile(folder / shard_name(shard), plan, shard) as file:
        _show_example(folder, plan, file)


def _shard_records(folder: Path, plan: CachePlan) -> list[ShardRecord]:
    from distill_pretrain.formats.manifest import ShardRecord
    from distill_pretrain.formats.shard import shard_name

    records = []
    for shard in range(plan.num_shards):
        path = (folder / shard_name(shard)).with_suffix(".json")
        if path.is_file():
            records.append(ShardRecord.from_json_bytes(path.read_bytes(), plan, shard))
    return records


def _show_totals(plan: CachePlan, records: list[ShardRecord]) -> None:
    tokens = sum(record.tokens for record in records)
    size = sum(record.size for record in records)
    entries = sum(record.entries for record in records)
    _fact("size", f"{size:,} bytes, {size / tokens:.2f} per position")
    _fact("entries", f"{entries:,}, {entries / tokens:.2f} per position (at most {plan.num_draws})")
    labelled = [record.labelled for record in records]
    hits = [record.label_hits for record in records]
    known = sum(n for n in labelled if n is not None)
    if known:
        rate = sum(n for n in hits if n is not None) / known
        _fact("canary", f"{rate:.1%} of positions have their true next token among the stored ids")


def _show_histogram(folder: Path, plan: CachePlan, records: list[ShardRecord]) -> None:
    """Unique ids per position in blocks spread over the finished shards."""
    import numpy as np

    from distill_pretrain.formats.shard import ShardFile, decode_frame, shard_name

    total = sum(record.blocks for record in records)
    picks = sorted({number * total // SAMPLED_BLOCKS for number in range(SAMPLED_BLOCKS)})
    counts = np.zeros(plan.num_draws + 1, np.int64)
    first = 0
    for record in records:
        blocks = [pick - first for pick in picks if first <= pick < first + record.blocks]
        first += record.blocks
        if not blocks:
            continue
        with ShardFile(folder / shard_name(record.shard), plan, record.shard) as file:
            for block in blocks:
                targets = decode_frame(file.frames(block, 1)[0], plan, record.shard, block)
                counts += np.bincount(targets.entries_per_token, minlength=plan.num_draws + 1)
    say(f"  unique ids per position ({len(picks)} of {total} blocks):")
    for low, high, share in _bins(counts):
        if not share:
            continue
        label = f"{low}" if low == high else f"{low}-{high}"
        say(f"    {label:>9}  {share:6.1%}  {'#' * round(share * _BAR)}")


def _bins(counts: npt.NDArray[np.int64]) -> list[tuple[int, int, float]]:
    """(low, high, share) over 0, 1, 2, 3-4, 5-8, 9-16, ... up to the largest value seen."""
    last = int(counts.nonzero()[0].max())
    bins, low = [], 0
    while low <= last:
        high = min(low if low < 3 else 2 * low - 2, len(counts) - 1)
        bins.append((low, high, float(counts[low : high + 1].sum() / counts.sum())))
        low = high + 1
    return bins


def _show_example(folder: Path, plan: CachePlan, file: Any) -> None:
    """One position with its targets, as text if the corpus and its tokenizer are found."""
    from distill_pretrain.formats.shard import decode_frame

    targets = decode_frame(file.frames(0, 1)[0], plan, file.shard, 0)
    row = min(EXAMPLE_POSITION, len(targets.entries_per_token) - 1)
    sequence = plan.shard_range(file.shard)[0]
    tokenizer = _tokenizer_of(folder, plan.tokenizer_sha256)
    context = _context(folder, plan, sequence)
    say(f"  example: sequence {sequence}, position {row}")
    if context is not None:
        tokens, labels = context
        before = [int(token) for token in tokens[max(0, row - 11) : row + 1]]
        text = repr(tokenizer.decode(before)) if tokenizer else f"ids {before}"
        say(f"    after        {text}")
        say(f"    next token   {_token(tokenizer, int(labels[row]))}")
    for token, prob in _largest(targets, row):
        say(f"    {prob:12.3f} {_token(tokenizer, token)}")


def _largest(targets: RaggedTargets, row: int) -> list[tuple[int, float]]:
    """(id, target probability) of a row, the largest first."""
    start = int(targets.entries_per_token[:row].sum())
    stop = start + int(targets.entries_per_token[row])
    pairs = zip(targets.ids[start:stop].tolist(), targets.probs()[start:stop].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])[:MOST_ENTRIES]


def _context(folder: Path, plan: CachePlan, sequence: int) -> tuple[Any, Any] | None:
    """Tokens and labels of a sequence, if the capture's recipe leads to the very corpus."""
    from distill_pretrain.config import load_recipe
    from distill_pretrain.formats.sequence_plan import SequencePlan
    from distill_pretrain.formats.token_index import TokenIndex

    try:
        data = load_recipe(Recipe, folder / "recipe.yaml").data
        if data is None:
            return None
        corpus = SequencePlan(TokenIndex.open(data.tokens), seq_len=data.seq_len, seed=data.seed)
        if corpus.plan_id != plan.sequence_plan_id:
            return None
    except DistillPretrainError:
        return None
    tokens, labels = corpus.read([sequence])
    return tokens[0], labels[0]


def _tokenizer_of(folder: Path, sha256: str | None) -> Tokenizer | None:
    """The tokenizer of that hash in the folder, beside it, or where its recipe's corpus is."""
    from distill_pretrain.config import load_recipe
    from distill_pretrain.corpus.tokenizers import load_recorded_tokenizer
    from distill_pretrain.formats.tokens_record import TokensRecord

    places = [folder, folder.parent, *sorted(p.parent for p in folder.parent.glob("*/tokens.json"))]
    try:
        data = load_recipe(Recipe, folder / "recipe.yaml").data
        places = [data.tokens.parent, *places] if data else places
    except DistillPretrainError:
        pass
    for place in places:
        if not (place / "tokens.json").is_file():
            continue
        try:
            record = TokensRecord.load(place).tokenizer
            if record["sha256"] == sha256:
                return load_recorded_tokenizer(
                    place, kind=record["kind"], file=record["file"], sha256=record["sha256"]
                )
        except DistillPretrainError:
            continue
    return None


def _token(tokenizer: Tokenizer | None, token_id: int) -> str:
    if token_id < 0:
        return "none"
    return f"{token_id:>7}  {tokenizer.id_to_piece(token_id)!r}" if tokenizer else f"{token_id:>7}"


def _show_tokens(prefix: Path) -> None:
    import numpy as np

    from distill_pretrain.formats.token_index import TokenIndex
    from distill_pretrain.formats.tokens_record import TokensRecord

    index = TokenIndex.open(prefix)
    record = TokensRecord.beside(prefix)
    fingerprint = index.fingerprint
    say(f"tokenised corpus {prefix}")
    _fact("documents", f"{index.num_documents:,}")
    _fact("tokens", f"{index.num_tokens:,} ({index.dtype})")
    quantiles = np.quantile(index.document_lengths, [0, 0.1, 0.5, 0.9, 1])
    names = ("shortest", "10%", "median", "90%", "longest")
    shown = ", ".join(f"{n} {q:,.0f}" for n, q in zip(names, quantiles, strict=True))
    _fact("tokens per document", shown)
    _fact("largest token id", f"{fingerprint.max_token_id:,}")
    _fact(".bin sha256", fingerprint.bin_sha256)
    _fact(".idx sha256", fingerprint.idx_sha256)
    tokenizer = None
    if record is None:
        _fact("tokenizer", "unknown (no tokens.json beside it)")
    else:
        made_by = record.tokenizer
        _fact(
            "tokenizer", f"{made_by['kind']} {made_by['file']}, sha256 {_short(made_by['sha256'])}"
        )
        _fact("vocabulary", f"{record.vocab_size:,}, end of document {record.eod_id}")
        tokenizer = _tokenizer_of(prefix.parent, made_by["sha256"])
        recorded = record.corpora.get(prefix.name)
        if recorded is not None and recorded != fingerprint.as_dict():
            _fact("warning", "tokens.json records another fingerprint: the files were changed")
    first = index.read(0, 0, min(FIRST_TOKENS, int(index.document_lengths[0]))).tolist()
    _fact("begins with", repr(tokenizer.decode(first)) if tokenizer else f"ids {first}")


def _show_run(folder: Path) -> None:
    from distill_pretrain.checkpoint.store import CheckpointStore
    from distill_pretrain.config import load_recipe
    from distill_pretrain.eval.curves import FILE_NAME, TrainingCurve

    say(f"run {folder}")
    if (folder / FILE_NAME).is_file() and (folder / FILE_NAME).stat().st_size:
        curve = TrainingCurve.load(folder)
        _fact("last step", f"{curve['step'][-1]:,.0f}")
        for name in ("loss", "ce", "kl", "grad_norm", "lr", "tokens", "tokens_per_second"):
            value = curve[name][-1]
            if value == value:  # not null
                _fact(name, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}")
        if curve.cut_off:
            _fact("note", "the last line of the log is incomplete (a killed run)")
    else:
        _fact("last step", "none logged")
    store = CheckpointStore(folder / "checkpoints")
    names = ", ".join(path.name for path in store.complete())
    _fact("checkpoints", names or "none")
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
    _fact("step", f"{checkpoint.step:,}")
    _fact("sha256", checkpoint.sha256)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    _fact("files", f"{len(checkpoint.files)}, {size:,} bytes")
    for name, value in checkpoint.identity.items():
        if isinstance(value, dict):
            _show_mapping(name, value)
        else:
            _fact(name, value)


def _show_mapping(name: str, values: object) -> None:
    if isinstance(values, dict):
        _fact(name, ", ".join(f"{k} {json.dumps(v).strip(chr(34))}" for k, v in values.items()))


def _short(value: object) -> str:
    """A long hash cut to twelve digits; other values as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
