"""The bytes of a shard file: header, frames, index, footer. FORMAT.md is the specification."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.closing import Closing

HEADER_BYTES = 256
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("entries", "<u4"),
        ("zero", "<u8"),
        ("token_hash", "<u8"),
    ]
)

_MAGIC = b"\x89DPT\r\n\x1a\n"
_VERSION = (1, 0)
_ENDIAN = 0x01020304
_HEADER = struct.Struct("<8sHHIIIIHHQQQ32s32s")
_FRAME_MAGIC = 0x314B4C42  # "BLK1"
_FRAME = struct.Struct("<IIIIQQ")
FRAME_HEAD_BYTES = _FRAME.size
_FRAME_END = struct.Struct("<II")
_FOOTER = struct.Struct("<QQIIQ8s")
_END_MAGIC = b"DPT.END\0"


@dataclass(frozen=True)
class Frame:
    """One block as stored; `payload` is a view of the frame's bytes."""

    length: int
    num_tokens: int
    num_entries: int
    token_hash: int
    payload: memoryview


def shard_name(shard: int) -> str:
    """File name of a finished shard."""
    return f"s-{shard:06d}.dpt"


def token_hash(tokens: npt.NDArray[np.int32]) -> int:
    """blake2b-64 (person "dpt-tok") of a block's input ids as little-endian int32."""
    data = np.ascontiguousarray(tokens, "<i4").tobytes()
    digest = hashlib.blake2b(data, digest_size=8, person=b"dpt-tok").digest()
    return int.from_bytes(digest, "little")


def header_bytes(plan: CachePlan, shard: int) -> bytes:
    """The header, implied by the plan; readers compare it byte by byte."""
    first, count = plan.shard_range(shard)
    head = _HEADER.pack(
        _MAGIC,
        *_VERSION,
        _ENDIAN,
        HEADER_BYTES,
        plan.block_tokens,
        plan.vocab_size,
        plan.num_draws,
        plan.codec,
        first,
        count * plan.seq_len,
        plan.shard_blocks(shard),
        bytes.fromhex(plan.plan_id),
        bytes(32),  # a raw codec has no tables
    ).ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def frame_bytes(plan: CachePlan, block: int, targets: RaggedTargets, tokens_hash: int) -> bytes:
    """The frame of one block."""
    payload = plan.raw_codec.encode(targets)
    num_tokens, num_entries = len(targets.entries_per_token), len(targets.ids)
    head = _FRAME.pack(_FRAME_MAGIC, len(payload), num_entries, num_tokens, block, tokens_hash)
    body = head + payload + bytes(-len(payload) % 8)
    return body + _FRAME_END.pack(zlib.crc32(body), 0)


def frame_length(payload_bytes: int) -> int:
    """Bytes of a frame."""
    return _FRAME.size + payload_bytes + -payload_bytes % 8 + _FRAME_END.size


def claimed_length(head: bytes, plan: CachePlan) -> int:
    """Bytes to read for a frame whose head is given; `parse_frame` judges what they hold."""
    if len(head) < FRAME_HEAD_BYTES:
        return 0
    return min(frame_length(_FRAME.unpack(head)[1]), max_frame_length(plan))


def max_frame_length(plan: CachePlan) -> int:
    """Bytes of the largest frame the plan allows."""
    codec, tokens = plan.raw_codec, min(plan.block_tokens, plan.seq_len)
    return frame_length(codec.payload_bytes(tokens, tokens * codec.max_entries_per_token))


def parse_frame(data: memoryview, plan: CachePlan, shard: int, block: int) -> Frame:
    """The frame at the start of `data`, checked in full but for its payload's contents.

    Raises:
        CacheCorrupt: the bytes are not the frame of this block.
    """
    if len(data) < _FRAME.size + _FRAME_END.size:
        raise _corrupt(plan, shard, block, "the block is cut off", f"{len(data)} bytes")
    magic, payload_bytes, entries, tokens, number, tokens_hash = _FRAME.unpack_from(data)
    codec = plan.raw_codec
    size = plan.block_place(shard, block)[2]
    expected_head = magic == _FRAME_MAGIC and number == block and tokens == size
    if (
        not expected_head
        or entries > size * codec.max_entries_per_token
        or payload_bytes != codec.payload_bytes(tokens, entries)
    ):
        found = f"block {number}, {tokens} positions, {entries} entries, {payload_bytes} bytes"
        raise _corrupt(plan, shard, block, "the block's header is wrong", found)
    length = frame_length(payload_bytes)
    if len(data) < length:
        found = f"{len(data)} of {length} bytes"
        raise _corrupt(plan, shard, block, "the block is cut off", found)
    checksum, zero = _FRAME_END.unpack_from(data, length - _FRAME_END.size)
    if zero != 0 or zlib.crc32(data[: length - _FRAME_END.size]) != checksum:
        raise _corrupt(plan, shard, block, "the block's checksum is wrong", "changed bytes")
    payload = data[_FRAME.size : _FRAME.size + payload_bytes]
    return Frame(length, tokens, entries, tokens_hash, payload)


def decode_frame(frame: Frame, plan: CachePlan, shard: int, block: int) -> RaggedTargets:
    """Targets of a block.

    Raises:
        CacheCorrupt: the payload breaks the codec's rules.
    """
    try:
        return plan.raw_codec.decode(frame.payload, frame.num_tokens, frame.num_entries)
    except CacheCorrupt as error:
        raise _corrupt(plan, shard, block, "the block's payload is wrong", error) from None


def closing_bytes(index: npt.NDArray[np.void]) -> bytes:
    """Index and footer of a shard whose frames end where the index says."""
    table = index.tobytes()
    offset = int(index["offset"][-1]) + int(index["length"][-1])
    head = struct.pack("<QQI", offset, len(index), zlib.crc32(table))
    tail = struct.pack("<Q8s", offset + len(table) + _FOOTER.size, _END_MAGIC)
    return table + head + struct.pack("<I", zlib.crc32(head + tail)) + tail


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """Positioned read; fewer bytes only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class ShardFile(Closing):
    """A finished shard, open for positioned reads.

    Attributes:
        shard: number.
        size: bytes of the file.
        index: INDEX_DTYPE[blocks].
    """

    def __init__(self, path: Path, plan: CachePlan, shard: int) -> None:
        """Open and check header, footer and index.

        Raises:
            CacheCorrupt: one of them is damaged or of another plan.
            OSError: the file cannot be opened.
        """
        self.path, self.plan, self.shard = path, plan, shard
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.fstat(self.fd).st_size
            self.index = self._load_index()
        except BaseException:
            self.close()
            raise

    def frames(self, first: int, count: int) -> list[Frame]:
        """Frames of `count` blocks from `first`, in one read.

        Raises:
            CacheCorrupt: a frame is damaged or contradicts the index.
        """
        rows = self.index[first : first + count]
        start = int(rows["offset"][0])
        length = int(rows["length"].sum(dtype=np.int64))
        data = memoryview(read_exactly(self.fd, length, start))
        frames, position = [], 0
        for block, row in enumerate(rows, start=first):
            size = int(row["length"])
            frame = parse_frame(data[position : position + size], self.plan, self.shard, block)
            stored = (frame.length, frame.num_entries, frame.token_hash)
            if stored != (size, int(row["entries"]), int(row["token_hash"])):
                what = "the block contradicts the index"
                raise _corrupt(self.plan, self.shard, block, what, stored)
            frames.append(frame)
            position += size
        return frames

    def close(self) -> None:
        """Close the file; further reads fail."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _load_index(self) -> npt.NDArray[np.void]:
        blocks = self.plan.shard_blocks(self.shard)
        closing = blocks * INDEX_DTYPE.itemsize + _FOOTER.size
        if self.size < HEADER_BYTES + closing:
            raise self._damaged("the shard is cut off", f"{self.size} bytes")
        if read_exactly(self.fd, HEADER_BYTES, 0) != header_bytes(self.plan, self.shard):
            raise self._damaged("the header is damaged or of another plan", "other bytes")
        data = read_exactly(self.fd, closing, self.size - closing)
        table, footer = data[: -_FOOTER.size], data[-_FOOTER.size :]
        if len(data) != closing:
            raise self._damaged("the shard shrank while it was opened", f"{self.size} bytes")
        offset, stored_blocks, table_crc, footer_crc, length, magic = _FOOTER.unpack(footer)
        if magic != _END_MAGIC or zlib.crc32(footer[:20] + footer[24:]) != footer_crc:
            raise self._damaged("the footer is damaged", "changed bytes, or a cut-off file")
        if (stored_blocks, length, offset) != (blocks, self.size, self.size - closing):
            found = f"{stored_blocks} blocks, {length} bytes"
            raise self._damaged("the footer contradicts the file", found)
        if zlib.crc32(table) != table_crc:
            raise self._damaged("the index is damaged", "changed bytes")
        index = np.frombuffer(table, INDEX_DTYPE)
        starts, sizes = index["offset"].astype(np.int64), index["length"].astype(np.int64)
        ends = starts + sizes
        contiguous = (
            starts[0] == HEADER_BYTES
            and ends[-1] == offset
            and np.array_equal(starts[1:], ends[:-1])
            and not index["zero"].any()
            and int(sizes.max()) <= max_frame_length(self.plan)
        )
        if not contiguous:
            raise self._damaged("the index does not cover the blocks", "gaps or wrong lengths")
        return index

    def _damaged(self, what: str, found: str) -> CacheCorrupt:
        first, count = self.plan.shard_range(self.shard)
        return CacheCorrupt(
            what,
            where=f"shard {self.shard} (sequences {first} to {first + count - 1}), {self.path}",
            found=found,
            remedy=RECAPTURE,
        )


RECAPTURE = "run `distill-pretrain verify` for the full list, then recapture those sequences"


def block_where(plan: CachePlan, shard: int, block: int) -> str:
    """How messages name a block."""
    sequence, offset, _ = plan.block_place(shard, block)
    return f"shard {shard}, block {block} (sequence {sequence}, offset {offset})"


def _corrupt(plan: CachePlan, shard: int, block: int, what: str, found: object) -> CacheCorrupt:
    return CacheCorrupt(what, where=block_where(plan, shard, block), found=found, remedy=RECAPTURE)
