"""`distill-pretrain capture`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.cli.console import progress, say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.dist.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.formats.hc_tables import HcTables
    from distill_pretrain.formats.manifest import Manifest
    from distill_pretrain.teacher.config import CaptureConfig

SECTIONS = ("data", "teacher", "capture")
HELP = """
Runs the teacher over the training sequences and stores, for every position, a sparse sample of its next-token
distribution. Students then train from this cache at the cost of plain cross-entropy.

Reads   data.tokens (.bin/.idx), teacher.path
Writes  capture.output_dir: codec-*.bin, plan.json, extent.json, s-*.dpt, manifest.json (last)

Killed and started again, or started with another number of processes, it goes on where it stopped; the bytes are
the same. A larger data.num_sequences or capture.num_sequences extends a finished cache: full shards are kept.

    distill-pretrain capture distill.yaml
    torchrun --nproc-per-node=2 -m distill_pretrain capture distill.yaml
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Capture the cache of a recipe."""
    require(recipe, "capture", "data", "teacher", "capture")
    assert recipe.data and recipe.teacher and recipe.capture
    from distill_pretrain.data.sources import open_sequences, require_one_source
    from distill_pretrain.dist.process import on_first_rank, process_group, set_cpu_threads
    from distill_pretrain.formats.cache_writer import CacheWriter
    from distill_pretrain.formats.codec_files import read_tables
    from distill_pretrain.mcore.config import ParallelConfig
    from distill_pretrain.mcore.parallel import model_parallel
    from distill_pretrain.teacher.capture import (
        capture_shards,
        finish_capture,
        make_plan,
        pilot_tables,
    )
    from distill_pretrain.teacher.engines import open_engine

    require_one_source(recipe.data, "capture", "capture.output_dir")
    _require_codec_with_tables(recipe.capture)
    set_cpu_threads(recipe.capture.threads)
    if recipe.teacher.kind == "hf":
        _require_own_tokenizer(recipe.teacher.path, recipe.data.tokens)
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        sequences = open_sequences(recipe.data)
        engine = open_engine(
            recipe.teacher.kind,
            recipe.teacher.path,
            recipe.teacher.dtype,
            vocab_size=sequences.vocab_size,
            seq_len=recipe.data.seq_len,
            tokenizer_sha256=sequences.tokenizer_sha256,
        )
        capture = recipe.capture
        plan = make_plan(sequences, capture, engine.identity)
        given = None
        if capture.codec_tables is not None:
            given = read_tables(capture.codec_tables, plan)
            plan = plan.with_tables(given.sha256)

        def make_tables() -> HcTables:
            if given is not None:
                return given
            say("scoring a pilot for the codec's tables")
            return pilot_tables(engine, sequences, plan, num_tokens=capture.pilot_tokens)

        def join() -> CacheWriter:
            return CacheWriter.create_or_resume(
                capture.output_dir,
                plan,
                make_tables=make_tables,
                labels_of=lambda sequence: sequences.plan.read([sequence])[1][0],
            )

        # Rank 0 first: it makes the tables of a new cache, which the others then find.
        on_first_rank(lambda: join().plan.plan_id)
        writer = join()
        if launch_rank() == 0:
            dump_recipe(recipe, capture.output_dir / "recipe.yaml")
        left = sum(plan.shard_range(shard)[1] for shard in writer.pending())
        say(f"{plan.num_sequences - left} of {plan.num_sequences} sequences are captured already")
        first_shard = launch_rank() * plan.num_shards // launch_world_size()
        with progress(
            left * plan.seq_len // launch_world_size(), "capturing", unit="positions"
        ) as bar:
            capture_shards(writer, engine, sequences, first_shard=first_shard, progress=bar.advance)
        # No barrier: shards differ in length by more than a collective may wait. The last to finish publishes.
        manifest = finish_capture(writer)
    if manifest is not None:
        _summarise(recipe.capture.output_dir, manifest, sequences)


def _require_codec_with_tables(capture: CaptureConfig) -> None:
    """Refuse tables for a codec that has none."""
    from distill_pretrain.errors import ConfigError

    if capture.codec_tables is not None and capture.codec == "raw":
        raise ConfigError(
            "the raw codec has no tables",
            where="capture.codec_tables, capture.codec",
            found=f"codec_tables: {capture.codec_tables}, codec: raw",
            remedy="set capture.codec=hc, or leave capture.codec_tables out",
        )


def _require_own_tokenizer(model: Path, tokens: Path) -> None:
    """Refuse a corpus made with another Hugging Face tokenizer than the one beside the teacher's weights."""
    from distill_pretrain.corpus.tokenizers import HF_FILES, tokenizer_sha256
    from distill_pretrain.errors import TokenizerMismatch
    from distill_pretrain.formats import TokensRecord

    record = TokensRecord.beside(tokens)
    has_tokenizer = any((model / name).is_file() for name in HF_FILES)
    if record is None or record.tokenizer["kind"] != "hf" or not has_tokenizer:
        return
    found = tokenizer_sha256("hf", model)
    if found != record.tokenizer["sha256"]:
        raise TokenizerMismatch(
            "the corpus was made with another tokenizer than the teacher's",
            where=f"teacher.path {model}, data.tokens {tokens}",
            found=f"tokenizer {found[:12]} beside the teacher",
            expected=f"{record.tokenizer['sha256'][:12]}, recorded in tokens.json",
            remedy="tokenize with tokenizer.kind=hf and tokenizer.path set to the teacher's folder",
        )


def _summarise(folder: Path, manifest: Manifest, sequences: SequenceData) -> None:
    """Printed by the process that finished the cache, whatever its rank."""
    from distill_pretrain.data.canary import run_canary
    from distill_pretrain.formats.cache_reader import CacheReader

    totals = manifest.totals
    print(
        f"cache complete: {folder}\n"
        f"  {totals['tokens']:,} positions, {totals['bytes_per_token']:.1f} bytes/token, "
        f"{totals['entries_per_token']:.2f} unique ids/position"
    )
    with CacheReader.open(folder) as cache:
        run_canary(
            sequences.plan,
            cache,
            num_sequences=manifest.plan.num_sequences,
            where=folder,
            captured_rate=totals["canary_hit_rate"],
            refuse=False,
            say=lambda line: print(f"  {line}", flush=True),
        )
