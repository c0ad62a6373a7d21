"""Measures what a finished sparse-logit cache costs: reading speed on one core and bytes per token, beside peers.

    python tools/bench_cache.py RECIPE.yaml [section.key=value ...] [--output FILE.json]

The recipe's `data` names the corpus and the cache. All in one run: reading sequences in a shuffled order with every
check on and the files in the page cache, medians of five passes of processor time on one core; the same targets
encoded by each codec; ArrayRecord with the same targets (pip install array-record); and an order-0 bound of the bytes.
Prints Markdown.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from reporting import command_line, environment, run, write_json

from distill_pretrain.cache import CacheReader
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.raw import RawCodec
from distill_pretrain.cache.codec.registry import BlockCodec
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.config import load_recipe, require
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.batches import BatchSource, StudentBatches, pad_targets
from distill_pretrain.data.order import VisitOrder
from distill_pretrain.data.ragged import PackedTargets
from distill_pretrain.data.sources import SequenceData, open_cache, open_sequences
from distill_pretrain.files.storage import open_storage
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.process import set_cpu_threads

PASSES = 5
TRAINING_TOKENS_PER_S = 400_000
ORDER_SEED = 1
ARRAY_RECORD_INSTALL = "pip install array-record"


def processor_seconds(action: Callable[[], object]) -> list[float]:
    """Processor time of this process in five passes, after one that warms the page cache."""
    action()
    seconds = []
    for _ in range(PASSES):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return seconds


def speed(tokens: int, action: Callable[[], object]) -> dict[str, float]:
    """Tokens per second and core: median, slowest, fastest; and the share of a core that training takes."""
    seconds = processor_seconds(action)
    median = tokens / float(np.median(seconds))
    return {
        "tokens_per_s": median,
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "core_share_at_400k": TRAINING_TOKENS_PER_S / median,
    }


def reading_speeds(
    data: SequenceData, cache: CacheReader, sequences: int, batch: int
) -> dict[str, dict[str, float]]:
    """Of tokens and labels alone, with targets, as micro-batches for the device, and with these padded on this CPU."""
    order = VisitOrder(data.num_sequences, seed=ORDER_SEED)
    numbers = order[np.arange(sequences, dtype=np.int64)]
    source = BatchSource(plan=data.plan, cache=cache, num_sequences=data.num_sequences)
    batches = StudentBatches(
        [source],
        seed=ORDER_SEED,
        global_batch_size=batch,
        micro_batch_size=batch,
        data_rank=0,
        data_size=1,
        device=torch.device("cpu"),
    )

    def tokens_only() -> None:
        for start in range(0, sequences, batch):
            data.plan.read(numbers[start : start + batch])

    def with_targets() -> None:
        for start in range(0, sequences, batch):
            chosen = numbers[start : start + batch]
            tokens, _ = data.plan.read(chosen)
            for number, row in zip(chosen.tolist(), tokens, strict=True):
                cache.read(number, row)

    def packed() -> None:
        for step in range(sequences // batch):
            batches.host_batches(step, with_targets=True)

    def padded_on_host() -> None:
        for start in range(0, sequences, batch):
            chosen = numbers[start : start + batch]
            tokens, _ = data.plan.read(chosen)
            parts = [cache.read(n, row) for n, row in zip(chosen.tolist(), tokens, strict=True)]
            pad_targets(parts, rows=batch)

    def as_trained() -> None:
        for step in range(sequences // batch):
            batches.step_batches(step, with_targets=True)

    tokens = sequences * data.plan.seq_len
    return {
        "tokens and labels": speed(tokens, tokens_only),
        "tokens, labels and targets, every check": speed(tokens, with_targets),
        "the same, packed for the device (what the loader does)": speed(tokens, packed),
        "the same, padded on the host (what it did before)": speed(tokens, padded_on_host),
        "packed, and padded by the device, which is this core": speed(tokens, as_trained),
    }


def transfers(data: SequenceData, cache: CacheReader, sequences: int, batch: int) -> dict[str, Any]:
    """Bytes per token of targets to the device: packed, as rectangles, and of entries alone."""
    order = VisitOrder(data.num_sequences, seed=ORDER_SEED)
    numbers = order[np.arange(sequences, dtype=np.int64)]
    packed = rectangles = information = 0
    for start in range(0, sequences, batch):
        chosen = numbers[start : start + batch]
        tokens, _ = data.plan.read(chosen)
        parts = [cache.read(n, row) for n, row in zip(chosen.tolist(), tokens, strict=True)]
        targets = PackedTargets.of(parts, rows=batch)
        packed += sum(tensor.nbytes for tensor in targets.tensors)
        rectangles += sum(array.nbytes for array in pad_targets(parts, rows=batch))
        value = 1 if cache.plan.kind == "counts" else 4
        information += len(targets.ids) * (4 + value) + targets.entries_per_token.numel()
    positions = sequences * data.plan.seq_len
    return {
        "packed": packed / positions,
        "rectangles": rectangles / positions,
        "information": information / positions,
    }


def read_targets(data: SequenceData, cache: CacheReader, sequences: int) -> list[RaggedTargets]:
    """Targets in the shuffled order, as the samplers yield them."""
    order = VisitOrder(data.num_sequences, seed=ORDER_SEED)
    numbers = order[np.arange(sequences, dtype=np.int64)].tolist()
    rows = [cache.read(s, data.plan.read([s])[0][0]) for s in numbers]
    return [by_ascending_id(row) for row in rows]


def array_record(targets: list[RaggedTargets], batch: int) -> dict[str, Any]:
    """One record per sequence of fixed-width rows, as wide as the widest position; unchecked against tokens."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    width = max(int(row.entries_per_token.max()) for row in targets)
    value_type = np.dtype("f4") if targets[0].kind == "logprobs" else np.dtype("u1")
    seq_len = len(targets[0].entries_per_token)
    tokens = len(targets) * seq_len
    shuffled = np.random.default_rng(ORDER_SEED).permutation(len(targets)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/targets"
        writer = ArrayRecordWriter(path, "group_size:1")
        for row in targets:
            writer.write(_fixed_width(row, width, value_type))
        writer.close()
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")

        def read() -> None:
            for start in range(0, len(shuffled), batch):
                for record in reader.read(shuffled[start : start + batch]):
                    ids = np.frombuffer(record, "<i4", seq_len * width).reshape(seq_len, width)
                    values = np.frombuffer(record, value_type, offset=ids.nbytes)
                    ids.astype(np.int64)
                    values.reshape(seq_len, width).astype(np.float32)

        result: dict[str, Any] = speed(tokens, read)
        result |= {"bytes_per_token": os.path.getsize(path) / tokens, "entries_per_row": width}
        reader.close()
    return result


def _fixed_width(row: RaggedTargets, width: int, value_type: np.dtype[Any]) -> bytes:
    kept = np.arange(width) < row.entries_per_token[:, None]
    ids = np.full(kept.shape, -1, "<i4")
    values = np.zeros(kept.shape, value_type)
    ids[kept], values[kept] = row.ids, row.values
    return ids.tobytes() + values.tobytes()


def codec_figures(plan: CachePlan, targets: list[RaggedTargets]) -> dict[str, dict[str, Any]]:
    """Payload bytes and speeds of each codec on the second half; tables are learnt on the first half."""
    shape: dict[str, Any] = {
        "kind": plan.kind,
        "num_draws": plan.num_draws,
        "vocab_size": plan.vocab_size,
    }
    half = len(targets) // 2
    hc = HcCodec(build_tables(targets[:half], **shape))
    return {
        "raw": _codec(RawCodec(**shape), targets[half:]),
        "hc": {**_codec(hc, targets[half:]), "coder": type(hc.coder).__name__},
    }


def _codec(codec: BlockCodec, targets: list[RaggedTargets]) -> dict[str, Any]:
    payloads = [codec.encode(row) for row in targets]
    sizes = [(len(row.entries_per_token), len(row.ids)) for row in targets]
    tokens = sum(length for length, _ in sizes)
    coded = list(zip(payloads, sizes, strict=True))
    return {
        "payload_bytes_per_token": sum(map(len, payloads)) / tokens,
        "encode": speed(tokens, lambda: [codec.encode(row) for row in targets]),
        "decode": speed(tokens, lambda: [codec.decode(data, *size) for data, size in coded]),
    }


def by_ascending_id(targets: RaggedTargets) -> RaggedTargets:
    """The same targets, ids ascending within a position."""
    rows = np.repeat(np.arange(len(targets.entries_per_token)), targets.entries_per_token)
    order = np.lexsort((targets.ids, rows))
    return RaggedTargets(
        kind=targets.kind,
        num_draws=targets.num_draws,
        entries_per_token=targets.entries_per_token,
        ids=targets.ids[order],
        values=targets.values[order],
    )


def bytes_per_token(
    location: str, cache: CacheReader, targets: list[RaggedTargets]
) -> dict[str, Any]:
    """Of this cache with all its files, and of other ways to keep such targets."""
    plan, totals = cache.plan, cache.manifest.totals
    tokens = totals["tokens"]
    assert tokens is not None
    sizes = open_storage(location).sizes()
    stored = sum(size for name, size in sizes.items() if name.endswith((".dpt", ".json", ".bin")))
    entries = sum(len(row.ids) for row in targets) / sum(len(r.entries_per_token) for r in targets)
    return {
        "entries per token": entries,
        "this cache, every file": stored / tokens,
        "this cache, shards": totals["bytes_per_token"],
        "24-bit entries and a length byte": 1 + 3 * entries,
        "order-0 bound": order0_bound_bytes(targets, plan.vocab_size),
        "Megatron-LM top-16: fp16, u16 and bool each, before zstd": 16.0 * (2 + 2 + 1),
        "MaxText top-64: int32 and float32 each, before its container": 64.0 * (4 + 4),
        "full vocabulary in bf16": 2.0 * plan.vocab_size,
    }


def order0_bound_bytes(targets: list[RaggedTargets], vocab_size: int) -> float | None:
    """Bytes per token that a coder without memory of earlier positions needs; None for log-probabilities.

    Per position the sum of H(u), u the number of entries; of the ids as a set, u times the cross-entropy of the
    entries under a static unigram less log2(u!), the unigram learnt on the first half and applied to the second; and
    of the counts in order of falling frequency, H(count | draws left, entries left), the last one being implied.
    """
    if targets[0].kind != "counts":
        return None
    lengths = np.concatenate([row.entries_per_token for row in targets]).astype(np.int64)
    ids = np.concatenate([row.ids for row in targets]).astype(np.int64)
    counts = np.concatenate([row.values for row in targets]).astype(np.int64)
    half = len(ids) // 2
    seen = np.bincount(ids[:half], minlength=vocab_size)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, lengths.max() + 1)))])
    unigram = (seen + 0.3) / (seen + 0.3).sum()
    id_bits = len(ids) * -np.log2(unigram[ids[half:]]).mean() - log_factorials[lengths].sum()
    count_bits = _count_bits(lengths, ids, counts, seen, targets[0].num_draws)
    length_bits = len(lengths) * conditional_entropy(lengths, np.zeros_like(lengths))
    return float((id_bits + count_bits + length_bits) / len(lengths) / 8)


def _count_bits(
    lengths: np.ndarray, ids: np.ndarray, counts: np.ndarray, seen: np.ndarray, num_draws: int
) -> float:
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    counts = counts[np.lexsort((ids, -seen[ids], rows))]
    before = np.cumsum(counts) - counts
    draws_left = num_draws - (before - before[starts])
    entries_left = np.repeat(lengths, lengths) - (np.arange(len(ids)) - starts)
    coded = entries_left > 1
    context = (draws_left * (num_draws + 1) + entries_left)[coded]
    return float(coded.sum()) * conditional_entropy(counts[coded], context)


def conditional_entropy(values: np.ndarray, context: np.ndarray) -> float:
    """H(values | context) in bits, of the empirical distribution; both are non-negative integers."""

    def entropy(symbols: np.ndarray) -> float:
        _, seen = np.unique(symbols, return_counts=True)
        share = seen / seen.sum()
        return float(-(share * np.log2(share)).sum())

    return entropy(context * (int(values.max(initial=0)) + 1) + values) - entropy(context)


def markdown(report: dict[str, Any]) -> str:
    """Two tables."""
    lines = [
        "| on one core | Mtok/s | slowest - fastest | core at 400k tok/s | B/token |",
        "|---|---|---|---|---|",
    ]
    for name, row in _speed_rows(report):
        share = f"{row['core_share_at_400k']:.3f}"
        spread = f"{row['slowest'] / 1e6:.2f} - {row['fastest'] / 1e6:.2f}"
        size = f"{row['bytes_per_token']:.2f}" if "bytes_per_token" in row else ""
        lines.append(f"| {name} | {row['tokens_per_s'] / 1e6:.2f} | {spread} | {share} | {size} |")
    lines += ["", "| kept as | B/token | of the 24-bit size |", "|---|---|---|"]
    sizes = dict(report["bytes_per_token"])
    entries = sizes.pop("entries per token")
    base = sizes["24-bit entries and a length byte"]
    for name, size in sizes.items():
        if size is not None:
            lines.append(f"| {name} | {size:,.2f} | {size / base:.2f} |")
    sent = report["to_device"]
    lines += [
        "",
        f"Targets to the device, bytes per token: {sent['packed']:.1f} packed, {sent['rectangles']:.1f} as rectangles, "
        f"{sent['information']:.1f} in entries (an id of 4 bytes and a value, a byte per position); "
        f"{sent['packed'] / sent['information']:.2f} of it.",
    ]
    shape = f"V = {report['vocab_size']:,}, N = {report['num_draws']}, sampler {report['sampler']}"
    return "\n".join([f"{shape}, {entries:.2f} entries per token.", "", *lines])


def _speed_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = list(report["reading"].items())
    if isinstance(report["array_record"], dict):
        rows.append(("ArrayRecord, targets only, no check of tokens", report["array_record"]))
    for name, figures in report["codecs"].items():
        size = {"bytes_per_token": figures["payload_bytes_per_token"]}
        rows.append((f"encode {name}", figures["encode"] | size))
        rows.append((f"decode {name}", figures["decode"]))
    return rows


def measure(recipe: Recipe, sequences: int, batch: int) -> dict[str, Any]:
    """Everything, as JSON-able figures."""
    assert recipe.data and recipe.data.cache
    data = open_sequences(recipe.data)
    cache = open_cache(recipe.data.cache, data)
    sequences = min(sequences, data.num_sequences) // batch * batch
    targets = read_targets(data, cache, sequences)
    record: Any = f"not measured: {ARRAY_RECORD_INSTALL}"
    packages = ["torch", "numpy"]
    if find_spec("array_record"):
        record = array_record(targets, batch)
        packages.append("array-record")
    return {
        **environment(*packages),
        "cache": cache.manifest_sha256,
        "codec": cache.plan.codec,
        "sampler": cache.plan.sampler["name"],
        "num_draws": cache.plan.num_draws,
        "vocab_size": cache.plan.vocab_size,
        "seq_len": cache.plan.seq_len,
        "block_tokens": cache.plan.block_tokens,
        "sequences": sequences,
        "micro_batch_size": batch,
        "reading": reading_speeds(data, cache, sequences, batch),
        "to_device": transfers(data, cache, sequences, batch),
        "array_record": record,
        "codecs": codec_figures(cache.plan, targets),
        "bytes_per_token": bytes_per_token(recipe.data.cache, cache, targets),
    }


def main() -> int:
    """Measure, print, and write JSON."""
    parser = command_line(__doc__, recipe=True)
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    args = parser.parse_intermixed_args()
    recipe = load_recipe(Recipe, args.recipe, args.overrides)
    require(recipe, "bench_cache", "data")
    if recipe.data is None or recipe.data.cache is None:
        parser.error("data.cache is not set")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    set_cpu_threads(1)
    report = measure(recipe, args.sequences, args.micro_batch_size)
    print(markdown(report))
    if isinstance(report["array_record"], str):
        print(f"\nArrayRecord {report['array_record']}")
    write_json(args.output, report)
    return 0


if __name__ == "__main__":
    run(main)
