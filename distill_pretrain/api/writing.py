"""A cache written from a teacher of one's own.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from distill_pretrain.api.checks import section
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import ConfigError, TeacherError, require_whole
from distill_pretrain.sampling.kinds import SamplerName
from distill_pretrain.teacher.capture import (
    CaptureWatch,
    capture_shards,
    finish_capture,
    make_plans,
)
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.gate import SanityGate
from distill_pretrain.teacher.pilot import pilot_tables
from distill_pretrain.teacher.replica_group import ReplicaGroup
from distill_pretrain.teacher.sampling_backend import columns_reader

Score = Callable[[torch.Tensor], "torch.Tensor | npt.NDArray[np.float32]"]
"""tokens int64[B, L] -> next-token logits [B, L, V]."""


def write_cache(
    output_dir: str | Path,
    plan: SequencePlan,
    score: Score,
    *,
    vocab_size: int,
    teacher: Mapping[str, Any],
    sampler: SamplerName = "systematic",
    num_draws: int = 50,
    top_p: float | None = None,
    seed: int = 1234,
    num_sequences: int | None = None,
    micro_batch_size: int = 8,
    shard_sequences: int = 512,
    block_tokens: int = 1024,
    codec: Literal["hc", "raw"] = "hc",
    pilot_tokens: int = 65536,
    sanity_gate: Literal["refuse", "warn", "off"] = "refuse",
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda positions: None,
) -> bool:
    """Write the cache of a plan's sequences, scored by a function; the bytes are those that `capture` would write.

    Called again after it was killed, with the same arguments, it goes on where it stopped; with another teacher, plan
    or setting it refuses to touch the folder. Several processes may call it at once, each with the teacher in its own
    memory: a shard is written by whoever takes it first. A larger `num_sequences` extends a cache.

    Args:
        output_dir: folder of the cache; created.
        plan: the sequences.
        score: tokens int64[B, L], on `device`, to next-token logits [B, L, V], torch fp32, bf16 or fp16, or numpy
            float32; row t is the prediction after token t. It is called without gradients, and must give the same
            logits for the same tokens. A new cache scores its first micro-batches twice, for the codec's tables.
        vocab_size: V; every id of the corpus is below it.
        teacher: what identifies the teacher, such as a name and the sha256 of its weights; kept in the cache as JSON.
        sampler: see `sample_targets`.
        num_draws: see `sample_targets`.
        top_p: see `sample_targets`.
        seed: of the draws.
        num_sequences: the first so many of the plan; None for all.
        micro_batch_size: B; part of the cache's identity, as it moves float rounding.
        shard_sequences: sequences per file.
        block_tokens: most positions per checksummed block.
        codec: "hc" (entropy-coded) or "raw".
        pilot_tokens: positions scored first for the tables of "hc".
        sanity_gate: what to do when the teacher cannot be sound (uniform, shifted, frozen): "refuse", "warn" or "off".
        device: of the tokens that `score` is given.
        progress: told the number of positions after every batch written.

    Returns:
        Whether the cache is finished; False where other processes still write shards of it.

    Raises:
        CacheMismatch: the folder holds another cache.
        TeacherError: the logits have another shape than [B, L, V], are not finite, or cannot be a sound teacher's.
        TokenizerMismatch: the corpus holds ids outside the vocabulary.
        ConfigError: a setting is none.
        CacheError: the folder cannot be written.
    """
    capture = section(
        CaptureConfig,
        {
            "output_dir": output_dir,
            "sampler": sampler,
            "num_draws": num_draws,
            "top_p": top_p,
            "seed": seed,
            "num_sequences": num_sequences,
            "micro_batch_size": micro_batch_size,
            "shard_sequences": shard_sequences,
            "block_tokens": block_tokens,
            "codec": codec,
            "pilot_tokens": pilot_tokens,
            "sanity_gate": sanity_gate,
        },
    )
    require_whole("vocab_size", vocab_size, least=2, most=1 << 20)
    plan.index.check_vocabulary(vocab_size)
    engine = _OwnTeacher(score, vocab_size, torch.device(device), _identity(teacher))
    record = TokensRecord.beside(plan.index.prefix)
    sequences = SequenceData(
        index=plan.index,
        plan=plan,
        vocab_size=vocab_size,
        tokenizer_digests=record.tokenizer_digests if record else (),
        num_sequences=plan.num_sequences,
    )
    group = ReplicaGroup(
        engine, sequences, read=columns_reader("auto", engine.device, engine.replica)
    )
    ((folder, cache_plan),) = make_plans(sequences, capture, engine.identity).items()
    watch = CaptureWatch(SanityGate(vocab_size=vocab_size, mode=sanity_gate), progress=progress)
    return group.run(lambda: _write(folder, cache_plan, group, capture, watch)) is True


def _write(
    folder: Path, plan: CachePlan, group: ReplicaGroup, capture: CaptureConfig, watch: CaptureWatch
) -> bool:
    writer = CacheWriter.create_or_resume(
        folder,
        plan,
        make_tables=lambda: pilot_tables(group.score, [plan], num_tokens=capture.pilot_tokens)[0],
        labels_of=lambda sequence: group.sequences.plan.unmasked.read([sequence])[1][0],
    )
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Processes that start together start at different shards.
    capture_shards([writer], group, first_shard=rank * plan.num_shards // size, watch=watch)
    return folder in finish_capture([writer])


class _OwnTeacher:
    """A `TeacherEngine` that is a function, held by this process alone."""

    def __init__(
        self, score: Score, vocab_size: int, device: torch.device, identity: dict[str, Any]
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.replica = Replica()
        self._identity = identity
        self._score = score

    @property
    def identity(self) -> dict[str, Any]:
        """What the caller says of it."""
        return self._identity

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """The logits of all B * L positions at once."""
        with torch.no_grad():
            logits = self._score(tokens)
        if isinstance(logits, np.ndarray):
            logits = torch.from_numpy(logits)
        shape = (*tokens.shape, self.vocab_size)
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != shape:
            raise TeacherError(
                "what the teacher returned are not the logits of its tokens",
                where="score",
                found=list(getattr(logits, "shape", [])) or type(logits),
                expected=f"[B, L, V] = {list(shape)}",
                remedy="return one row per token and one column per id of the vocabulary, without padding columns",
            )
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TeacherError(
                "the teacher's logits have a dtype that is not sampled",
                where="score",
                found=logits.dtype,
                expected="float32, bfloat16 or float16",
                remedy="return logits.float()",
            )
        yield LogitsChunk(first=0, first_id=0, logits=logits.to(self.device).flatten(0, 1))


def _identity(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What plan.json says of the teacher.

    Raises:
        ConfigError: it says nothing, or cannot be written down.
    """
    try:
        stored = json.loads(json.dumps(dict(teacher)))
    except (TypeError, ValueError) as error:
        stored, problem = {}, f"{teacher!r}: {error}"
    else:
        problem = repr(teacher)
    if not stored or stored != dict(teacher):
        raise ConfigError(
            "the cache must say whose targets it holds",
            where="teacher",
            found=problem[:200],
            expected="a mapping of text to JSON values, such as {'name': ..., 'sha256': ...}",
        )
    return {"kind": "own", **stored}
