"""What `distill-pretrain inspect` says of a cache: a folder or a URL, finished or not."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from distill_pretrain.cache.codec.files import tables_name
from distill_pretrain.cache.codec.registry import CODECS
from distill_pretrain.cache.finished_shards import FinishedShards
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.reader import load_plan_of_extent
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_names import TokenNames
from distill_pretrain.corpus.tokens_record import document_end_of
from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.files.storage import Storage, is_remote, open_storage
from distill_pretrain.jobs.console import say
from distill_pretrain.jobs.inspect.facts import fact, find_tokenizer, short

SAMPLED_BLOCKS = 64
EXAMPLE_POSITION = 32
MOST_ENTRIES = 16
MOST_SHARDS = 8
_BAR = 40
# libyaml where PyYAML was built with it: ten times as fast on a whole recipe.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def show_cache(location: str) -> None:
    """Describes a cache.

    Raises:
        CacheError: there is none, or what is read of it is damaged.
    """
    storage = open_storage(location)
    shards = FinishedShards(storage, load_plan_of_extent(storage))
    say(f"cache {location}")
    fact("state", _state(shards))
    _show_plan(shards.plan)
    data = _captured_data(storage)
    corpus = _corpus_of(data, shards.plan)
    if corpus is not None:
        fact("documents", f"{corpus.index.num_documents:,}; {corpus.shares}")
    if not shards.records:
        return
    sample = _Sample.of(shards)
    _show_codec(shards)
    _show_size(shards, sample)
    _show_targets(shards, sample)
    _show_example(shards, corpus, data)


def _state(shards: FinishedShards) -> str:
    plan = shards.plan
    done = f"{len(shards.records)} of {plan.num_shards} shards done"
    if shards.manifest is None:
        return f"unfinished: {done}"
    covered = shards.manifest.plan.num_sequences
    if covered < plan.num_sequences:
        return f"{covered:,} sequences finished, being extended to {plan.num_sequences:,}: {done}"
    return "finished" if len(shards.records) == plan.num_shards else f"damaged: {done}"


def _show_plan(plan: CachePlan) -> None:
    fact("plan id", plan.plan_id)
    fact("sequences", f"{plan.num_sequences:,} of {plan.seq_len:,} positions")
    fact("sampler", ", ".join(f"{key} {value}" for key, value in plan.sampler.items()))
    fact("teacher", ", ".join(f"{key} {short(value)}" for key, value in plan.teacher.items()))
    fact("vocabulary", f"{plan.vocab_size:,}, tokenizer {short(plan.tokenizer_sha256)}")
    fact("corpus", ", ".join(f"{key} {short(value)}" for key, value in plan.tokens.items()))
    fact("sequence plan", plan.sequence_plan_id)
    fact(
        "layout",
        f"{plan.shard_sequences} sequences per shard, {plan.block_tokens} positions per block, "
        f"micro-batch {plan.micro_batch_size}",
    )
    fact("software", ", ".join(f"{key} {value}" for key, value in plan.software.items()))


def _show_codec(shards: FinishedShards) -> None:
    plan = shards.plan
    entry = CODECS[plan.codec]
    text = f"{entry.name} of {entry.kind} (number {plan.codec})"
    if plan.codec_sha256 is None:
        fact("codec", f"{text}, no tables")
        return
    fact("codec", f"{text}, tables {short(plan.codec_sha256)}")
    own = [n for n, r in shards.records.items() if r.codec_sha256 != plan.codec_sha256]
    listed = ", ".join(map(str, own[:MOST_SHARDS])) + (" ..." if len(own) > MOST_SHARDS else "")
    count = f"{len(own)} of {len(shards.records)} shards"
    fact(
        "tables of their own", f"{count}: {listed}" if own else f"no shard of {len(shards.records)}"
    )


def _show_size(shards: FinishedShards, sample: _Sample) -> None:
    records = shards.records.values()
    tokens, size = sum(r.tokens for r in records), sum(r.size for r in records)
    payload = sample.payload_bytes / sample.positions
    fact("size", f"{size:,} bytes, {size / tokens:.2f} per position")
    fact(
        "bytes per position",
        f"{payload:.2f} payload (measured in {sample.blocks} of {sample.all_blocks} blocks), "
        f"{size / tokens - payload:.2f} block heads, index and header",
    )
    tables = {r.codec_sha256 for r in records if r.codec_sha256 is not None}
    if tables:
        extra = sum(shards.sizes[tables_name(sha256)] for sha256 in tables)
        fact(
            "tables",
            f"{len(tables)}, {extra:,} bytes beside that, {extra / tokens:.2f} per position",
        )


def _show_targets(shards: FinishedShards, sample: _Sample) -> None:
    plan, records = shards.plan, shards.records.values()
    tokens, entries = sum(r.tokens for r in records), sum(r.entries for r in records)
    most = plan.max_entries_per_token
    fact("entries", f"{entries:,}, {entries / tokens:.2f} per position (at most {most})")
    known = [r for r in records if r.labelled and r.label_hits is not None]
    if known:
        rate = sum(r.label_hits or 0 for r in known) / sum(r.labelled or 0 for r in known)
        fact("canary", f"{rate:.1%} of positions have their true next token among the stored ids")
    say(f"  of the targets in {sample.blocks} of {sample.all_blocks} blocks:")
    fact("  without entries", f"{sample.lengths[0] / sample.positions:.1%} of positions")
    rows = sample.positions - int(sample.lengths[0])
    if rows:
        fact("  mean entropy", f"{sample.entropy / rows:.3f} nats, {_entropy_note(plan)}")
        fact("  mean top-1 mass", f"{sample.top1 / rows:.3f}")
    say("    unique ids per position:")
    for low, high, share in bins(sample.lengths):
        if share:
            label = f"{low}" if low == high else f"{low}-{high}"
            say(f"    {label:>9}  {share:6.1%}  {'#' * round(share * _BAR)}")


def _entropy_note(plan: CachePlan) -> str:
    largest = math.log(plan.max_entries_per_token)
    if plan.kind == "counts":
        return (
            f"of the sampled counts themselves (plug-in): on average below the teacher's entropy, "
            f"and never above ln {plan.max_entries_per_token} = {largest:.3f}"
        )
    return (
        f"of the stored probabilities scaled to add up to 1: below the teacher's entropy where mass was cut off, "
        f"and never above ln {plan.max_entries_per_token} = {largest:.3f}"
    )


@dataclass(kw_only=True)
class _Sample:
    """Sums over blocks spread over the finished shards.

    Attributes:
        all_blocks: of the finished shards.
        blocks: looked at.
        positions: in them.
        payload_bytes: of them, block heads and padding not counted.
        entropy: sum over positions with entries, in nats.
        top1: sum of the largest target probability over positions with entries.
        lengths: int64[most entries + 1], positions by number of entries.
    """

    all_blocks: int
    lengths: npt.NDArray[np.int64]
    blocks: int = 0
    positions: int = 0
    payload_bytes: int = 0
    entropy: float = 0.0
    top1: float = 0.0

    @classmethod
    def of(cls, shards: FinishedShards) -> _Sample:
        """Read and check the blocks."""
        plan = shards.plan
        total = sum(record.blocks for record in shards.records.values())
        picks = sorted({number * total // SAMPLED_BLOCKS for number in range(SAMPLED_BLOCKS)})
        sample = cls(all_blocks=total, lengths=np.zeros(plan.max_entries_per_token + 1, np.int64))
        first = 0
        for shard, record in shards.records.items():
            blocks = [pick - first for pick in picks if first <= pick < first + record.blocks]
            first += record.blocks
            if not blocks:
                continue
            with shards.open(shard) as file:
                for block in blocks:
                    frame = file.frames(block, 1)[0]
                    sample.payload_bytes += len(frame.payload)
                    sample._add(file.spec.decode(frame, block))
        return sample

    def _add(self, targets: RaggedTargets) -> None:
        lengths = targets.entries_per_token
        self.blocks += 1
        self.positions += len(lengths)
        self.lengths += np.bincount(lengths, minlength=len(self.lengths))
        if not len(targets.ids):
            return
        starts = (np.cumsum(lengths) - lengths)[lengths > 0]
        probs = targets.probs().astype(np.float64)
        self.top1 += float(np.maximum.reduceat(probs, starts).sum())
        mass = np.add.reduceat(probs, starts)
        scaled = probs / np.repeat(mass, lengths[lengths > 0])
        self.entropy -= float((scaled * np.log(scaled)).sum())


def bins(counts: npt.NDArray[np.int64]) -> list[tuple[int, int, float]]:
    """Return (low, high, share) over 0, 1, 2, 3-4, 5-8, 9-16, ... up to the largest value seen."""
    last = int(counts.nonzero()[0].max())
    found, low = [], 0
    while low <= last:
        high = min(low if low < 3 else 2 * low - 2, len(counts) - 1)
        found.append((low, high, float(counts[low : high + 1].sum() / counts.sum())))
        low = high + 1
    return found


def _show_example(
    shards: FinishedShards, corpus: SequencePlan | None, data: CapturedData | None
) -> None:
    """One position with its targets, as text if the corpus and its tokenizer are found."""
    plan, shard = shards.plan, next(iter(shards.records))
    with shards.open(shard) as file:
        targets = file.spec.decode(file.frames(0, 1)[0], 0)
    row = min(EXAMPLE_POSITION, len(targets.entries_per_token) - 1)
    sequence = plan.shard_range(shard)[0]
    tokenizer = find_tokenizer(_places(shards.storage, data), plan.tokenizer_sha256)
    say(f"  example: sequence {sequence}, position {row}")
    if corpus is not None:
        tokens, labels = (rows[0] for rows in corpus.unmasked.read([sequence]))
        before = tokens[max(0, row - 11) : row + 1].tolist()
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
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:MOST_ENTRIES]


@dataclass(frozen=True, kw_only=True)
class CapturedData:
    """What a capture's recipe says of its sequences, unchecked: what they are is judged by their plan's identity.

    The recipe's own class would check it, for a third of the time that all of `inspect` takes. The keys and the values
    that a key not given has are those of `DataConfig`.
    """

    tokens: Path
    seq_len: int
    seed: int = 1234
    documents: str = "joined"
    packing: Any = "cut"

    @classmethod
    def of(cls, section: dict[str, Any]) -> CapturedData:
        """Take what is needed of the section `data`.

        Raises:
            OSError, ValueError, LookupError, TypeError: it names no folder, or is no such section.
        """
        tokens = Path(section["tokens"])
        os.stat(tokens.parent)
        known = {key: section[key] for key in cls.__dataclass_fields__ if key in section}
        return cls(**{**known, "tokens": tokens})


def _captured_data(storage: Storage) -> CapturedData | None:
    """The section `data` of the recipe that the capture left in the cache; None where it leads nowhere."""
    try:
        sections = yaml.load(storage.read("recipe.yaml"), Loader=_LOADER)
        return CapturedData.of(sections["data"])
    except (
        OSError,
        DistillPretrainError,
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
    ):
        return None


def _places(storage: Storage, data: CapturedData | None) -> list[Path]:
    """Folders in which the tokenizer may be."""
    places = [data.tokens.parent] if data else []
    if not is_remote(storage.location):
        folder = Path(storage.location)
        near = sorted(path.parent for path in folder.parent.glob("*/tokens.json"))
        places += [folder, folder.parent, *near]
    return places


def _corpus_of(data: CapturedData | None, plan: CachePlan) -> SequencePlan | None:
    """Open the sequences that were captured, if the capture's recipe leads to the very corpus."""
    if data is None:
        return None
    try:
        corpus = SequencePlan(
            TokenIndex.open(data.tokens),
            seq_len=data.seq_len,
            seed=data.seed,
            document_end=document_end_of(data.documents, data.tokens),
            packing=data.packing,
        )
    except (DistillPretrainError, OSError, ValueError, TypeError):
        return None
    return corpus if corpus.plan_id == plan.sequence_plan_id else None


def _token(tokenizer: TokenNames | None, token_id: int) -> str:
    if token_id < 0:
        return "none"
    return f"{token_id:>7}  {tokenizer.id_to_piece(token_id)!r}" if tokenizer else f"{token_id:>7}"
