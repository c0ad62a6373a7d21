"""A tokenised corpus, and a cache of targets from a teacher of one's own: what the other examples train on.

    python examples/own_teacher.py FOLDER

Writes FOLDER/train and FOLDER/held_out (.bin/.idx) and FOLDER/cache. The language is a Markov chain whose next-token
distribution is known, so the teacher is the language itself: a table of logits. Any function from tokens [B, L] to
logits [B, L, V] can stand in its place. Killed and started again, it goes on with the shards that are missing.
"""

import sys
from pathlib import Path

import torch

from distill_pretrain import SequencePlan, TokenIndex, TokenIndexWriter, write_cache

VOCAB_SIZE, SEQ_LEN = 64, 32
LANGUAGE = 1.7 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))


def teacher(tokens):
    """Next-token logits [B, L, V] of tokens int64[B, L]."""
    return LANGUAGE[tokens]


def write_corpus(prefix, *, documents, seed):
    """Texts of 128 tokens in this language; returns the corpus."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(VOCAB_SIZE, (documents, 1), generator=generator)
    while texts.size(1) < 128:
        following = torch.multinomial(LANGUAGE[texts[:, -1]].softmax(-1), 1, generator=generator)
        texts = torch.cat((texts, following), 1)
    with TokenIndexWriter(prefix, VOCAB_SIZE) as writer:
        for text in texts:
            writer.add_document(text.numpy())
    return TokenIndex.open(prefix)


def main(folder):
    """Write all of it."""
    write_corpus(folder / "held_out", documents=32, seed=2)
    corpus = write_corpus(folder / "train", documents=48, seed=3)
    finished = write_cache(
        folder / "cache",
        SequencePlan(corpus, seq_len=SEQ_LEN, seed=1),
        teacher,
        vocab_size=VOCAB_SIZE,
        teacher={"name": "the language of examples/own_teacher.py"},
        shard_sequences=64,
    )
    print(f"{folder / 'cache'} is {'finished' if finished else 'being written by others'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
