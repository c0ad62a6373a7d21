"""Bytes and files of a cache before it is captured, from a pilot or from published curves.

A cache is payload and frame. The frame follows from FORMAT.md; the payload is entries per position times bytes per
entry, and only a pilot on the same kind of teacher and text knows those two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.errors import ConfigError, DistillPretrainError
from distill_pretrain.planning.figures import Basis
from distill_pretrain.sampling.kinds import SAMPLERS

HEADER_AND_FOOTER = 256 + 40
BLOCK_BYTES = 32 + 3.5 + 8 + 32
"""Head, padding to 8 bytes on average, checksum and index row of a block."""
HC_BLOCK_BYTES = 8
RECORD_BYTES = 2 * 390
"""A done record, and its copy in the manifest."""
FIXED_FILES = 5
"""plan.json, extent.json, manifest.json, the tables, recipe.yaml."""

PAPER_IDS = (0.98, 0.64)
"""Unique ids of N draws on the paper's 3B teacher: 0.98 N^0.64 (arXiv 2503.16870, read off a figure)."""
HC_BYTES_PER_ENTRY = {"counts": 1.3, "logprobs": 2.5}
"""Without a pilot: 0.9 to 1.1 and 2.3 to 2.5 were measured on small teachers, V = 2,048 and 32,768 (docs/results)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A kind of targets: sampler, N (or k) and the mass of top-p."""

    sampler: str
    num_draws: int
    top_p: float | None = None

    @property
    def values(self) -> str:
        """What an entry's value is: counts or log-probabilities."""
        return SAMPLERS[self.sampler].values

    def __str__(self) -> str:
        return f"{self.sampler} {self.num_draws}" + (f" at {self.top_p}" if self.top_p else "")


@dataclass(frozen=True, kw_only=True)
class Density:
    """What a position costs: entries and bytes.

    Attributes:
        entries: stored ids per position.
        hc_bytes: payload bytes of an entry under `hc`, without what the frame of a block takes.
        basis: "pilot" where it was measured on this very kind of targets, else "estimate" or "assumption".
        how: where it is from.
    """

    entries: float
    hc_bytes: float
    basis: Basis
    how: str


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What was measured on a small scale, before a capture.

    Attributes:
        densities: kind of targets -> entries and bytes per entry.
        vocab_size: V.
        positions: how many were measured.
        source: file or folder.
        figures: of `inspect --estimators`, one record per sampler; empty for a cache.
    """

    densities: dict[Targets, Density]
    vocab_size: int
    positions: int
    source: Path
    figures: Sequence[dict[str, Any]] = ()

    @classmethod
    def load(cls, path: Path) -> Pilot:
        """Read a finished cache, or the JSON of `inspect --estimators`.

        Raises:
            ConfigError: it is neither.
        """
        if (path / "manifest.json").is_file():
            return cls._of_cache(path)
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            return cls._of_report(path, report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "the pilot cannot be used",
                where="plan.pilot",
                found=f"{path} ({type(error).__name__}: {error})",
                expected="a finished cache, or a file of `inspect --estimators RECIPE --output FILE.json`",
                remedy="capture a small part first (capture.num_sequences=256), or leave plan.pilot out",
            ) from None

    @classmethod
    def _of_cache(cls, folder: Path) -> Pilot:
        from distill_pretrain.cache.reader import CacheReader

        with CacheReader.open(folder) as cache:
            plan, totals, shards = cache.plan, cache.manifest.totals, cache.manifest.shards
        kind = Targets(
            sampler=plan.sampler["name"],
            num_draws=plan.num_draws,
            top_p=plan.sampler.get("top_p"),
        )
        tokens, entries, size = (int(totals[n] or 0) for n in ("tokens", "entries", "bytes"))
        blocks = sum(shard.blocks for shard in shards)
        payload = size - HEADER_AND_FOOTER * len(shards) - BLOCK_BYTES * blocks
        per_entry = (payload - HC_BLOCK_BYTES * blocks) / max(1, entries)
        if not plan.has_tables:
            per_entry = HC_BYTES_PER_ENTRY[kind.values]
        density = Density(
            entries=entries / tokens,
            hc_bytes=per_entry,
            basis="pilot" if plan.has_tables else "assumption",
            how=f"cache {folder}: {entries:,} entries in {tokens:,} positions",
        )
        return cls(
            densities={kind: density}, vocab_size=plan.vocab_size, positions=tokens, source=folder
        )

    @classmethod
    def _of_report(cls, path: Path, report: dict[str, Any]) -> Pilot:
        densities = {}
        for record in report["samplers"]:
            sampler = record["sampler"]
            kind = Targets(
                sampler=sampler["name"], num_draws=sampler["num_draws"], top_p=sampler["top_p"]
            )
            densities[kind] = Density(
                entries=record["unique_ids"],
                hc_bytes=record["hc_bytes"] / record["unique_ids"],
                basis="pilot",
                how=f"{path.name}: {report['positions']:,} positions",
            )
        return cls(
            densities=densities,
            vocab_size=report["vocab_size"],
            positions=report["positions"],
            source=path,
            figures=report["samplers"],
        )

    def density(self, wanted: Targets) -> Density:
        """Return the density of a kind of targets: as measured, or scaled from the nearest N of the same sampler.

        Raises:
            ConfigError: the pilot has no such sampler.
        """
        if wanted in self.densities:
            return self.densities[wanted]
        same = [
            kind
            for kind in self.densities
            if (kind.sampler, kind.top_p) == (wanted.sampler, wanted.top_p)
        ]
        if not same:
            raise ConfigError(
                "the pilot says nothing of this sampler",
                where="plan.pilot, capture.sampler",
                found=", ".join(map(str, self.densities)),
                expected=str(wanted),
                remedy="measure it with `inspect --estimators`, or leave plan.pilot out",
            )
        nearest = min(same, key=lambda k: abs(math.log(k.num_draws / wanted.num_draws)))
        known, ratio = self.densities[nearest], wanted.num_draws / nearest.num_draws
        exponent = PAPER_IDS[1] if wanted.values == "counts" else 1.0
        return Density(
            entries=min(known.entries * ratio**exponent, wanted.num_draws, self.vocab_size),
            hc_bytes=known.hc_bytes,
            basis="estimate",
            how=f"{nearest} of {self.source.name}, entries times ({ratio:.3g})^{exponent}",
        )


def density_without_pilot(targets: Targets) -> Density:
    """Assume the density of the paper's curve; a flatter teacher stores two to three times as many ids."""
    factor, exponent = PAPER_IDS
    sampled = targets.values == "counts"
    entries = factor * targets.num_draws**exponent if sampled else float(targets.num_draws)
    return Density(
        entries=max(1.0, entries),
        hc_bytes=HC_BYTES_PER_ENTRY[targets.values],
        basis="assumption",
        how="no pilot: "
        + ("0.98 N^0.64 ids (the paper's 3B teacher)" if sampled else "k ids")
        + f", {HC_BYTES_PER_ENTRY[targets.values]} B each; flat teachers store two to three times as many",
    )


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """What of a capture's settings decides the frame of its files."""

    num_sequences: int
    seq_len: int
    block_tokens: int
    shard_sequences: int
    vocab_size: int
    codec: str

    @property
    def positions(self) -> int:
        """The number of positions that will be captured."""
        return self.num_sequences * self.seq_len

    @property
    def shards(self) -> int:
        """The number of shard files."""
        return -(-self.num_sequences // self.shard_sequences)

    @property
    def files(self) -> int:
        """The number of all files: shards, their records, and the few others."""
        return 2 * self.shards + FIXED_FILES

    @property
    def blocks(self) -> int:
        """The number of checksummed blocks."""
        return self.num_sequences * -(-self.seq_len // self.block_tokens)


def tables_bytes(geometry: CacheGeometry, targets: Targets) -> int:
    """Return the size of codec-*.bin (FORMAT.md): rank map and code lengths."""
    contexts = 151 if targets.values == "counts" else 116
    return 24 + 4 * geometry.vocab_size + 81 * contexts + 4 if geometry.codec == "hc" else 0


def raw_entry_bytes(vocab_size: int, targets: Targets) -> int:
    """Return the bytes of an entry of the raw codecs (FORMAT.md)."""
    id_bits = max(1, (vocab_size - 1).bit_length())
    if targets.values == "counts":
        return -(-(id_bits + (targets.num_draws - 1).bit_length()) // 8)
    return -(-id_bits // 8) + 2


def shard_bytes(geometry: CacheGeometry, targets: Targets, density: Density) -> float:
    """Return the bytes of all shard files: 296 per shard, 75.5 (hc: 83.5) per block, and the payload of every entry.

    Raw payloads also have a length of 1 byte (2 above N = 255) per position.
    """
    frame = HEADER_AND_FOOTER * geometry.shards + BLOCK_BYTES * geometry.blocks
    entries = density.entries * geometry.positions
    if geometry.codec == "raw":
        lengths = geometry.positions * (1 if targets.num_draws <= 255 else 2)
        return frame + lengths + entries * raw_entry_bytes(geometry.vocab_size, targets)
    return frame + HC_BLOCK_BYTES * geometry.blocks + entries * density.hc_bytes


def cache_bytes(geometry: CacheGeometry, targets: Targets, density: Density) -> float:
    """Return the bytes of the whole folder: shards, records, manifest and tables."""
    others = RECORD_BYTES * geometry.shards + tables_bytes(geometry, targets)
    return shard_bytes(geometry, targets, density) + others


def load_pilot(path: Path | None) -> Pilot | None:
    """Load the pilot of a recipe, if it names one.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Pilot.load(path)
    except ConfigError:
        raise
    except DistillPretrainError as error:
        raise ConfigError("the pilot cannot be used", where="plan.pilot", found=error) from None
