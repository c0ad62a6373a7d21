"""Reading a finished cache, with every check on."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheIncomplete, CacheMismatch
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_writer import MANIFEST_NAME, PLAN_NAME, sequence_ranges
from distill_pretrain.formats.closing import Closing
from distill_pretrain.formats.manifest import Manifest
from distill_pretrain.formats.shard import (
    ShardFile,
    block_where,
    decode_frame,
    shard_name,
    token_hash,
)


class CacheReader(Closing):
    """A finished cache; not for use by several threads at once.

    Attributes:
        folder: of the cache.
        plan: what it holds.
        manifest: its shards.
        manifest_sha256: hex digest of manifest.json, the cache's identity.
    """

    def __init__(self, folder: Path, plan: CachePlan, manifest: Manifest, max_open: int) -> None:
        """Use `CacheReader.open`."""
        self.folder = folder
        self.plan = plan
        self.manifest = manifest
        self.manifest_sha256 = hashlib.sha256(manifest.to_json_bytes()).hexdigest()
        self._max_open = max_open
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    @classmethod
    def open(cls, folder: Path, *, max_open: int = 16) -> CacheReader:
        """Open a cache.

        Args:
            folder: of the cache.
            max_open: most shard files kept open.

        Raises:
            CacheIncomplete: no plan, no manifest, or a shard file is missing; names the sequences.
            CacheCorrupt: plan, manifest or the size of a shard is wrong.
        """
        folder = Path(folder)
        plan = load_plan(folder)
        try:
            data = (folder / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            raise _unfinished(folder, plan) from None
        manifest = Manifest.from_json_bytes(data, plan)
        missing = []
        for record in manifest.shards:
            path = folder / shard_name(record.shard)
            if not path.exists():
                missing.append(record.shard)
            elif path.stat().st_size != record.size:
                raise CacheCorrupt(
                    "a shard has the wrong size",
                    where=f"{path}, sequences {sequence_ranges(plan, [record.shard])}",
                    found=f"{path.stat().st_size} bytes",
                    expected=f"{record.size} bytes",
                    remedy="copy the shard again, or recapture its sequences",
                )
        if missing:
            raise CacheIncomplete(
                "shard files of the cache are missing",
                where=folder,
                found=f"no {', '.join(map(shard_name, missing[:4]))}"
                f"{' ...' if len(missing) > 4 else ''}: sequences {sequence_ranges(plan, missing)}",
                remedy="copy the files again, or run `distill-pretrain capture` again",
            )
        return cls(folder, plan, manifest, max_open)

    def check_matches(
        self,
        *,
        sequence_plan_id: str | None = None,
        vocab_size: int | None = None,
        seq_len: int | None = None,
        tokenizer_sha256: str | None = None,
        tokens: dict[str, Any] | None = None,
        num_sequences: int | None = None,
    ) -> None:
        """Raise CacheMismatch, listing every difference, unless the run fits the cache.

        Args:
            sequence_plan_id: SequencePlan.plan_id of the run.
            vocab_size: V of the run.
            seq_len: L of the run.
            tokenizer_sha256: of the run's tokenizer; not compared when either side has none.
            tokens: the run's {"bin_sha256", "idx_sha256"}; other keys are not compared.
            num_sequences: sequences the run wants to read.
        """
        plan = self.plan
        lines = []
        if tokens is not None:
            for key in ("bin_sha256", "idx_sha256"):
                lines += _differ(
                    f"another corpus (tokens.{key})",
                    plan.tokens.get(key),
                    tokens.get(key),
                    "set data.tokens to the corpus the teacher saw, or recapture",
                )
        if tokenizer_sha256 is not None and plan.tokenizer_sha256 is not None:
            lines += _differ(
                "another tokenizer (tokenizer_sha256)",
                plan.tokenizer_sha256,
                tokenizer_sha256,
                "use the tokenizer the teacher saw, or recapture",
            )
        remedy = "set {} to the cache's value, or recapture"
        if vocab_size is not None:
            advice = remedy.format("data.vocab_size")
            lines += _differ("another vocabulary (vocab_size)", plan.vocab_size, vocab_size, advice)
        if seq_len is not None:
            advice = remedy.format("data.seq_len")
            lines += _differ("another seq_len", plan.seq_len, seq_len, advice)
        if sequence_plan_id is not None and not lines:
            # With the same corpus and seq_len only the seed is left to differ.
            lines += _differ(
                "another order of documents (sequence_plan_id)",
                plan.sequence_plan_id,
                sequence_plan_id,
                "set data.seed to the value of the capture, or recapture",
            )
        if num_sequences is not None and num_sequences > plan.num_sequences:
            lines.append(
                f"too few sequences (num_sequences): the cache has {plan.num_sequences}, the run "
                f"needs {num_sequences}; lower data.num_sequences, or recapture"
            )
        if lines:
            raise CacheMismatch(
                "the cache was made from something else than this run uses",
                where=self.folder,
                found="\n  " + "\n  ".join(lines) + "\n",
                remedy="as listed, or set data.cache to another cache",
            )

    def read(self, sequence: int, tokens: npt.NDArray[np.int32]) -> RaggedTargets:
        """Targets of one sequence, if its tokens are those the teacher saw.

        Args:
            sequence: number in the plan.
            tokens: int32[L] inputs of that sequence.

        Returns:
            Targets of L positions.

        Raises:
            CacheMismatch: the tokens of a block differ; names shard, block and sequence.
            CacheCorrupt: bytes of the block are damaged.
        """
        plan = self.plan
        if not 0 <= sequence < plan.num_sequences:
            raise CacheMismatch(
                "no such sequence in the cache",
                where=self.folder,
                found=sequence,
                expected=f"0 to {plan.num_sequences - 1}",
                remedy="lower data.num_sequences, or capture more sequences",
            )
        assert tokens.shape == (plan.seq_len,), (tokens.shape, plan.seq_len)
        shard, row = divmod(sequence, plan.shard_sequences)
        first = row * plan.blocks_per_sequence
        parts = []
        for block, frame in enumerate(
            self._shard(shard).frames(first, plan.blocks_per_sequence), start=first
        ):
            _, offset, size = plan.block_place(shard, block)
            if token_hash(tokens[offset : offset + size]) != frame.token_hash:
                raise CacheMismatch(
                    "the tokens differ from those the teacher saw",
                    where=block_where(plan, shard, block),
                    remedy="set data.tokens to the corpus of the capture, or recapture",
                )
            parts.append(decode_frame(frame, plan, shard, block))
        if len(parts) == 1:
            return parts[0]
        return RaggedTargets(
            kind=plan.kind,
            num_draws=plan.num_draws,
            entries_per_token=np.concatenate([part.entries_per_token for part in parts]),
            ids=np.concatenate([part.ids for part in parts]),
            values=np.concatenate([part.values for part in parts]),
        )

    def close(self) -> None:
        """Close every shard file."""
        while self._open:
            self._open.popitem()[1].close()

    def _shard(self, shard: int) -> ShardFile:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            file = ShardFile(self.folder / shard_name(shard), self.plan, shard)
        except FileNotFoundError:
            raise CacheIncomplete(
                "a shard file vanished after the cache was opened",
                where=f"{shard_name(shard)}, sequences {sequence_ranges(self.plan, [shard])}",
                remedy="copy the file again, or run `distill-pretrain capture` again",
            ) from None
        self._open[shard] = file
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return file


def load_plan(folder: Path) -> CachePlan:
    """The plan of a cache folder.

    Raises:
        CacheIncomplete: there is none.
        CacheCorrupt: it is damaged.
    """
    try:
        data = (folder / PLAN_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheIncomplete(
            "no cache here",
            where=folder,
            found=f"no {PLAN_NAME}",
            remedy="run `distill-pretrain capture`, or correct data.cache",
        ) from None
    return CachePlan.from_json_bytes(data)


def _unfinished(folder: Path, plan: CachePlan) -> CacheIncomplete:
    missing = [
        shard
        for shard in range(plan.num_shards)
        if not (folder / (shard_name(shard)[:-4] + ".json")).exists()
    ]
    if missing:
        found = f"{len(missing)} of {plan.num_shards} shards missing: sequences "
        found += sequence_ranges(plan, missing)
    else:
        found = f"every shard, but no {MANIFEST_NAME}"
    return CacheIncomplete(
        "the cache is not finished",
        where=folder,
        found=found,
        remedy="run `distill-pretrain capture` again; finished shards are kept",
    )


def _differ(what: str, cached: object, run: object, remedy: str) -> list[str]:
    if cached == run:
        return []
    return [f"{what}: the cache has {cached}, the run {run}; {remedy}"]
