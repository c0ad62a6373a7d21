"""plan.json: everything that decides what a cache holds but its extent. Its sha256 is the plan id."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from distill_pretrain.cache.codec.registry import CODECS, CodecName, codec_number
from distill_pretrain.contracts import TargetKind
from distill_pretrain.errors import CacheCorrupt, CacheError
from distill_pretrain.files.atomic import canonical_json
from distill_pretrain.sampling.kinds import SAMPLERS

FORMAT_NAME = "distill-pretrain-cache"
FORMAT_VERSION = 1

_SAMPLER_KEYS = {"name": str, "num_draws": int, "temperature": float, "seed": int, "rng": str}
# A sampler has its own settings and no other's: plans keep the bytes they had before another sampler came.
_KEYS_OF_SAMPLER: dict[str, dict[str, type]] = {
    name: {**_SAMPLER_KEYS, **dict.fromkeys(kind.own_settings, float)}
    for name, kind in SAMPLERS.items()
}
_CODEC_NAMES: tuple[CodecName, ...] = ("raw", "hc")
MOST_SEQUENCES = 1 << 40
_BOUNDS = {
    "vocab_size": (2, 1 << 20),
    "seq_len": (1, 1 << 24),
    "num_sequences": (1, MOST_SEQUENCES),
    "micro_batch_size": (1, 1 << 20),
    "block_tokens": (1, 1 << 16),
    "shard_sequences": (1, 1 << 20),
}


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Immutable description of a cache; equal plans give byte-identical caches on equal hardware.

    Attributes:
        sequence_plan_id: SequencePlan.plan_id of the sequences that were scored.
        tokens: {"bin_sha256", "idx_sha256"} of the corpus.
        tokenizer_sha256: of the tokenizer, or None when the corpus came without one.
        vocab_size: V, 2 to 2**20.
        seq_len: positions per sequence.
        num_sequences: the first so many sequences of the sequence plan. The extent of a cache can
            grow, so it is no part of plan.json, of the plan id or of what a shard's bytes say.
        sampler: {"name", "num_draws", "temperature": 1.0, "seed", "rng"}, and the sampler's own settings.
        teacher: the engine's identity (JSON-able).
        micro_batch_size: sequences per teacher forward pass.
        block_tokens: most positions per block, at most 65536.
        shard_sequences: sequences per shard file.
        codec: number of the block codec, see `cache.codec.registry`.
        codec_sha256: of the codec's tables; None for a codec without tables, and in a plan whose
            tables have not been made yet.
        software: package -> version.
    """

    sequence_plan_id: str
    tokens: dict[str, Any]
    tokenizer_sha256: str | None
    vocab_size: int
    seq_len: int
    num_sequences: int
    sampler: dict[str, Any]
    teacher: dict[str, Any]
    micro_batch_size: int
    block_tokens: int
    shard_sequences: int
    codec: int
    codec_sha256: str | None = None
    software: dict[str, str]

    def __post_init__(self) -> None:
        """Refuse values that no cache can have (CacheError)."""
        problems = _problems(self)
        if problems:
            raise CacheError(
                "the plan of a cache is invalid",
                found="; ".join(problems),
                remedy="correct the recipe sections data and capture",
            )

    @property
    def num_draws(self) -> int:
        """N of the sampler (the k of top-k)."""
        return int(self.sampler["num_draws"])

    @property
    def kind(self) -> TargetKind:
        """What an entry's value is: a count of draws, or a log-probability."""
        return CODECS[self.codec].kind

    @property
    def has_tables(self) -> bool:
        """Whether the codec needs tables made from a pilot."""
        return CODECS[self.codec].name == "hc"

    @property
    def max_entries_per_token(self) -> int:
        """The most entries of a position: min(N, V)."""
        return min(self.num_draws, self.vocab_size)

    @cached_property
    def plan_id(self) -> str:
        """The hex sha256 of the bytes of plan.json."""
        return hashlib.sha256(self.to_json_bytes()).hexdigest()

    @property
    def num_shards(self) -> int:
        """The number of shard files of the whole cache."""
        return -(-self.num_sequences // self.shard_sequences)

    @cached_property
    def blocks_per_sequence(self) -> int:
        """The number of blocks of one sequence; the last may be shorter than `block_tokens`."""
        return -(-self.seq_len // self.block_tokens)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return (first sequence, number of sequences) of a shard."""
        assert 0 <= shard < self.num_shards, shard
        first = shard * self.shard_sequences
        return first, min(self.shard_sequences, self.num_sequences - first)

    def shard_blocks(self, shard: int) -> int:
        """Return the number of blocks of a shard."""
        return self.shard_range(shard)[1] * self.blocks_per_sequence

    def block_place(self, shard: int, block: int) -> tuple[int, int, int]:
        """Return (sequence, offset of the first position, number of positions) of a shard's block."""
        row, part = divmod(block, self.blocks_per_sequence)
        first = self.shard_range(shard)[0]
        return first + row, part * self.block_tokens, self.block_size(block)

    def block_size(self, block: int) -> int:
        """Return the number of positions of a shard's block."""
        part = block % self.blocks_per_sequence
        return min(self.block_tokens, self.seq_len - part * self.block_tokens)

    def to_json_bytes(self) -> bytes:
        """Return the contents of plan.json, canonical JSON."""
        values = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(self)}
        del values["num_sequences"]
        return canonical_json(values)

    @classmethod
    def from_json_bytes(cls, data: bytes, *, num_sequences: int) -> CachePlan:
        """Parse plan.json.

        Args:
            data: its bytes.
            num_sequences: extent of the cache, from its manifest or extent.json.

        Raises:
            CacheCorrupt: no JSON, not canonical, another version, or an invalid field.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _bad_plan(f"no valid JSON ({error})") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT_NAME:
            raise _bad_plan("not the plan of a cache")
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise _bad_plan(f"format version {version!r}, this program reads {FORMAT_VERSION}")
        names = {field.name for field in fields(cls)} - {"num_sequences"}
        if set(values) != names:
            raise _bad_plan(f"fields {sorted(set(values) ^ names)} are missing or unknown")
        try:
            plan = cls(**values, num_sequences=num_sequences)
            canonical = plan.to_json_bytes()
        except (CacheError, ValueError, RecursionError) as error:
            raise _bad_plan(str(error)) from None
        if plan.has_tables and plan.codec_sha256 is None:
            raise _bad_plan("no codec_sha256, though the codec has tables")
        if canonical != data:
            raise _bad_plan("the bytes are not the canonical form")
        return plan

    def with_tables(self, codec_sha256: str) -> CachePlan:
        """Return the same plan with the codec's tables named."""
        return replace(self, codec_sha256=codec_sha256)

    def with_extent(self, num_sequences: int) -> CachePlan:
        """Return the same contents for another number of sequences (CacheError if that is impossible)."""
        return replace(self, num_sequences=num_sequences)

    def differences(self, other: CachePlan) -> list[str]:
        """Say, in a line each, in which fields of plan.json `self` (found) differs from `other` (expected)."""
        return _differences("", asdict(self), asdict(other.with_extent(self.num_sequences)))

    def joining(self, stored: CachePlan) -> CachePlan:
        """Return this plan as the cache it joins would say it.

        That is with the cache's tables, if it has none of its own, and with the cache's name of the tokenizer, if the
        corpus is the same: the teacher sees ids, whatever the tokenizer's files say beside them.

        Plans of earlier versions list every file of the teacher's folder that might hold weights, read or not: they
        are joined where all that are read now are the same.
        """
        plan = self
        if plan.tokens == stored.tokens:
            plan = replace(plan, tokenizer_sha256=stored.tokenizer_sha256)
        mine, theirs = self.teacher.get("files"), stored.teacher.get("files")
        if isinstance(mine, dict) and isinstance(theirs, dict) and mine.items() <= theirs.items():
            plan = replace(plan, teacher={**self.teacher, "files": theirs})
        if self.codec_sha256 is None and self.codec == stored.codec:
            plan = replace(plan, codec_sha256=stored.codec_sha256)
        return plan


def _differences(prefix: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        mine, theirs = found.get(key), expected.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            lines += _differences(f"{prefix}{key}.", mine, theirs)
        elif mine != theirs:
            lines.append(f"{prefix}{key}: found {mine!r}, expected {theirs!r}")
    return lines


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(plan: CachePlan) -> list[str]:
    problems = []
    for name, (low, high) in _BOUNDS.items():
        value = getattr(plan, name)
        if not _is_int(value) or not low <= value <= high:
            problems.append(f"{name} is {value!r}, expected {low} to {high}")
    if not isinstance(plan.sequence_plan_id, str):
        problems.append("sequence_plan_id is no string")
    if not (plan.tokenizer_sha256 is None or isinstance(plan.tokenizer_sha256, str)):
        problems.append("tokenizer_sha256 is no string")
    for name in ("tokens", "teacher", "software", "sampler"):
        if not isinstance(getattr(plan, name), dict):
            problems.append(f"{name} is no object")
    if problems:
        return problems
    sampler = plan.sampler.get("name")
    keys = _KEYS_OF_SAMPLER.get(sampler) if isinstance(sampler, str) else None
    if keys is None:
        return [f"sampler.name is {sampler!r}, expected one of {sorted(_KEYS_OF_SAMPLER)}"]
    if set(plan.sampler) != set(keys):
        return [f"sampler has the keys {sorted(plan.sampler)}, expected {sorted(keys)}"]
    for name, kind in keys.items():
        value = plan.sampler[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            problems.append(f"sampler.{name} is {value!r}, expected {kind.__name__}")
    if problems:
        return problems
    if not 1 <= plan.sampler["num_draws"] <= 1024:
        problems.append(f"sampler.num_draws is {plan.sampler['num_draws']}, expected 1 to 1024")
    if plan.sampler["temperature"] != 1.0:
        problems.append(f"sampler.temperature is {plan.sampler['temperature']}, expected 1.0")
    if not 0 < plan.sampler.get("top_p", 0.5) < 1:
        problems.append(
            f"sampler.top_p is {plan.sampler['top_p']}, expected more than 0, less than 1"
        )
    possible = [codec_number(name, plan.sampler["name"]) for name in _CODEC_NAMES]
    if not _is_int(plan.codec) or plan.codec not in possible:
        problems.append(f"codec is {plan.codec!r}, expected {possible} for sampler {sampler}")
        return problems
    digest = plan.codec_sha256
    if digest is not None and not (plan.has_tables and is_sha256(digest)):
        problems.append(f"codec_sha256 is {digest!r}")
    return problems


def is_sha256(value: object) -> bool:
    """Say whether a value is a lower-case hex sha256; digests become parts of file names."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _bad_plan(found: str) -> CacheCorrupt:
    return CacheCorrupt(
        "the cache's plan.json cannot be used",
        found=found,
        expected=f"{FORMAT_NAME} version {FORMAT_VERSION}, as `distill-pretrain capture` writes",
        remedy="restore plan.json from a copy, or capture into a new folder",
    )
