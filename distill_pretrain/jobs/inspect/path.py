"""What lies at a path: tokens, a cache, a run or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.inspect.facts import fact, find_tokenizer, short

if TYPE_CHECKING:
    from distill_pretrain.corpus.token_names import TokenNames

FIRST_TOKENS = 48


def show_path(location: str) -> None:
    """Describe what lies at a path or URL.

    Raises:
        ConfigError: nothing that this project writes.
        DistillPretrainError: it is damaged.
    """
    path = Path(location)
    corpus = _corpus_prefix(path)
    if "://" in location or (path / "plan.json").is_file():
        from distill_pretrain.jobs.inspect.cache import show_cache

        show_cache(location)
    elif corpus is not None:
        _show_tokens(corpus)
    elif (path / "tokens.json").is_file():
        for index in sorted(path.glob("*.idx")):
            _show_tokens(index.with_suffix(""))
    elif (path / "checkpoint.json").is_file():
        _show_checkpoint(path)
    elif any((path / name).exists() for name in ("metrics.jsonl", "checkpoints", "phases.json")):
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
    if index.loss is not None:
        index.check_loss()
        fact("left out of the loss", f"{index.loss.num_masked():,} tokens")
        fact("weights of documents", index.loss.described)
        fact(".loss sha256", index.loss.sha256)
    tokenizer = None
    if record is None:
        fact("tokenizer", "unknown (no tokens.json beside it)")
    else:
        made_by = record.tokenizer
        fact("tokenizer", f"{made_by['kind']} {made_by['file']}, sha256 {short(made_by['sha256'])}")
        fact("vocabulary", f"{record.vocab_size:,}")
        tokenizer = find_tokenizer([prefix.parent], made_by["sha256"])
        fact("beginning of document", _named(tokenizer, record.bos_id))
        fact("end of document", _named(tokenizer, record.eod_id))
        recorded = record.corpora.get(prefix.name)
        if recorded is not None and recorded != index.record:
            fact("warning", "tokens.json records another fingerprint: the files were changed")
    first = index.read(0, 0, min(FIRST_TOKENS, index.document_length(0))).tolist()
    fact("begins with", repr(tokenizer.decode(first)) if tokenizer else f"ids {first}")


def _named(tokenizer: TokenNames | None, token_id: int | None) -> str:
    from distill_pretrain.corpus.special_tokens import shown

    if token_id is None:
        return "its text"
    return f"id {token_id}" if tokenizer is None else shown(tokenizer, token_id)


def _show_run(folder: Path) -> None:
    from distill_pretrain.checkpoint.lineage import phase_folders
    from distill_pretrain.checkpoint.store import CheckpointStore
    from distill_pretrain.reports.curves import FILE_NAME, TrainingCurve

    phases = phase_folders(folder)
    if phases:
        say(f"run {folder}, of {len(phases)} phases")
        for phase in phases:
            if phase.is_dir():
                _show_run(phase)
            else:
                say(f"phase {phase}: not begun")
        return
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
        _show_mapping("started from", newest.identity.get("start_from"))
    elif (folder / "recipe.yaml").is_file():
        from distill_pretrain.config import load_recipe
        from distill_pretrain.jobs.recipe import Recipe

        model = load_recipe(Recipe, folder / "recipe.yaml").model
        _show_mapping("model", None if model is None else model.model_dump(mode="json"))


def _show_checkpoint(folder: Path) -> None:
    from distill_pretrain.checkpoint.record import Checkpoint

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
