"""The bytes of a shard file: header, frames, index, footer. FORMAT.md is the specification."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.registry import BlockCodec
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt
from distill_pretrain.files.closing import Closing
from distill_pretrain.files.storage import RangeFile

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
_CHUNK_BYTES = 1 << 20
_TOKEN_DTYPE = np.dtype("<i4")


class Frame(NamedTuple):
    """One block as stored; `payload` is a view of the frame's bytes."""

    length: int
    num_tokens: int
    num_entries: int
    token_hash: int
    payload: memoryview


def token_hash(tokens: npt.NDArray[np.int32]) -> int:
    """Return the blake2b-64 (person "dpt-tok") of a block's input ids as little-endian int32."""
    data = np.ascontiguousarray(tokens, _TOKEN_DTYPE).tobytes()
    digest = hashlib.blake2b(data, digest_size=8, person=b"dpt-tok").digest()
    return int.from_bytes(digest, "little")


def frame_length(payload_bytes: int) -> int:
    """Return the bytes of a frame."""
    return FRAME_HEAD_BYTES + payload_bytes + -payload_bytes % 8 + _FRAME_END.size


@dataclass(frozen=True)
class ShardSpec:
    """What a shard's bytes must be, as the plan and the codec imply it.

    Attributes:
        plan: of the cache.
        shard: number.
        codec: encodes and decodes its blocks.
    """

    plan: CachePlan
    shard: int
    codec: BlockCodec

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the shard."""
        return self.plan.shard_blocks(self.shard)

    @cached_property
    def header(self) -> bytes:
        """The header of the shard; readers compare it byte by byte."""
        plan = self.plan
        first, count = plan.shard_range(self.shard)
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
            self.num_blocks,
            bytes.fromhex(plan.plan_id),
            bytes.fromhex(self.codec.tables_sha256 or "00" * 32),
        ).ljust(HEADER_BYTES - 4, b"\0")
        return head + struct.pack("<I", zlib.crc32(head))

    @cached_property
    def max_frame_length(self) -> int:
        """The bytes of the largest frame that the plan allows."""
        tokens = min(self.plan.block_tokens, self.plan.seq_len)
        entries = tokens * self.plan.max_entries_per_token
        return frame_length(self.codec.payload_bounds(tokens, entries)[1])

    def frame_bytes(self, block: int, targets: RaggedTargets, tokens_hash: int) -> bytes:
        """Return the frame of one block, as it is stored."""
        payload = self.codec.encode(targets)
        num_tokens, num_entries = len(targets.entries_per_token), len(targets.ids)
        head = _FRAME.pack(_FRAME_MAGIC, len(payload), num_entries, num_tokens, block, tokens_hash)
        body = head + payload + bytes(-len(payload) % 8)
        return body + _FRAME_END.pack(zlib.crc32(body), 0)

    def claimed_length(self, head: bytes) -> int:
        """Return the bytes to read for a frame whose head is given; `parse` judges what they hold."""
        if len(head) < FRAME_HEAD_BYTES:
            return 0
        return min(frame_length(_FRAME.unpack(head)[1]), self.max_frame_length)

    def parse(self, data: memoryview, block: int) -> Frame:
        """Parse the frame at the start of `data`, checked in full but for its payload's contents.

        Raises:
            CacheCorrupt: the bytes are not the frame of this block.
        """
        if len(data) < FRAME_HEAD_BYTES + _FRAME_END.size:
            raise self._corrupt(block, "the block is cut off", f"{len(data)} bytes")
        magic, payload_bytes, entries, tokens, number, tokens_hash = _FRAME.unpack_from(data)
        size = self.plan.block_size(block)
        sound = (
            magic == _FRAME_MAGIC
            and number == block
            and tokens == size
            and entries <= size * self.plan.max_entries_per_token
        )
        if not sound:
            found = f"block {number}, {tokens} positions, {entries} entries, {payload_bytes} bytes"
            raise self._corrupt(block, "the block's header is wrong", found)
        length = frame_length(payload_bytes)
        if len(data) < length:
            found = f"{len(data)} of {length} bytes"
            raise self._corrupt(block, "the block is cut off", found)
        checksum, zero = _FRAME_END.unpack_from(data, length - _FRAME_END.size)
        if zero != 0 or zlib.crc32(data[: length - _FRAME_END.size]) != checksum:
            raise self._corrupt(block, "the block's checksum is wrong", "changed bytes")
        if bytes(data[FRAME_HEAD_BYTES + payload_bytes : length - _FRAME_END.size]).strip(b"\0"):
            raise self._corrupt(block, "the block's padding is not zero", "changed bytes")
        payload = data[FRAME_HEAD_BYTES : FRAME_HEAD_BYTES + payload_bytes]
        return Frame(length, tokens, entries, tokens_hash, payload)

    def decode(self, frame: Frame, block: int) -> RaggedTargets:
        """Decode the targets of a block.

        Raises:
            CacheCorrupt: the payload breaks the codec's rules.
        """
        try:
            return self.codec.decode(frame.payload, frame.num_tokens, frame.num_entries)
        except CacheCorrupt as error:
            raise self._corrupt(block, "the block's payload is wrong", error) from None

    def where(self, block: int) -> str:
        """Name a block for messages."""
        sequence, offset, _ = self.plan.block_place(self.shard, block)
        return f"shard {self.shard}, block {block} (sequence {sequence}, offset {offset})"

    def _corrupt(self, block: int, what: str, found: object) -> CacheCorrupt:
        return CacheCorrupt(what, where=self.where(block), found=found, remedy=RECAPTURE)


def closing_bytes(index: npt.NDArray[np.void]) -> bytes:
    """Return index and footer of a shard whose frames end where the index says."""
    table = index.tobytes()
    offset = int(index["offset"][-1]) + int(index["length"][-1])
    head = struct.pack("<QQI", offset, len(index), zlib.crc32(table))
    tail = struct.pack("<Q8s", offset + len(table) + _FOOTER.size, _END_MAGIC)
    return table + head + struct.pack("<I", zlib.crc32(head + tail)) + tail


class ShardFile(Closing):
    """A finished shard, open for positioned reads.

    Attributes:
        spec: plan, number and codec.
        size: bytes of the file.
        index: INDEX_DTYPE[blocks].
    """

    def __init__(self, file: RangeFile, spec: ShardSpec, where: str) -> None:
        """Check header, footer and index of a file, which is closed with this object.

        Raises:
            CacheCorrupt: one of them is damaged or of another plan.
        """
        self.spec, self.size = spec, file.size
        self._file, self._where = file, where
        try:
            self.index = self._load_index()
        except BaseException:
            self.close()
            raise

    def frames(self, first: int, count: int) -> list[Frame]:
        """Read the frames of `count` blocks from `first`, at once.

        Raises:
            CacheCorrupt: a frame is damaged or contradicts the index.
        """
        offsets, lengths, entries, hashes = self._rows
        start = offsets[first]
        last = first + count - 1
        data = memoryview(self._file.read(offsets[last] + lengths[last] - start, start))
        frames = []
        for block in range(first, first + count):
            begin, size = offsets[block] - start, lengths[block]
            frame = self.spec.parse(data[begin : begin + size], block)
            stored = (frame.length, frame.num_entries, frame.token_hash)
            if stored != (size, entries[block], hashes[block]):
                raise CacheCorrupt(
                    "the block contradicts the index",
                    where=self.spec.where(block),
                    found=stored,
                    remedy=RECAPTURE,
                )
            frames.append(frame)
        return frames

    def sha256(self) -> str:
        """Return the hex digest of the whole file."""
        digest, offset = hashlib.sha256(), 0
        while data := self._file.read(_CHUNK_BYTES, offset):
            digest.update(data)
            offset += len(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file; further reads fail."""
        self._file.close()

    @cached_property
    def _rows(self) -> tuple[list[int], ...]:
        """Columns of the index as Python numbers, several times faster to look up one by one."""
        names = ("offset", "length", "entries", "token_hash")
        return tuple(self.index[name].tolist() for name in names)

    def _load_index(self) -> npt.NDArray[np.void]:
        blocks = self.spec.num_blocks
        closing = blocks * INDEX_DTYPE.itemsize + _FOOTER.size
        if self.size < HEADER_BYTES + closing:
            raise self._damaged("the shard is cut off", f"{self.size} bytes")
        if self._file.read(HEADER_BYTES, 0) != self.spec.header:
            raise self._damaged("the header is damaged or of another plan", "other bytes")
        data = self._file.read(closing, self.size - closing)
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
            and int(sizes.max()) <= self.spec.max_frame_length
        )
        if not contiguous:
            raise self._damaged("the index does not cover the blocks", "gaps or wrong lengths")
        return index

    def _damaged(self, what: str, found: str) -> CacheCorrupt:
        shard = self.spec.shard
        first, count = self.spec.plan.shard_range(shard)
        return CacheCorrupt(
            what,
            where=f"shard {shard} (sequences {first} to {first + count - 1}), {self._where}",
            found=found,
            remedy=RECAPTURE,
        )


RECAPTURE = "run `distill-pretrain verify` for the full list, then recapture those sequences"
