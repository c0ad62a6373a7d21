"""A corpus of twelve short sequences of bytes: real text, no tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill_pretrain.corpus.token_writer import TokenIndexWriter

VOCAB_SIZE, SEQ_LEN, NUM_SEQUENCES = 200, 32, 12


def write_small_corpus(prefix: Path) -> Path:
    """Write PREFIX.bin/.idx with seven documents; return the prefix."""
    text = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8)[: SEQ_LEN * NUM_SEQUENCES]
    assert len(text) == SEQ_LEN * NUM_SEQUENCES, "this file became too short"
    with TokenIndexWriter(prefix, VOCAB_SIZE) as writer:
        for document in np.array_split(text.astype(np.int64), 7):
            writer.add_document(document)
    return prefix
