"""What `distill-pretrain capture --dry-run` says: the job as it would be, and what stands in its way."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.errors import CacheError, ConfigError, DistillPretrainError
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.cache.plan import CachePlan
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.teacher.config import TeacherConfig

IDS_PER_POSITION = (0.98, 0.64)
"""a, b of a * N^b, the distinct ids of N draws that the paper reports for large teachers (2503.16870)."""
HC_SHARE = 0.55
"""Of the fixed-width bytes; small, flat teachers need less per entry and have more entries."""
FRAME_BYTES, INDEX_BYTES, SHARD_BYTES = 48, 32, 300


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Bytes of a cache: the most it can take, what it will probably take, and why."""

    most: int
    likely: int
    basis: str


def dry_run(recipe: Recipe, processes: int | None) -> None:
    """Print the job.

    Args:
        recipe: with data, teacher and capture.
        processes: as if so many had been started; None takes those that were.

    Raises:
        ConfigError: something stands in the way; every problem is named.
    """
    assert recipe.data and recipe.teacher and recipe.capture
    if launch_rank() != 0:
        return
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.teacher.capture import make_plans

    sequences = open_sequences(recipe.data)
    # What the identity of a teacher says is known only where its weights were read.
    plans = make_plans(sequences, recipe.capture, {"kind": recipe.teacher.kind})
    plan = next(iter(plans.values()))
    problems: list[str] = []
    fingerprint = sequences.index.fingerprint
    tokenizer = sequences.tokenizer_sha256
    print(
        f"corpus    {recipe.data.tokens}: .bin {fingerprint.bin_sha256[:12]}, "
        f"{f'tokenizer {tokenizer[:12]}' if tokenizer else 'no tokens.json (tokenizer unknown)'}, "
        f"vocabulary {plan.vocab_size:,}"
    )
    print(
        f"sequences plan {sequences.plan.plan_id[:12]}: {plan.num_sequences:,} of {plan.seq_len:,} tokens"
    )
    print(f"documents {sequences.index.num_documents:,}; {sequences.plan.shares}")
    print(
        f"shards    {plan.num_shards:,} of {plan.shard_sequences:,} sequences; micro-batches of "
        f"{plan.micro_batch_size:,} sequences ({plan.micro_batch_size * plan.seq_len:,} positions)"
    )
    print(f"positions {plan.num_sequences * plan.seq_len:,}")
    _say_teacher(recipe.teacher, sequences, recipe.data.tokens, processes, problems)
    print("caches")
    needed = 0
    for folder, its in plans.items():
        needed += _say_cache(folder, its, problems)
    _check_space(recipe.capture.output_dir, needed, problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"the capture would meet {count}:\n{listed}")
    print(
        "no problem found; nothing was captured, and of the weights no more than headers was read"
    )


def _say_teacher(
    teacher: TeacherConfig,
    sequences: SequenceData,
    tokens: Path,
    processes: int | None,
    problems: list[str],
) -> None:
    from distill_pretrain.teacher.loading import require_own_tokenizer, require_plausible_width

    world = launch_world_size() if processes is None else processes
    layout = ", ".join(
        f"{name} {getattr(teacher, name)}"
        for name in ("tensor", "pipeline", "fsdp", "zero")
        if getattr(teacher, name) > 1
    )
    held = (
        f"{layout}, {teacher.processes} processes to a copy" if layout else "one process to a copy"
    )
    copies = world // teacher.processes
    for member in teacher.members:
        share = f", weight {member.weight:g}" if teacher.mixture else ""
        print(f"teacher   {member.kind} {member.path}, {member.dtype}{share}; {held}")
    print(f"replicas  {copies} in {world} {'process' if world == 1 else 'processes'}")
    if world < 1 or world % teacher.processes:
        problems.append(
            f"{world} processes cannot be shared out among copies of {teacher.processes} "
            "(teacher.tensor, pipeline, fsdp, zero); start a multiple"
        )
    for member in teacher.members:
        try:
            require_own_tokenizer(member.path, tokens)
            require_plausible_width(member.path, sequences.vocab_size)
            config_file = member.path / "config.json"
            if member.kind != "megatron" or config_file.is_file():
                _check_folder(member, config_file, sequences, problems)
            else:
                _check_checkpoint(member, sequences, problems)
        except DistillPretrainError as error:
            problems.append(str(error))


def _check_folder(
    teacher: TeacherConfig, config_file: Path, sequences: SequenceData, problems: list[str]
) -> None:
    """A Hugging Face folder, from its config.json and the headers of its weight files."""
    from distill_pretrain.teacher.engines import check_model_folder

    already = len(problems)
    try:
        raw: dict[str, Any] = json.loads(config_file.read_text())
        config: dict[str, Any] = raw.get("text_config") or raw
    except (OSError, ValueError, AttributeError) as error:
        problems.append(f"{config_file} cannot be read: {error}")
        return
    width = config.get("vocab_size")
    if isinstance(width, int) and width < sequences.vocab_size:
        problems.append(
            f"the teacher knows {width:,} ids, the corpus has {sequences.vocab_size:,} ({config_file})"
        )
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and longest < sequences.plan.seq_len:
        problems.append(
            f"the teacher takes {longest:,} positions, data.seq_len is {sequences.plan.seq_len:,}"
        )
    _check_split(
        teacher, config.get("num_attention_heads"), config.get("num_hidden_layers"), problems
    )
    weights = [*teacher.path.glob("*.safetensors"), *teacher.path.glob("*.bin")]
    if not weights:
        problems.append(f"no weights (*.safetensors, *.bin) in {teacher.path}")
    if len(problems) == already:
        check_model_folder(teacher, vocab_size=sequences.vocab_size, seq_len=sequences.plan.seq_len)


def _check_checkpoint(teacher: TeacherConfig, sequences: SequenceData, problems: list[str]) -> None:
    """A checkpoint of this project, from its record."""
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint

    checkpoint = find_checkpoint(teacher.path)
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    if trained.vocab_size != sequences.vocab_size:
        problems.append(
            f"the teacher's vocabulary is {trained.vocab_size:,}, the corpus's {sequences.vocab_size:,} "
            f"({teacher.path})"
        )
    known, ours = trained.tokenizer_sha256, sequences.tokenizer_digests
    if known and ours and known not in ours:
        problems.append(
            f"the teacher was trained with tokenizer {known[:12]}, the corpus made with {ours[0][:12]}"
        )
    model = trained.model
    _check_split(teacher, model.num_attention_heads, model.num_layers, problems)


def _check_split(
    teacher: TeacherConfig, heads: object, layers: object, problems: list[str]
) -> None:
    if isinstance(heads, int) and heads % teacher.tensor:
        problems.append(
            f"teacher.tensor={teacher.tensor} does not divide its {heads} attention heads"
        )
    if isinstance(layers, int) and layers % teacher.pipeline:
        problems.append(f"teacher.pipeline={teacher.pipeline} does not divide its {layers} layers")


def _say_cache(folder: Path, plan: CachePlan, problems: list[str]) -> int:
    """One cache: what it will hold, and what is there. Returns the bytes it probably still needs."""
    sampler, codec = plan.sampler, "hc" if plan.has_tables else "raw"
    mass = f", top_p {sampler['top_p']}" if "top_p" in sampler else ""
    print(
        f"  {folder}: {sampler['name']}, N = {plan.num_draws}{mass}, seed {sampler['seed']}, codec {codec}"
    )
    finished, measured = 0, None
    try:
        finished, measured = _look_at(folder, plan)
    except CacheError as error:
        problems.append(str(error))
    print(f"    captured already: {finished:,} of {plan.num_sequences:,} sequences")
    size = _size_of(plan, measured)
    print(
        f"    about {_bytes(size.likely)} ({size.basis}); at most {_bytes(size.most)} at fixed width"
    )
    return size.likely * (plan.num_sequences - finished) // plan.num_sequences


def _look_at(folder: Path, plan: CachePlan) -> tuple[int, float | None]:
    """Finished sequences of the cache in a folder and their bytes per position.

    Raises:
        CacheMismatch, CacheCorrupt: the folder holds another cache, or a damaged one.
    """
    from distill_pretrain.cache.finished_shards import FinishedShards
    from distill_pretrain.cache.names import PLAN_NAME
    from distill_pretrain.cache.plan import CachePlan
    from distill_pretrain.errors import CacheMismatch
    from distill_pretrain.files.storage import open_storage

    if not (folder / PLAN_NAME).is_file():
        return 0, None
    stored = (folder / PLAN_NAME).read_bytes()
    found = CachePlan.from_json_bytes(stored, num_sequences=plan.num_sequences)
    print(f"    plan {found.plan_id[:12]} is there")
    # The teacher's weights were not read; the capture itself compares them.
    known = [
        line
        for line in found.differences(plan.joining(found))
        if not line.startswith(("teacher.", "software.")) or line.startswith("teacher.kind")
    ]
    if known:
        raise CacheMismatch(
            "the folder holds a cache made from something else",
            where=folder,
            found="; ".join(known),
            remedy="set capture.output_dir to a new folder, or undo the change of the recipe",
        )
    records = list(FinishedShards(open_storage(folder), found).records.values())
    tokens = sum(record.tokens for record in records)
    measured = sum(record.size for record in records) / tokens if tokens else None
    return sum(record.num_sequences for record in records), measured


def _size_of(plan: CachePlan, measured: float | None) -> _Size:
    from distill_pretrain.cache.codec.raw import RawCodec

    positions = plan.num_sequences * plan.seq_len
    raw = RawCodec(kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size)
    overhead = plan.num_sequences * plan.blocks_per_sequence * (FRAME_BYTES + INDEX_BYTES)
    overhead += plan.num_shards * SHARD_BYTES

    def of(entries: float, share: float) -> int:
        per_position = raw.length_dtype.itemsize + share * entries * raw.entry_bytes
        return math.ceil(positions * per_position) + overhead

    most = of(plan.max_entries_per_token, 1.0)
    if measured is not None:
        basis = f"{measured:.1f} bytes per position, as in its finished shards"
        return _Size(most=most, likely=math.ceil(positions * measured), basis=basis)
    factor, power = IDS_PER_POSITION
    entries = float(plan.max_entries_per_token)
    basis = f"{entries:.0f} ids per position"
    if plan.kind == "counts" or "top_p" in plan.sampler:
        entries = min(entries, factor * plan.num_draws**power)
        basis = f"{entries:.1f} ids per position, as the paper's large teachers have; flat ones have twice as many"
    share = HC_SHARE if plan.has_tables else 1.0
    basis += f", {share * raw.entry_bytes:.1f} bytes each"
    return _Size(most=most, likely=min(most, of(entries, share)), basis=basis)


def _check_space(output_dir: Path, needed: int, problems: list[str]) -> None:
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    print(f"disk      {_bytes(free)} free in {place}, about {_bytes(needed)} needed")
    if free < needed:
        problems.append(f"{place} has {_bytes(free)} free; about {_bytes(needed)} are needed")
    if not os.access(place, os.W_OK):
        problems.append(f"{place} cannot be written")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} PB"
