"""What the caches of a capture take on disk, and the samplers of a pilot side by side."""

from __future__ import annotations

from typing import Any

from distill_pretrain.jobs.plan.corpus import Corpus
from distill_pretrain.planning.cache_size import (
    CacheGeometry,
    Density,
    Pilot,
    Targets,
    cache_bytes,
    density_without_pilot,
    tables_bytes,
)
from distill_pretrain.planning.figures import (
    Basis,
    Figure,
    Part,
    Table,
    quantity,
)
from distill_pretrain.teacher.config import CaptureConfig


class StoredTargets:
    """The caches of a capture: kind of targets -> bytes."""

    def __init__(self, geometry: CacheGeometry, kinds: dict[str, tuple[Targets, Density]]) -> None:
        self.geometry = geometry
        self.kinds = kinds

    @classmethod
    def of(cls, capture: CaptureConfig, corpus: Corpus, pilot: Pilot | None) -> StoredTargets:
        """Take sizes by the pilot's densities, or by assumed ones where there is none."""
        geometry = CacheGeometry(
            num_sequences=capture.num_sequences or corpus.num_sequences,
            seq_len=corpus.seq_len,
            block_tokens=capture.block_tokens,
            shard_sequences=capture.shard_sequences,
            vocab_size=corpus.vocab_size,
            codec=capture.codec,
        )
        kinds = {}
        for folder, kept in capture.targets.items():
            wanted = Targets(sampler=kept.sampler, num_draws=kept.num_draws, top_p=kept.top_p)
            density = pilot.density(wanted) if pilot else density_without_pilot(wanted)
            kinds[str(folder)] = (wanted, density)
        return cls(geometry, kinds)

    def size(self, folder: str) -> float:
        """Return the bytes of one cache."""
        return cache_bytes(self.geometry, *self.kinds[folder])

    @property
    def total(self) -> float:
        """The bytes of all caches."""
        return sum(map(self.size, self.kinds))

    @property
    def largest_per_position(self) -> float:
        """The bytes per position of the largest cache: a student reads one of them."""
        return max(map(self.size, self.kinds)) / self.geometry.positions

    @property
    def basis(self) -> Basis:
        """The weakest basis of the densities."""
        order: list[Basis] = ["assumption", "estimate", "pilot"]
        return min((density.basis for _, density in self.kinds.values()), key=order.index)

    def part(self) -> Part:
        """Return the part of the plan with entries, bytes and files of every cache."""
        figures = [
            Figure(
                name="positions",
                value=self.geometry.positions,
                unit="tokens",
                basis="exact",
                how=f"{self.geometry.num_sequences:,} sequences x {self.geometry.seq_len:,}",
            ),
            Figure(
                name="files",
                value=self.geometry.files * len(self.kinds),
                basis="exact",
                how=f"2 x {self.geometry.shards:,} shards and their records + 5, per cache",
            ),
        ]
        for folder, (targets, density) in self.kinds.items():
            size = self.size(folder)
            figures += [
                Figure(
                    name=f"entries per position, {targets}",
                    value=density.entries,
                    basis=density.basis,
                    how=density.how,
                ),
                Figure(
                    name=f"bytes per position, {targets}",
                    value=size / self.geometry.positions,
                    unit="bytes",
                    basis=density.basis,
                    how=self._bytes_how(targets, density),
                ),
                Figure(
                    name=f"cache {folder}",
                    value=size,
                    unit="B",
                    basis=density.basis,
                    how=f"bytes per position x positions; shards of {quantity(size / self.geometry.shards, 'B')}",
                ),
            ]
        return Part(title="Cache", figures=figures)

    def _bytes_how(self, targets: Targets, density: Density) -> str:
        if self.geometry.codec == "raw":
            return "fixed-width entries, frames and records (FORMAT.md)"
        tables = quantity(tables_bytes(self.geometry, targets), "B")
        bits = 8 * density.hc_bytes
        return f"{bits:.2f} bits per entry + frames, records, tables of {tables}"


def samplers_part(pilot: Pilot, geometry: CacheGeometry, capture: CaptureConfig) -> Part:
    """Return the part on every sampler that the pilot measured: bias, variance, and what its cache would take."""
    rows = []
    for record, (targets, density) in zip(pilot.figures, pilot.densities.items(), strict=True):
        size = cache_bytes(geometry, targets, density)
        renormalised = record.get("error_renormalised")
        rows.append(
            (
                str(targets),
                f"{record['error']:.3g}",
                "" if renormalised is None else f"{renormalised:.3g}",
                _bias(record),
                f"{density.entries:.1f}",
                f"{size / geometry.positions:.1f}",
                quantity(size, "B"),
            )
        )
    table = Table(
        columns=("sampler", "error", "renormalised", "bias", "ids", "bytes/position", "cache"),
        rows=tuple(rows),
        how=f"error: E||target - t||^2 per position, all variance for the unbiased samplers; bias: L1; "
        f"{pilot.positions:,} positions of {pilot.source}; cache: this recipe's sequences, codec {capture.codec}",
    )
    return Part(title="Samplers on the pilot", tables=[table])


def _bias(record: dict[str, Any]) -> str:
    bias = float(record["bias"])
    return "0" if bias < 1e-4 else f"{bias:.3g}"
