"""What separate documents and best-fit packing cost, and what a teacher says under either; JSON lines.

    python tools/bench_documents.py step [--rounds 5]
    python tools/bench_documents.py packing
    python tools/bench_documents.py teacher FOLDER PREFIX [PREFIX ...] [--sequences 16] [--seq-len 1024]

`step`: processor time of a student's step with separate documents over one with joined ones, by turns in one process.
`packing`: processor time to build a plan, its padding, and the share of documents cut.
`teacher`: entropy, hit rate and cross-entropy of a Hugging Face teacher on corpora of `tokenize`, joined and separate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEQ_LEN, VOCAB_SIZE, END = 1024, 8192, 5


class Text:
    """A plan of 32 sequences of random tokens in documents of lognormal length."""

    seq_len, num_sequences = SEQ_LEN, 32

    def __init__(self, median: float) -> None:
        draw = np.random.default_rng(0)
        self.stream = draw.integers(END + 1, VOCAB_SIZE, self.num_sequences * SEQ_LEN + 1)
        lengths = np.maximum(2, np.exp(draw.normal(np.log(median), 1.0, len(self.stream))))
        ends = np.cumsum(lengths.astype(np.int64))
        self.stream[ends[ends < len(self.stream)]] = END
        self.stream = self.stream.astype(np.int32)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of sequences."""
        rows = np.stack([self.stream[n * SEQ_LEN : (n + 1) * SEQ_LEN + 1] for n in numbers])
        return rows[:, :-1].copy(), rows[:, 1:].copy()


class Lengths:
    """A corpus of which only the lengths of the documents are known."""

    loss = None
    prefix = "lengths"

    def __init__(self, num_documents: int) -> None:
        draw = np.random.default_rng(0)
        lengths = np.exp(draw.normal(6, 1.1, num_documents)).astype(np.int64) + 1
        self.document_lengths = np.minimum(lengths, 200_000)
        self.num_documents, self.num_tokens = num_documents, int(self.document_lengths.sum())


def step_costs(rounds: int) -> None:
    """Time steps by turns."""
    from distill_pretrain.data.batches import BatchSource, StudentBatches
    from distill_pretrain.losses.config import ObjectiveConfig
    from distill_pretrain.losses.sparse_kd import DistillationObjective
    from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.build import student_class
    from distill_pretrain.processes.process import process_group, released_groups

    torch.set_num_threads(1)
    sizes = {"num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1024}
    model = ModelConfig(**sizes, num_attention_heads=6, num_query_groups=2)
    with process_group(), released_groups(), model_parallel(ParallelConfig(), seed=1) as groups:
        student = student_class(OptimizerConfig())(
            model=model,
            parallel=ParallelConfig(),
            optimizer=OptimizerConfig(),
            groups=groups,
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            precision="fp32",
            seed=1,
            steps=100,
            micro_batch_size=2,
            num_micro_batches=1,
            loss_function=DistillationObjective(
                ObjectiveConfig(), vocab_size=VOCAB_SIZE, tensor_group=groups.tensor
            ),
            num_terms=len(DistillationObjective.TERMS),
        )
        for median in (128, 256, 512, 1024, 4096):
            text = Text(median)
            batches = {
                mode: StudentBatches(
                    [BatchSource(plan=text, cache=None, num_sequences=32, document_end=end)],
                    seed=1,
                    global_batch_size=2,
                    micro_batch_size=2,
                    data_rank=0,
                    data_size=1,
                    device=torch.device("cpu"),
                )
                for mode, end in (("joined", None), ("separate", END))
            }
            ratios = []
            for step in range(rounds + 1):
                seconds = {}
                for mode in sorted(batches, reverse=bool(step % 2)):
                    read = batches[mode].step_batches(step, with_targets=True)
                    started = time.process_time()
                    student.step([iter(read)])
                    seconds[mode] = time.process_time() - started
                if step:  # the first warms up
                    ratios.append(seconds["separate"] / seconds["joined"])
            _say(
                median=median,
                documents_per_sequence=round(float((text.stream == END).sum()) / 32, 2),
                separate_over_joined=round(statistics.median(ratios), 3),
                least=round(min(ratios), 3),
                most=round(max(ratios), 3),
            )


def packing_costs() -> None:
    """Build plans."""
    from distill_pretrain.corpus.sequence_plan import SequencePlan

    for num_documents in (10_000, 100_000, 1_000_000):
        lengths: Any = Lengths(num_documents)
        for seq_len in (2048, 8192):
            for packing in ("cut", "best_fit"):
                started = time.process_time()
                plan = SequencePlan(lengths, seq_len=seq_len, seed=1, packing=packing)
                seconds = time.process_time() - started
                shares = {k: round(v, 6) for k, v in plan.shares._asdict().items()}
                _say(
                    documents=num_documents,
                    seq_len=seq_len,
                    packing=packing,
                    seconds=round(seconds, 3),
                    **shares,
                )


def teacher_figures(folder: Path, prefixes: list[Path], count: int, seq_len: int) -> None:
    """Score the first sequences of every corpus twice."""
    from distill_pretrain import sample_targets
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.teacher.engines import open_engine
    from distill_pretrain.teacher.engines.apart import DocumentsApart

    torch.set_num_threads(1)
    with process_group():
        for prefix in prefixes:
            for mode in ("joined", "separate"):
                data = open_sequences(DataConfig(tokens=prefix, seq_len=seq_len, documents=mode))
                engine: Any = open_engine(
                    "hf", folder, "fp32", vocab_size=data.vocab_size, seq_len=seq_len
                )
                end = open_sequences(
                    DataConfig(tokens=prefix, seq_len=seq_len, documents="separate")
                ).plan.document_end
                assert end is not None
                if mode == "separate":
                    engine = DocumentsApart(engine, end)
                figures = [[], [], [], []]  # type: list[list[Any]]
                for number in range(count):
                    tokens, labels = data.plan.read([number])
                    ends = tokens[0] == end
                    begun = np.flatnonzero(ends)
                    # How far a position is behind the document that ended last; far where none has.
                    behind = np.full(seq_len, seq_len)
                    for place in begun:
                        behind[place + 1 :] = np.arange(seq_len - place - 1)
                    kept = (labels[0] >= 0) & ~ends
                    chunks = engine.chunks(torch.from_numpy(tokens.astype(np.int64)))
                    logits = torch.cat([chunk.logits for chunk in chunks]).float()[kept]
                    wanted = torch.from_numpy(labels[0][kept].astype(np.int64))
                    logprobs = torch.log_softmax(logits, -1)
                    places = torch.from_numpy(np.flatnonzero(kept)) + number * seq_len
                    drawn = sample_targets(logits, places, num_draws=50, seed=1)
                    rows = np.repeat(np.arange(len(wanted)), drawn.entries_per_token)
                    hits = np.bincount(
                        rows[drawn.ids == wanted.numpy()[rows]], minlength=len(wanted)
                    )
                    figures[0].append(-logprobs.gather(1, wanted[:, None])[:, 0].double().numpy())
                    figures[1].append(-(logprobs.exp() * logprobs).sum(-1).double().numpy())
                    figures[2].append(hits > 0)
                    figures[3].append(behind[kept] < 64)
                ce, entropy, hit, early = map(np.concatenate, figures)
                _say(
                    tokens=str(prefix),
                    end_of_document=end,
                    documents=mode,
                    sequences=count,
                    seq_len=seq_len,
                    positions=len(ce),
                    entropy=round(float(entropy.mean()), 4),
                    hit_rate=round(float(hit.mean()), 4),
                    ce=round(float(ce.mean()), 4),
                    first_64_of_later_documents={
                        "positions": int(early.sum()),
                        "entropy": round(float(entropy[early].mean()), 4),
                        "hit_rate": round(float(hit[early].mean()), 4),
                        "ce": round(float(ce[early].mean()), 4),
                    },
                )


def _say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("step").add_argument("--rounds", type=int, default=5)
    verbs.add_parser("packing")
    teacher = verbs.add_parser("teacher")
    teacher.add_argument("folder", type=Path)
    teacher.add_argument("prefixes", type=Path, nargs="+")
    teacher.add_argument("--sequences", type=int, default=16)
    teacher.add_argument("--seq-len", type=int, default=1024)
    given = parser.parse_args()
    if given.verb == "step":
        step_costs(given.rounds)
    elif given.verb == "packing":
        packing_costs()
    else:
        teacher_figures(given.folder, given.prefixes, given.sequences, given.seq_len)


if __name__ == "__main__":
    main()
