"""The block codecs: their numbers, and the object that encodes and decodes for a plan."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.sampling.kinds import SAMPLERS

CodecName = Literal["raw", "hc"]


class CodecEntry(NamedTuple):
    """One codec number of FORMAT.md."""

    name: CodecName
    kind: TargetKind


CODECS: dict[int, CodecEntry] = {
    1: CodecEntry("raw", "counts"),
    2: CodecEntry("raw", "logprobs"),
    3: CodecEntry("hc", "counts"),
    4: CodecEntry("hc", "logprobs"),
}


def codec_number(name: CodecName, sampler: str) -> int:
    """Return the number of the codec that stores what a sampler yields."""
    wanted = CodecEntry(name, SAMPLERS[sampler].values)
    return next(number for number, entry in CODECS.items() if entry == wanted)


class BlockCodec(Protocol):
    """Encodes and decodes the targets of one block."""

    @property
    def tables_sha256(self) -> str | None:
        """The hex digest of the codec's tables; None for a codec without."""

    def encode(self, targets: RaggedTargets) -> bytes:
        """Encode the targets of one block."""

    def decode(
        self, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> RaggedTargets:
        """Decode the targets of one block; raise CacheCorrupt if a rule of the format is broken."""

    def payload_bounds(self, num_tokens: int, num_entries: int) -> tuple[int, int]:
        """Return the least and the most bytes that a payload of so many positions and entries can have."""
