"""How many positions' targets move between the two engines: every family, captured as kind hf and as kind megatron.

    python -m tools.family_targets --output docs/results/families/targets.json
    python -m tools.family_targets --only Qwen3Config --output docs/results/families/targets.json

With `--only`, rows that the file has of other families stay, if they were measured with the same versions.
For each family a random model of transformers' own class, captured by the real verb as either kind in fp32 and in bf16,
and the share of positions whose stored targets differ. All draw with the same random numbers, so exact arithmetic would
move none. It prints the table of docs/results/families.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.cli.main import main as run_verb
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from tests.checkpoint.test_families import CONFIGS, save_random
from tools.reporting import command_line, environment, kept_rows, run, write_json

VOCAB_SIZE, SEQ_LEN, NUM_DRAWS = 150, 64, 50
PAIRS = {
    "hf, megatron: fp32": ("hf fp32", "megatron fp32"),
    "hf, megatron: bf16": ("hf bf16", "megatron bf16"),
    "hf: fp32, bf16": ("hf fp32", "hf bf16"),
}
"""What is compared -> two captures of the same weights: kind and arithmetic."""


def write_corpus(prefix: Path, num_sequences: int) -> None:
    """One document of random ids."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, num_sequences * SEQ_LEN + 1)
    with TokenIndexWriter(prefix, VOCAB_SIZE) as writer:
        writer.add_document(ids.astype(np.int64))


def capture(tokens: Path, model: Path, cache: Path, kind: str, dtype: str) -> None:
    """Run the verb; ends the tool where it fails, which it says itself."""
    arguments = [
        f"data.tokens={tokens}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"data.seq_len={SEQ_LEN}",
        f"teacher.kind={kind}",
        f"teacher.path={model}",
        f"teacher.dtype={dtype}",
        f"capture.output_dir={cache}",
        f"capture.num_draws={NUM_DRAWS}",
        # Random weights are no teacher.
        "capture.sanity_gate=off",
    ]
    status = run_verb(["capture", *arguments])
    if status:
        raise SystemExit(status)


def positions(tokens: Path, cache: Path) -> Iterator[list[tuple[Any, Any]]]:
    """What is stored of every position: ids and counts."""
    data = open_sequences(DataConfig(tokens=tokens, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))
    with contextlib.closing(open_cache(cache, data)) as reader:
        for sequence in range(data.plan.num_sequences):
            ids, _ = data.plan.read(np.array([sequence]))
            targets: RaggedTargets = reader.read(sequence, ids[0])
            ends = np.cumsum(targets.entries_per_token)[:-1]
            for one, counts in zip(
                np.split(targets.ids, ends), np.split(targets.values, ends), strict=True
            ):
                yield [*zip(one.tolist(), counts.tolist(), strict=True)]


def moved(tokens: Path, one_cache: Path, other_cache: Path) -> dict[str, int]:
    """Count positions, those with other targets, draws, and those that went to other ids."""
    found = {"positions": 0, "moved": 0, "draws": 0, "draws_moved": 0}
    both = zip(positions(tokens, one_cache), positions(tokens, other_cache), strict=True)
    for one, other in both:
        counts, others = dict(one), dict(other)
        # A draw that went to another id is one too few there and one too many here.
        apart = sum(abs(counts.get(i, 0) - others.get(i, 0)) for i in counts | others)
        found["positions"] += bool(counts)
        found["moved"] += apart > 0
        found["draws"] += sum(counts.values())
        found["draws_moved"] += round(apart / 2)
    return found


def measure(
    tokens: Path, model: Path, folder: Path, pairs: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, int]]:
    """Capture a model in every way that a pair names, and compare the pairs."""
    for way in sorted({way for pair in pairs.values() for way in pair}):
        kind, dtype = way.split()
        capture(tokens, model, folder / way, kind, dtype)
    return {
        name: moved(tokens, folder / one, folder / other) for name, (one, other) in pairs.items()
    }


VERSIONS = ("torch", "megatron-core", "transformers")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| class of the configuration | {' | '.join(PAIRS)} |", "|---" + "|--:" * 3 + "|"]
    for row in rows:
        cells = []
        for name in PAIRS:
            found = row[name]
            share, draws = (
                found["moved"] / found["positions"],
                found["draws_moved"] / found["draws"],
            )
            cells.append(f"{share:.2%} ({draws:.3%})")
        lines.append(f"| `{row['config']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--only", action="append", choices=CONFIGS, help="these families alone")
    parser.add_argument("--sequences", type=int, default=64, help="of 64 tokens; %(default)s")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "train", arguments.sequences)
        for config in arguments.only or CONFIGS:
            save_random(config, folder / config)
            found = measure(
                folder / "train", folder / config, folder / f"{config}, captured", PAIRS
            )
            rows.append({"config": config, **found})
    report: dict[str, Any] = {"environment": environment(*VERSIONS), "num_draws": NUM_DRAWS}
    if arguments.only:
        rows += kept_rows(arguments.output, report, {"config": arguments.only}, VERSIONS)
        rows.sort(key=lambda row: [*CONFIGS].index(row["config"]))
    print(table(rows))
    write_json(arguments.output, {**report, "rows": rows})
    return 0


if __name__ == "__main__":
    run(main)
