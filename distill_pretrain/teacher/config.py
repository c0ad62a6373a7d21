"""Recipe sections `teacher` and `capture`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section
from distill_pretrain.errors import ConfigError
from distill_pretrain.sampling.kinds import SAMPLERS, SUMMARY, SamplerName

DEFAULT_MICRO_BATCH_SIZE = 8
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What of a model folder may run on this machine; nothing unless asked for.

    Attributes:
        remote_code: its Python files may.
        pickle: its weights may be pickled (*.bin).
    """

    remote_code: bool = False
    pickle: bool = False


NO_TRUST = Trust()

_FOREIGN = {
    "megatron": {
        "fsdp": "it is split by tensor and pipeline",
        "zero": "it is split by tensor and pipeline",
        "offload": "its weights stay on the device; raise tensor or pipeline",
        "trust_remote_code": "megatron-core runs no code of a folder",
        "allow_pickle": "it reads safetensors alone",
    },
    "hf": {
        "pipeline": "it is split by tensor or fsdp; a pipeline takes kind=megatron",
        "zero": "it is split by tensor or fsdp; ZeRO-3 takes kind=deepspeed",
        "offload": "its weights stay on the device; offloading takes kind=deepspeed",
    },
    "deepspeed": {
        "tensor": "ZeRO-3 splits the weights alone; tensor takes kind=hf or megatron",
        "pipeline": "ZeRO-3 splits the weights alone; a pipeline takes kind=megatron",
        "fsdp": "set zero",
        "allow_pickle": "a teacher in parts reads safetensors alone",
    },
}
"""Kind -> fields that mean nothing to it, and why."""


class MixtureTeacher(Section):
    """One more teacher, of the same tokenizer, whose distribution is averaged with the others'."""

    path: Path
    """Run folder, checkpoint folder or model folder."""
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Its share is weight / (teacher.weight + the weights of the mixture)."""
    kind: Literal["megatron", "hf"] | None = None
    """Null takes teacher.kind."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Null takes teacher.dtype."""


class TeacherConfig(Section):
    """Whose next-token distribution is cached."""

    kind: Literal["megatron", "hf", "deepspeed"] = "megatron"
    """`megatron`: a checkpoint trained by this project, or a Hugging Face folder of an architecture it knows; `hf`: any
    causal LM in a local folder; `deepspeed`: the same under ZeRO-3."""
    path: Path
    """Run folder or checkpoint folder (megatron), or model folder."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; the softmax is always taken in fp32."""
    tensor: int = Field(default=1, ge=1, le=1 << 20)
    """Processes that split every layer between them (megatron, hf)."""
    pipeline: int = Field(default=1, ge=1, le=1 << 20)
    """Processes, or groups of `tensor` of them, that hold the layers in turn (megatron)."""
    fsdp: int = Field(default=1, ge=1, le=1 << 20)
    """Processes that store the weights between them and fetch a layer when it is its turn (hf)."""
    zero: int = Field(default=1, ge=1, le=1 << 20)
    """Processes of the ZeRO-3 group (deepspeed): all that the job has."""
    offload: bool = False
    """Keep the weights of `zero` in the memory of the host (deepspeed)."""
    trust_remote_code: bool = False
    """Run Python files that come with the model (hf, deepspeed); such a folder is refused otherwise."""
    allow_pickle: bool = False
    """Read pickled weights, pytorch_model*.bin (hf); a folder that has no others is refused otherwise."""
    head_chunk_tokens: int = Field(default=1024, ge=1, le=1 << 40)
    """Positions whose logits exist at once in a capture or an evaluation; part of the cache's identity (it moves float
    rounding)."""
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Share of this teacher among those of `mixture` (any unit; only the ratios count)."""
    mixture: tuple[MixtureTeacher, ...] = ()
    """More teachers, a list of {path, weight, kind, dtype}: targets are of the weighted mean of all distributions. Each
    teacher is whole in every process. For other weights on another corpus, capture that one with its own."""

    @model_validator(mode="after")
    def _only_what_the_engine_has(self) -> TeacherConfig:
        fields = type(self).model_fields
        for name, reason in _FOREIGN[self.kind].items():
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} given with kind={self.kind}; {reason}"
                )
        if self.mixture and (self.processes > 1 or self.kind == "deepspeed"):
            raise ValueError(
                f"mixture given with kind={self.kind} and {self.processes} processes to a copy; its teachers are whole "
                "in each process, of kind hf or megatron"
            )
        if self.tensor > 1 and self.fsdp > 1:
            raise ValueError(
                f"tensor={self.tensor} and fsdp={self.fsdp} are both given; an hf teacher is split in one of these ways"
            )
        return self

    @property
    def trust(self) -> Trust:
        """What of the model's folder may run on this machine."""
        return Trust(remote_code=self.trust_remote_code, pickle=self.allow_pickle)

    @property
    def is_split(self) -> bool:
        """Whether a copy is in parts: over several processes, or stored so over a single one."""
        return self.processes > 1 or self.kind == "deepspeed"

    @property
    def members(self) -> tuple[TeacherConfig, ...]:
        """Every teacher of the mixture as a section of its own, this one first; this section where there is none."""
        if not self.mixture:
            return (self,)
        alone = self.model_copy(update={"mixture": ()})
        more = [
            alone.model_copy(
                update={
                    "path": other.path,
                    "weight": other.weight,
                    "kind": other.kind or self.kind,
                    "dtype": other.dtype or self.dtype,
                }
            )
            for other in self.mixture
        ]
        return (alone, *more)

    @property
    def processes(self) -> int:
        """The number of processes that hold one copy together."""
        return self.tensor * self.pipeline * self.fsdp * self.zero


class TargetsConfig(Section):
    """How a position's distribution becomes sparse targets."""

    sampler: SamplerName = Field(default="systematic", description=SUMMARY)
    num_draws: int = Field(default=50, ge=1, le=1024)
    """N: draws per position; for `topk` the k, for `topp` the most ids of a position."""
    top_p: float | None = Field(default=None, gt=0, lt=1)
    """Mass at which `topp` stops: the fewest of the likeliest ids that reach it are kept. Null for the others."""

    @model_validator(mode="after")
    def _top_p_belongs_to_topp(self) -> TargetsConfig:
        is_needed = "top_p" in SAMPLERS[self.sampler].own_settings
        if is_needed and self.top_p is None:
            raise ValueError(
                f"top_p is not given; sampler {self.sampler} needs it, such as top_p=0.9"
            )
        if not is_needed and self.top_p is not None:
            raise ValueError(
                f"top_p={self.top_p} says nothing to sampler {self.sampler}; leave it out, or set sampler=topp"
            )
        return self


class TargetSetConfig(TargetsConfig):
    """One of several kinds of targets that a capture stores, each in a cache of its own."""

    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    """Seed of the draws; null takes capture.seed."""


class CaptureConfig(TargetsConfig):
    """How the teacher's distribution is sampled and stored."""

    output_dir: Path
    """Folder of the cache; with `sets`, of the folders of the caches."""
    sets: dict[str, TargetSetConfig] | None = Field(default=None, min_length=1)
    """Name -> {sampler, num_draws, top_p, seed}: one pass of the teacher writes a cache output_dir/NAME for each,
    the same as a capture of that set alone; sampler, num_draws and top_p above then stay at their defaults."""
    seed: int = Field(default=1234, ge=0, lt=1 << 64)
    """Seed of the draws."""
    num_sequences: int | None = Field(default=None, ge=1, le=1 << 40)
    """Capture only the first so many sequences of the plan; null captures all."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=1 << 20)
    """Sequences per teacher forward pass; part of the cache's identity (it moves float rounding). Null takes what
    micro_batch_tokens gives, or else 8."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=1 << 40)
    """Instead of micro_batch_size: the most positions per forward pass, at least one sequence of data.seq_len."""
    shard_sequences: int = Field(default=512, ge=1, le=1 << 20)
    """Sequences per shard file."""
    block_tokens: int = Field(default=1024, ge=16, le=65536)
    """Most positions per checksummed block; a block never crosses a sequence."""
    codec: Literal["hc", "raw"] = "hc"
    """Block codec: `hc` (entropy-coded, a third to half the bytes) or `raw` (fixed width)."""
    pilot_tokens: int = Field(default=65536, ge=1, le=1 << 40)
    """Positions scored first to make the tables of `hc` (at most an eighth of the capture, but one micro-batch)."""
    codec_tables: Path | None = None
    """Tables of another cache (its codec-*.bin) instead of a pilot; caches to be merged need the same tables."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads per capture process (fixed, so that results do not depend on the machine)."""
    sampling_impl: Literal["auto", "numpy", "cuda"] = "auto"
    """Who samples: kernels on the teacher's GPU (`cuda`) or numpy on the host (`numpy`); `auto` takes the kernels where
    they run, else numpy. The bytes are the same."""
    sanity_gate: Literal["refuse", "warn", "off"] = "refuse"
    """What `capture` does when the teacher cannot be sound (frozen, uniform, shifted, hardly ever right)."""
    telemetry: bool = True
    """Write figures of speed and progress to .telemetry/HOST-PID-TIME.jsonl in the (first) cache, every ten seconds."""

    @field_validator("sets")
    @classmethod
    def _names_of_sets_are_folder_names(
        cls, sets: dict[str, TargetSetConfig] | None
    ) -> dict[str, TargetSetConfig] | None:
        for name in sets or {}:
            if not _SET_NAME.fullmatch(name):
                raise ValueError(
                    f"found: {name!r}; expected: a name for a folder, 1 to 100 of A-Z a-z 0-9 . _ -, "
                    "the first a letter or digit"
                )
        return sets

    @model_validator(mode="after")
    def _sets_stand_alone(self) -> CaptureConfig:
        if self.sets is None:
            return self
        fields = CaptureConfig.model_fields
        given = [n for n in TargetsConfig.model_fields if getattr(self, n) != fields[n].default]
        if given:
            raise ValueError(
                f"{', '.join(given)} given beside sets; move them into a set, or leave sets out"
            )
        if self.codec_tables is not None:
            raise ValueError("codec_tables given beside sets; tables suit one kind of targets only")
        return self

    @model_validator(mode="after")
    def _one_size_of_micro_batches(self) -> CaptureConfig:
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} and micro_batch_tokens={self.micro_batch_tokens} are both "
                "given; set one of them to null"
            )
        return self

    def sequences_per_pass(self, seq_len: int) -> int:
        """Return the number of sequences of `seq_len` positions per forward pass of the teacher.

        Raises:
            ConfigError: not even one fits micro_batch_tokens.
        """
        if self.micro_batch_tokens is None:
            return self.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE
        if self.micro_batch_tokens < seq_len:
            raise ConfigError(
                "a micro-batch of so few positions holds no sequence",
                where="capture.micro_batch_tokens, data.seq_len",
                found=f"{self.micro_batch_tokens} positions, sequences of {seq_len}",
                expected=f"at least {seq_len}",
            )
        return self.micro_batch_tokens // seq_len

    @property
    def targets(self) -> dict[Path, TargetSetConfig]:
        """The folder of every cache and what it holds, the seed filled in; one cache in output_dir without `sets`."""
        if self.sets is None:
            only = {name: getattr(self, name) for name in TargetSetConfig.model_fields}
            return {self.output_dir: TargetSetConfig(**only)}
        return {
            self.output_dir / name: targets.model_copy(
                update={"seed": self.seed if targets.seed is None else targets.seed}
            )
            for name, targets in self.sets.items()
        }
